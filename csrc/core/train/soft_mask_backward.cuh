// The three kernels of the backward pass, each in a file of its own. Scores and gates are computed again, not stored;
// dq and dk/dv are two passes over the logits, so that no sum depends on the order in which thread blocks run.
#pragma once

#include "core/train/soft_mask_tile.cuh"

namespace unique_attn {

// delta = sum_d grad_out * out per query head.
cudaError_t soft_mask_delta_cuda(const SoftMaskBackwardParams& params, cudaStream_t stream);
cudaError_t soft_mask_dq_cuda(const SoftMaskBackwardParams& params, cudaStream_t stream);
cudaError_t soft_mask_dkv_cuda(const SoftMaskBackwardParams& params, cudaStream_t stream);

// gates.score[token, page] = d loss / d score of the arg-max head, from d loss / d log_gate: the sum of the logits'
// gradients over the group's rows and the page's keys. `row_sum(row, page)` returns the sum over the keys. Every thread
// of the block calls it; it ends with a barrier. The results lie in gates.log_gate (per token), whose gates are used
// up.
template <int kRows, int kThreads, typename RowSum>
__device__ __forceinline__ void score_gradients(GateTile<kRows>& gates, int group, int num_tokens, int num_pages,
                                                const RowSum& row_sum) {
  for (int i = threadIdx.x; i < num_tokens * num_pages; i += kThreads) {
    const int token = i / num_pages;
    const int page = i % num_pages;
    float sum = 0.f;
    for (int g = 0; g < group; ++g) sum += row_sum(token * group + g, page);
    gates.log_gate[token * kGateStride + page] = sum * gates.slope[token * kGateStride + page];
  }
  __syncthreads();
}

}  // namespace unique_attn
