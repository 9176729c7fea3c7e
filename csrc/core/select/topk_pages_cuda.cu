// Rows of a k that topk_stream does not take: one thread block per row. Radix select over order keys
// (8 bits a round: two rounds for bf16, four for fp32) finds the k-th largest key; then every warp walks its own
// stretch of the row and writes what is above it, and the lowest pages among those equal to it. No step depends on the
// order in which threads run.
#include "core/cuda/radix_select.cuh"
#include "core/cuda/vec.cuh"
#include "core/select/topk_plan.h"
#include "core/select/topk_row.cuh"

namespace unique_attn {
namespace {

template <typename Score, int kThreads>
__global__ void __launch_bounds__(kThreads) topk_radix_kernel(const TopkPagesParams p) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ RadixScratch shared;
  __shared__ int above[kWarps], equal[kWarps];

  const int head_rows = p.num_query_tokens * p.num_kv_heads;
  const int b = blockIdx.x / head_rows;
  const int t = blockIdx.x % head_rows / p.num_kv_heads;
  const Score* scores = static_cast<const Score*>(p.scores) + int64_t{blockIdx.x} * p.row_pages;
  const int tid = threadIdx.x;
  const int lane = tid % kWarp;
  const int warp = tid / kWarp;

  const RowOutput output{p, b, p.pages + int64_t{blockIdx.x} * p.k};
  const RowPlan row = plan_row(p, b, t);
  if (!output.emit_forced(row, tid, kThreads)) return;
  const int wanted = row.k - row.sinks - row.recents;

  // The free candidates are one stretch [low, high), longer than `wanted`.
  const int low = row.first + row.sinks;
  const int high = row.end - row.recents;
  const RadixSelection kth = radix_select<kThreads>(scores, low, high, wanted, shared);

  // Take every key above the k-th and the first `kth.ties` ones equal to it. Stretches of whole warps, in page order.
  const int per_warp = ((high - low + kWarps - 1) / kWarps + kWarp - 1) / kWarp * kWarp;
  const int begin = min(low + warp * per_warp, high);
  const int end = min(begin + per_warp, high);
  int num_above = 0, num_equal = 0;
  for (int base = begin; base < end; base += kWarp) {
    const int page = base + lane;
    const unsigned key = page < end ? order_key(scores[page]) : 0u;
    num_above += __popc(__ballot_sync(kFullMask, page < end && key > kth.key));
    num_equal += __popc(__ballot_sync(kFullMask, page < end && key == kth.key));
  }
  if (lane == 0) {
    above[warp] = num_above;
    equal[warp] = num_equal;
  }
  __syncthreads();
  int above_before = 0, equal_before = 0;
  for (int w = 0; w < warp; ++w) {
    above_before += above[w];
    equal_before += equal[w];
  }
  const int ties = static_cast<int>(kth.ties);
  const unsigned lower_lanes = (1u << lane) - 1u;
  for (int base = begin; base < end; base += kWarp) {
    const int page = base + lane;
    const unsigned key = page < end ? order_key(scores[page]) : 0u;
    const bool is_above = page < end && key > kth.key;
    const bool is_equal = page < end && key == kth.key;
    const unsigned above_mask = __ballot_sync(kFullMask, is_above);
    const unsigned equal_mask = __ballot_sync(kFullMask, is_equal);
    const int equal_rank = equal_before + __popc(equal_mask & lower_lanes);
    const int above_rank = above_before + __popc(above_mask & lower_lanes);
    if (is_above || (is_equal && equal_rank < ties)) output.emit(row.sinks + above_rank + min(equal_rank, ties), page);
    above_before += __popc(above_mask);
    equal_before += __popc(equal_mask);
  }
}

template <typename Score>
cudaError_t launch(const TopkPagesParams& params, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(params.batch) * params.num_query_tokens * params.num_kv_heads;
  if (plan_topk_radix(params.row_pages) == 256) {
    topk_radix_kernel<Score, 256><<<rows, 256, 0, stream>>>(params);
  } else {
    topk_radix_kernel<Score, 1024><<<rows, 1024, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t topk_radix_cuda(const TopkPagesParams& params, cudaStream_t stream) {
  return params.dtype == DType::kFloat32 ? launch<float>(params, stream) : launch<__nv_bfloat16>(params, stream);
}

cudaError_t topk_pages_cuda(const TopkPagesParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.num_kv_heads == 0) return cudaSuccess;
  const cudaError_t error = topk_stream_cuda(params, stream);
  return error == cudaErrorNotSupported ? topk_radix_cuda(params, stream) : error;
}

}  // namespace unique_attn
