// One thread copies 16 bytes of one key row and of the value row beside it.
#include "core/cuda/launch.cuh"
#include "core/cuda/vec.cuh"
#include "core/index/append_kv.h"

namespace unique_attn {
namespace {

constexpr int kThreads = 256;

// ES: bytes per element. Rows are 16-byte aligned multiples of 16 bytes (checked by the op).
template <int ES>
__global__ void __launch_bounds__(kThreads) append_kv_kernel(const AppendKvParams p, int units_per_row, int64_t total) {
  wait_for_previous_kernel();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= total) return;
  const int unit = static_cast<int>(i % units_per_row);
  const int head = static_cast<int>(i / units_per_row % p.num_kv_heads);
  const int64_t n = i / (int64_t{units_per_row} * p.num_kv_heads);
  const int b = static_cast<int>(n / p.num_tokens);
  const int t = static_cast<int>(n % p.num_tokens);

  const TokenPlace place = mapped_place(p, n);
  if (place.block < 0) return;

  const auto source = [&](const TokenView& x) {
    const int64_t row = b * x.stride_batch + t * x.stride_token + head * x.stride_head;
    return static_cast<const char*>(x.data) + row * ES + unit * 16;
  };
  const auto target = [&](const PagedView& cache) {
    const int64_t row = place.block * cache.stride_block + head * cache.stride_head + place.offset * cache.stride_token;
    return static_cast<char*>(cache.data) + row * ES + unit * 16;
  };
  const uint4 k = *reinterpret_cast<const uint4*>(source(p.k));
  const uint4 v = *reinterpret_cast<const uint4*>(source(p.v));
  *reinterpret_cast<uint4*>(target(p.k_cache)) = k;
  *reinterpret_cast<uint4*>(target(p.v_cache)) = v;
}

}  // namespace

cudaError_t append_kv_cuda(const AppendKvParams& params, cudaStream_t stream) {
  const int es = static_cast<int>(dtype_size(params.dtype));
  const int units_per_row = params.head_dim * es / 16;
  const int64_t total = int64_t{params.batch} * params.num_tokens * params.num_kv_heads * units_per_row;
  if (total > 0 && params.slots == nullptr) return cudaErrorInvalidValue;
  if (total == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((total + kThreads - 1) / kThreads);
  return launch_dependent(es == 4 ? append_kv_kernel<4> : append_kv_kernel<2>, blocks, kThreads, 0, stream, params,
                          units_per_row, total);
}

}  // namespace unique_attn
