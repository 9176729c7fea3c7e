// One row of topk_pages' output; shared by its kernels.
#pragma once

#include "core/cuda/vec.cuh"
#include "core/select/topk_pages.h"

namespace unique_attn {

// One row of the output.
struct RowOutput {
  const TopkPagesParams& p;
  int b;
  int32_t* out;

  __device__ __forceinline__ void emit(int at, int page) const { out[at] = output_page(p, b, page); }

  // All that needs no scores, by `threads` threads; false if nothing is left to select. Short loops, which are not to
  // be unrolled: fetching the code takes longer than running it.
  __device__ __forceinline__ bool emit_forced(const RowPlan& row, int thread, int threads) const {
    const int candidates = row.end - row.first;
    const int taken = min(candidates, row.k);
#pragma unroll 1
    for (int i = taken + thread; i < p.k; i += threads) out[i] = -1;
    if (candidates <= row.k) {
#pragma unroll 1
      for (int i = thread; i < candidates; i += threads) emit(i, row.first + i);
      return false;
    }
#pragma unroll 1
    for (int i = thread; i < row.sinks; i += threads) emit(i, row.first + i);
#pragma unroll 1
    for (int i = thread; i < row.recents; i += threads) emit(taken - row.recents + i, row.end - row.recents + i);
    return row.k > row.sinks + row.recents;
  }
};

// Any k, by radix select in several passes over memory.
cudaError_t topk_radix_cuda(const TopkPagesParams& params, cudaStream_t stream);
// One pass over memory, for k <= 512; cudaErrorNotSupported for others.
cudaError_t topk_stream_cuda(const TopkPagesParams& params, cudaStream_t stream);

}  // namespace unique_attn
