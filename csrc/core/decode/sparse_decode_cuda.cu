// sparse_decode: the kernel for the inputs' width, then the merge of its splits.
#include "core/cuda/launch.cuh"
#include "core/decode/sparse_decode_common.cuh"

namespace unique_attn {
namespace {

constexpr int kBatch = 8;  // splits whose results a thread loads together

// One thread block per query head, one thread per channel: weigh the splits by their log-sum-exps.
template <typename T>
__global__ void __launch_bounds__(kMaxHeadDim) combine_splits_kernel(const SparseDecodeParams p) {
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const float* lses = p.partial_lse + row * p.num_splits;
  const float* outs = p.partial_out + row * p.num_splits * p.head_dim + threadIdx.x;
  float out[kBatch];
  const auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) out[i] = begin + i < p.num_splits ? outs[(begin + i) * p.head_dim] : 0.f;
  };
  load(0);  // does not wait for the maximum
  float m = -INFINITY;
  bool any_nan = false;
#pragma unroll 8
  for (int i = 0; i < p.num_splits; ++i) {
    m = fmaxf(m, lses[i]);
    any_nan = any_nan || isnan(lses[i]);
  }
  float sum = 0.f, total = 0.f, weightless = 0.f;
  for (int begin = 0; begin < p.num_splits; begin += kBatch) {
    if (begin > 0) load(begin);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float lse = begin + i < p.num_splits ? lses[begin + i] : -INFINITY;
      const float w = any_nan ? NAN : softmax_weight(lse * kLog2e, m * kLog2e);
      total += w;
      if (w != 0.f) {
        sum += w * out[i];
      } else {
        weightless += out[i];
      }
    }
  }
  // With no weight anywhere the splits are all 0 (nothing visible), or NaN (logits of -inf), which stays.
  static_cast<T*>(p.out)[row * p.head_dim + threadIdx.x] = from_float<T>(total == 0.f ? weightless : sum / total);
  if (threadIdx.x == 0) static_cast<float*>(p.lse)[row] = m + logf(total);
}

}  // namespace

cudaError_t sparse_decode_cuda(const SparseDecodeParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.num_kv_heads == 0) return cudaSuccess;
  const cudaError_t error =
      p.dtype == DType::kFloat32 ? sparse_decode_fma_cuda(p, stream) : sparse_decode_mma_cuda(p, stream);
  if (error != cudaSuccess || p.num_splits == 1) return error;
  const unsigned rows = static_cast<unsigned>(p.batch) * p.num_query_tokens * p.num_q_heads;
  cudaError_t merged = cudaErrorInvalidValue;
  UA_DISPATCH_CUDA_DTYPE(p.dtype, T,
                         { merged = launch_dependent(combine_splits_kernel<T>, rows, p.head_dim, 0, stream, p); });
  return merged;
}

}  // namespace unique_attn
