// Compute the index entries of the pages that an append touched.
#pragma once

#include "cpu_exec.h"
#include "cuda_fwd.h"
#include "types.h"

namespace unique_attn {

// Touched pages of sequence b: from the page of token start_lens[b] to the page of its last token.
// Every one of them is computed anew from its keys (two-pass, accumulated in fp32, fp64 for fp64),
// using the tokens it has; nothing else is read or written.
struct PageIndexParams {
  DType dtype;  // of the keys and of the entries
  Rule rule;
  int batch;                  // B
  int num_kv_heads;           // H
  int head_dim;               // D
  PagedView k_cache;          // [num_blocks, H, block_size, D], read
  IndexView index;            // [num_blocks, H, pages_per_block, entry_bytes], written
  PageTable table;            // seq_lens are the lengths after the append
  const int32_t* start_lens;  // [B] lengths before the append; null: seq_len - max_new_tokens, at least 0
  int max_new_tokens;         // host-known upper bound of seq_len - start_len
};

void page_index_cpu(const PageIndexParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait.
cudaError_t page_index_cuda(const PageIndexParams& params, cudaStream_t stream);

}  // namespace unique_attn
