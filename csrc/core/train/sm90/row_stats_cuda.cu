// What the backward pass needs of every query head besides its vectors: (lse * log2(e), delta = sum_d grad_out * out),
// side by side, so that one copy of 8 bytes fetches both.
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

constexpr int kThreads = 256;

// A thread takes 8 channels; the threads of a row are neighbours in a warp.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads)
    row_stats_kernel(const SoftMaskBackwardParams b, int64_t rows, float2* stats) {
  constexpr int kLanes = D / 8;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  float sum = 0.f;
  if (row < rows) {
    Vec8<T> out, grad;
    out.load(static_cast<const T*>(b.forward.out) + row * D + lane * 8);
    grad.load(static_cast<const T*>(b.grad_out) + row * D + lane * 8);
    float x[8], y[8];
    out.unpack(x);
    grad.unpack(y);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
  if (row < rows && lane == 0) {
    stats[row] = make_float2(static_cast<const float*>(b.forward.lse)[row] * kLog2e, sum);
  }
}

}  // namespace

cudaError_t launch_row_stats(const SoftMaskBackwardParams& params, float2* stats, cudaStream_t stream) {
  const int64_t rows = int64_t{params.forward.seqs.total_tokens} * params.forward.num_q_heads;
  UA_DISPATCH_HOPPER(params.forward, T, D, {
    const auto blocks = static_cast<unsigned>((rows * (D / 8) + kThreads - 1) / kThreads);
    row_stats_kernel<T, D><<<blocks, kThreads, 0, stream>>>(params, rows, stats);
  });
  return cudaGetLastError();
}

}  // namespace unique_attn
