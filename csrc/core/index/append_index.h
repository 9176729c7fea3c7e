// What a decode step begins with: append_kv of its tokens, then page_index of the pages that they touch.
#pragma once

#include "core/index/append_kv.h"
#include "core/index/page_index.h"

namespace unique_attn {

// Both sides speak of the same tokens: without start_lens, of one table, cache and number of tokens.
struct AppendIndexParams {
  AppendKvParams append;
  PageIndexParams index;
};

inline void append_index_cpu(const AppendIndexParams& params, const CpuExecutor& exec) {
  append_kv_cpu(params.append, exec);
  page_index_cpu(params.index, exec);
}

// One kernel: the thread that computes a channel's statistics writes that channel of the new tokens first.
cudaError_t append_index_cuda(const AppendIndexParams& params, cudaStream_t stream);

}  // namespace unique_attn
