#include "core/train/sm90/plan.h"
#include "core/train/soft_mask_backward.cuh"

namespace unique_attn {
namespace {

constexpr int kThreads = 128;

// One warp per query head of one token.
template <typename T>
__global__ void __launch_bounds__(kThreads) soft_mask_delta_kernel(const SoftMaskBackwardParams p, int64_t num_rows) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (row >= num_rows) return;
  const int head_dim = p.forward.head_dim;
  const T* out = static_cast<const T*>(p.forward.out) + row * head_dim;
  const T* grad = static_cast<const T*>(p.grad_out) + row * head_dim;
  float sum = 0.f;
  for (int d = threadIdx.x % kWarp; d < head_dim; d += kWarp) sum += to_float(out[d]) * to_float(grad[d]);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
  if (threadIdx.x % kWarp == 0) static_cast<float*>(p.delta)[row] = sum;
}

}  // namespace

cudaError_t soft_mask_delta_cuda(const SoftMaskBackwardParams& params, cudaStream_t stream) {
  const int64_t rows = int64_t{params.forward.seqs.total_tokens} * params.forward.num_q_heads;
  const unsigned blocks = static_cast<unsigned>((rows * kWarp + kThreads - 1) / kThreads);
  UA_DISPATCH_CUDA_DTYPE(params.forward.dtype, T,
                         soft_mask_delta_kernel<T><<<blocks, kThreads, 0, stream>>>(params, rows));
  return cudaGetLastError();
}

cudaError_t soft_mask_backward_cuda(const SoftMaskBackwardParams& params, cudaStream_t stream) {
  if (params.forward.seqs.total_tokens == 0 || params.forward.num_kv_heads == 0) return cudaSuccess;
  DeviceFacts device;
  cudaError_t error = device_facts(device);
  if (error != cudaSuccess) return error;
  const HopperPlan plan = plan_soft_mask(params.forward, true, device);
  if (plan.use) return soft_mask_backward_hopper(params, plan, stream);
  error = soft_mask_delta_cuda(params, stream);
  if (error == cudaSuccess) error = soft_mask_dq_cuda(params, stream);
  if (error == cudaSuccess) error = soft_mask_dkv_cuda(params, stream);
  return error;
}

}  // namespace unique_attn
