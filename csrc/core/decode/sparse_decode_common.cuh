// What both kernels of sparse_decode share: where a split's result goes.
#pragma once

#include "core/cuda/math.cuh"
#include "core/cuda/vec.cuh"
#include "core/decode/sparse_decode.h"

namespace unique_attn {

// Channel d of a query head's result over one split; lse by the thread of channel 0.
template <typename T>
__device__ __forceinline__ void store_split(const SparseDecodeParams& p, int64_t row, int split, int d, float out,
                                            float lse) {
  if (p.num_splits == 1) {
    static_cast<T*>(p.out)[row * p.head_dim + d] = from_float<T>(out);
    if (d == 0) static_cast<float*>(p.lse)[row] = lse;
  } else {
    p.partial_out[(row * p.num_splits + split) * p.head_dim + d] = out;
    if (d == 0) p.partial_lse[row * p.num_splits + split] = lse;
  }
}

// 16-bit inputs, on tensor cores.
cudaError_t sparse_decode_mma_cuda(const SparseDecodeParams& params, cudaStream_t stream);
// fp32.
cudaError_t sparse_decode_fma_cuda(const SparseDecodeParams& params, cudaStream_t stream);

}  // namespace unique_attn
