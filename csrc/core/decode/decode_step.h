// A decode step whose tokens are in the cache and the index: scores of all pages, the best of them, attention to those.
#pragma once

#include "core/decode/sparse_decode.h"
#include "core/select/page_scores.h"
#include "core/select/topk_pages.h"

namespace unique_attn {

// Each side's output is the next one's input, of one table. Scores of pages that a query does not see are not needed.
struct DecodeStepParams {
  PageScoresParams scores;
  TopkPagesParams selection;
  SparseDecodeParams attention;
};

inline void decode_step_cpu(const DecodeStepParams& params, const CpuExecutor& exec) {
  page_scores_cpu(params.scores, exec);
  topk_pages_cpu(params.selection, exec);
  sparse_decode_cpu(params.attention, exec);
}

// After page_index or append_index of the same tokens, in one stream. Scores are not written by the kernel that does all
// of it.
cudaError_t decode_step_cuda(const DecodeStepParams& params, cudaStream_t stream);

}  // namespace unique_attn
