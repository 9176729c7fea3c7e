// One thread block per row. Radix select over order-preserving integer keys (8 bits a round: two rounds for bf16, four
// for fp32) finds the k-th largest key; then every warp walks its own stretch of the row and writes what is above it,
// and the lowest pages among those equal to it. No step depends on the order in which threads run.
#include "device_utils.cuh"
#include "topk_pages.h"

namespace unique_attn {
namespace {

constexpr int kBins = 256;

// Order-preserving keys: larger score, larger key. -0 counts as +0, NaN is the smallest key of all.
__device__ __forceinline__ unsigned order_key(__nv_bfloat16 x) {
  unsigned bits = __bfloat16_as_ushort(x);
  if ((bits & 0x7fffu) > 0x7f80u) return 0u;
  if (bits == 0x8000u) bits = 0u;
  return bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
}

__device__ __forceinline__ unsigned order_key(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0u;
  if (bits == 0x80000000u) bits = 0u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct RowPlan {
  int first;        // candidates are [first, end)
  int end;
  int k;            // pages this row may take
  int sinks;        // forced at the front: [first, first + sinks)
  int recents;      // forced at the back: [end - recents, end)
};

__device__ __forceinline__ RowPlan plan_row(const TopkPagesParams& p, int b, int t) {
  const int position = query_position(p.table.seq_lens[b], p.num_query_tokens, t);
  const PageRange range = visible_pages(position, p.window, p.table.page_size);
  RowPlan row;
  row.first = range.first;
  row.end = min(range.end, p.num_pages);
  row.k = p.budget_pages != nullptr ? max(0, min(p.k, p.budget_pages[b])) : p.k;
  row.recents = min(min(p.recent_pages, row.k), max(row.end - row.first, 0));
  row.sinks = max(0, min(min(p.sink_pages, row.end - row.recents) - row.first, row.k - row.recents));
  return row;
}

template <typename Score, int kThreads>
__global__ void __launch_bounds__(kThreads) topk_pages_kernel(const TopkPagesParams p) {
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kKeyBits = sizeof(Score) * 8;
  __shared__ unsigned histogram[kBins];
  __shared__ unsigned state[2];  // chosen bin, pages still wanted inside it
  __shared__ int above[kWarps], equal[kWarps];

  const int head_rows = p.num_query_tokens * p.num_kv_heads;
  const int b = blockIdx.x / head_rows;
  const int t = blockIdx.x % head_rows / p.num_kv_heads;
  const Score* scores = static_cast<const Score*>(p.scores) + int64_t{blockIdx.x} * p.num_pages;
  int32_t* out = p.pages + int64_t{blockIdx.x} * p.k;
  const int tid = threadIdx.x;
  const int lane = tid % kWarp;
  const int warp = tid / kWarp;

  const int pages_per_block = p.table.block_size / p.table.page_size;
  const auto emit = [&](int at, int page) {
    out[at] = p.physical ? p.table.blocks[b * p.table.stride_seq + page / pages_per_block] * pages_per_block +
                               page % pages_per_block
                         : page;
  };

  const RowPlan row = plan_row(p, b, t);
  const int candidates = max(row.end - row.first, 0);
  const int taken = min(candidates, row.k);
  for (int i = taken + tid; i < p.k; i += kThreads) out[i] = -1;
  if (candidates <= row.k) {
    for (int i = tid; i < candidates; i += kThreads) emit(i, row.first + i);
    return;
  }
  for (int i = tid; i < row.sinks; i += kThreads) emit(i, row.first + i);
  for (int i = tid; i < row.recents; i += kThreads) emit(taken - row.recents + i, row.end - row.recents + i);
  const int wanted = row.k - row.sinks - row.recents;
  if (wanted == 0) return;

  // The free candidates are one stretch [low, high), longer than `wanted`.
  const int low = row.first + row.sinks;
  const int high = row.end - row.recents;
  unsigned prefix = 0;  // leading bits of the k-th largest key
  unsigned remaining = wanted;
#pragma unroll
  for (int shift = kKeyBits - 8; shift >= 0; shift -= 8) {
    for (int i = tid; i < kBins; i += kThreads) histogram[i] = 0;
    __syncthreads();
    for (int base = low; base < high; base += kThreads) {
      const int page = base + tid;
      bool counts = page < high;
      unsigned key = 0;
      if (counts) {
        key = order_key(scores[page]);
        counts = shift == kKeyBits - 8 || (key >> (shift + 8)) == prefix;
      }
      const unsigned bin = key >> shift & 0xffu;
      // Scores share their leading bits, so a warp mostly hits one bin: one atomic for all lanes with the same bin.
      const unsigned lanes = __ballot_sync(kFullMask, counts);
      if (counts) {
        const unsigned same = __match_any_sync(lanes, bin);
        if (lane == __ffs(same) - 1) atomicAdd(&histogram[bin], __popc(same));
      }
    }
    __syncthreads();
    if (warp == 0) {
      // Lane l sums the bins from the top: 255 - 8 l down to 248 - 8 l.
      unsigned sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += histogram[kBins - 1 - (lane * 8 + i)];
      unsigned inclusive = sum;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const unsigned other = __shfl_up_sync(kFullMask, inclusive, offset);
        if (lane >= offset) inclusive += other;
      }
      unsigned before = inclusive - sum;  // keys in higher bins
      if (before < remaining && inclusive >= remaining) {
        for (int i = 0; i < 8; ++i) {
          const int bin = kBins - 1 - (lane * 8 + i);
          if (before + histogram[bin] >= remaining) {
            state[0] = bin;
            state[1] = remaining - before;
            break;
          }
          before += histogram[bin];
        }
      }
    }
    __syncthreads();
    prefix = prefix << 8 | state[0];
    remaining = state[1];
  }

  // Take every key above `prefix` and the first `remaining` ones equal to it. Stretches of whole warps, in page order.
  const int per_warp = ((high - low + kWarps - 1) / kWarps + kWarp - 1) / kWarp * kWarp;
  const int begin = min(low + warp * per_warp, high);
  const int end = min(begin + per_warp, high);
  int num_above = 0, num_equal = 0;
  for (int base = begin; base < end; base += kWarp) {
    const int page = base + lane;
    const unsigned key = page < end ? order_key(scores[page]) : 0u;
    num_above += __popc(__ballot_sync(kFullMask, page < end && key > prefix));
    num_equal += __popc(__ballot_sync(kFullMask, page < end && key == prefix));
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
  const int ties = static_cast<int>(remaining);
  const unsigned lower_lanes = (1u << lane) - 1u;
  for (int base = begin; base < end; base += kWarp) {
    const int page = base + lane;
    const unsigned key = page < end ? order_key(scores[page]) : 0u;
    const bool is_above = page < end && key > prefix;
    const bool is_equal = page < end && key == prefix;
    const unsigned above_mask = __ballot_sync(kFullMask, is_above);
    const unsigned equal_mask = __ballot_sync(kFullMask, is_equal);
    const int equal_rank = equal_before + __popc(equal_mask & lower_lanes);
    const int above_rank = above_before + __popc(above_mask & lower_lanes);
    if (is_above || (is_equal && equal_rank < ties)) emit(row.sinks + above_rank + min(equal_rank, ties), page);
    above_before += __popc(above_mask);
    equal_before += __popc(equal_mask);
  }
}

template <typename Score>
cudaError_t launch(const TopkPagesParams& params, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(params.batch) * params.num_query_tokens * params.num_kv_heads;
  if (params.num_pages <= 4096) {
    topk_pages_kernel<Score, 256><<<rows, 256, 0, stream>>>(params);
  } else {
    topk_pages_kernel<Score, 1024><<<rows, 1024, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t topk_pages_cuda(const TopkPagesParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.num_kv_heads == 0) return cudaSuccess;
  return params.dtype == DType::kFloat32 ? launch<float>(params, stream) : launch<__nv_bfloat16>(params, stream);
}

}  // namespace unique_attn
