// Sparse attention of 16-bit inputs on tensor cores: one thread block per (sequence, query token, KV head, split of the
// selected pages), attend_pages.cuh in each. The splits are merged by combine_splits.
#include "core/cuda/launch.cuh"
#include "core/cuda/once.cuh"
#include "core/decode/attend_pages.cuh"
#include "core/decode/sparse_decode_common.cuh"
#include "core/decode/split_plan.h"

namespace unique_attn {
namespace {

// Two warps with 20 KB of ring each: 5 blocks fill the shared memory of a Hopper multiprocessor. Four warps where there
// are too few blocks for that: 2 of them fill it. Up to 99 KB per block, the limit of compute capability 8.6 and 8.9.
template <int DP, int Warps>
constexpr int kUnits = DP == 64     ? 10
                       : DP == 128  ? 5
                       : Warps == 2 ? 4
                                    : 3;

template <typename T, int DP, int Warps>
using Shared = AttendShared<T, DP, Warps, kUnits<DP, Warps>>;

template <typename T, int DP, int NT, int Warps>
__global__ void __launch_bounds__(Warps* kWarp)
    sparse_decode_mma_kernel(const SparseDecodeParams p, int pages_per_split) {
  wait_for_previous_kernel();
  extern __shared__ __align__(128) char shared_bytes[];
  const int t = blockIdx.x % p.num_query_tokens;
  const int b = blockIdx.x / p.num_query_tokens;
  const int head = blockIdx.y;
  const int split = blockIdx.z;
  const int first = split * pages_per_split;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int32_t* pages = p.pages + (int64_t{blockIdx.x} * p.num_kv_heads + head) * p.k + first;
  attend_pages<T, DP, NT, Warps, kUnits<DP, Warps>>(
      p, *reinterpret_cast<Shared<T, DP, Warps>*>(shared_bytes), b, t, head, pages, min(pages_per_split, p.k - first),
      // A row without a visible token is 0; one whose logits are all -inf is 0 / 0 = NaN, as in any softmax.
      [&](int row, int d, float sum, float m, float l, bool empty) {
        store_split<T>(p, int64_t{blockIdx.x} * p.num_q_heads + head * group + row, split, d, empty ? 0.f : sum / l,
                       (m + log2f(l)) * kLn2);
      });
}

template <typename T, int DP, int NT, int Warps>
cudaError_t launch(const SparseDecodeParams& p, int pages_per_split, const DeviceFacts& device, cudaStream_t stream) {
  const auto kernel = sparse_decode_mma_kernel<T, DP, NT, Warps>;
  constexpr int kBytes = sizeof(Shared<T, DP, Warps>);
  static_assert(kBytes <= 99 * 1024);
  static OncePerDevice once;
  const cudaError_t error = once(device, [&] {
    const cudaError_t room = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (room != cudaSuccess) return room;
    // All of the first-level cache as shared memory: the copies pass it by, and the blocks in flight are what counts.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  });
  if (error != cudaSuccess) return error;
  const dim3 grid(p.batch * p.num_query_tokens, p.num_kv_heads, p.num_splits);
  return launch_dependent(kernel, grid, Warps * kWarp, kBytes, stream, p, pages_per_split);
}

template <typename T, int DP, int NT>
cudaError_t launch(const SparseDecodeParams& p, cudaStream_t stream) {
  const int pages_per_split = (p.k + p.num_splits - 1) / p.num_splits;
  DeviceFacts device;
  const cudaError_t error = device_facts(device);
  if (error != cudaSuccess) return error;
  const int64_t blocks = int64_t{p.batch} * p.num_query_tokens * p.num_kv_heads * p.num_splits;
  const int tokens_per_split = pages_per_split * p.table.page_size;
  return plan_decode_warps(blocks, tokens_per_split, kTokens, device.multiprocessors) == 4
             ? launch<T, DP, NT, 4>(p, pages_per_split, device, stream)
             : launch<T, DP, NT, 2>(p, pages_per_split, device, stream);
}

template <typename T, int DP>
cudaError_t launch(const SparseDecodeParams& p, cudaStream_t stream) {
  static_assert(kMaxGroup == 16, "8 or 16 columns");
  return p.num_q_heads / p.num_kv_heads <= 8 ? launch<T, DP, 1>(p, stream) : launch<T, DP, 2>(p, stream);
}

template <typename T>
cudaError_t launch(const SparseDecodeParams& p, cudaStream_t stream) {
  return p.head_dim <= 64    ? launch<T, 64>(p, stream)
         : p.head_dim <= 128 ? launch<T, 128>(p, stream)
                             : launch<T, 256>(p, stream);
}

}  // namespace

cudaError_t sparse_decode_mma_cuda(const SparseDecodeParams& params, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace unique_attn
