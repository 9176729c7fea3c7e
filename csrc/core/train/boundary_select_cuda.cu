// The scores on either side of the boundary, per query and KV head. Of bf16 scores (16-bit inputs) a row fits into the
// registers of a few warps: the k'-th largest is found by bisection of the 16 bits of the order key, two scores per
// instruction. Other rows go through the radix select of topk_pages.
#include "core/train/boundary_select.cuh"

namespace unique_attn {
namespace {

// One row: which scores count, and how many are wanted.
struct Row {
  PageRange range;
  int wanted;
  float* theta;
};

__device__ __forceinline__ Row boundary_row(const PageBoundaryParams& p, int64_t row, int begin, int row_pages) {
  const int token = begin + static_cast<int>(row / p.num_kv_heads);
  const int head = static_cast<int>(row % p.num_kv_heads);
  const int position = token - p.seqs.cu_seqlens[sequence_of(p.seqs, token)];
  PageRange range = candidate_pages(position, p.seqs.page_size, p.sink_pages, p.recent_pages);
  range.end = min(range.end, row_pages);
  return {range, max(p.k - p.sink_pages - p.recent_pages, 0),
          static_cast<float*>(p.theta) + int64_t{token} * p.num_kv_heads + head};
}

// Theta of a row without a boundary: fewer candidates than wanted, or none wanted.
__device__ __forceinline__ bool no_boundary(const Row& row, float& theta) {
  const int count = row.range.end - row.range.first;
  if (count > row.wanted && row.wanted > 0) return false;
  theta = count <= row.wanted ? -INFINITY : INFINITY;
  return true;
}

// ---- Rows in registers ----

constexpr int kVectors = 16;                       // of 8 scores, per lane
constexpr int kWarpScores = kVectors * 8 * kWarp;  // 4096
constexpr int kInfinityKey = 0x7f80 | 0x8000;      // order key of +inf

__device__ __forceinline__ __nv_bfloat162 both(unsigned key) {
  return __bfloat162bfloat162(__float2bfloat16_rn(key_score<__nv_bfloat16>(key)));
}

// kTeam warps serve a row of up to kTeam * 4096 scores.
template <int kTeam>
__global__ void __launch_bounds__(kWarp*(kTeam < 4 ? 4 : kTeam))
    boundary_bisect_kernel(const PageBoundaryParams p, int begin, int64_t num_rows, int row_pages) {
  constexpr int kTeams = kTeam < 4 ? 4 / kTeam : 1;
  __shared__ int partial[kTeams][2][kTeam];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp % kTeam;
  const int team = threadIdx.x / kWarp / kTeam;
  const int64_t index = int64_t{blockIdx.x} * kTeams + team;
  if (index >= num_rows) return;  // whole teams; teams of several warps are whole blocks
  const Row row = boundary_row(p, index, begin, row_pages);
  float theta;
  if (no_boundary(row, theta)) {
    if (lane == 0 && warp == 0) *row.theta = theta;
    return;
  }
  // What is no candidate counts as -inf: there are more candidates than wanted, so it never becomes a boundary that a
  // candidate is not.
  const __nv_bfloat16 lowest = __ushort_as_bfloat16(0xff80);
  const auto* scores = static_cast<const __nv_bfloat16*>(p.workspace) + index * row_pages;
  const int first = warp * kWarpScores;
  const int count = min(max((row.range.end - first + 8 * kWarp - 1) / (8 * kWarp), 0), kVectors);
  __nv_bfloat162 x[kVectors][4];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = first + (i * kWarp + lane) * 8;
    uint4 raw = make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u);
    if (i < count && at < row_pages) raw = *reinterpret_cast<const uint4*>(scores + at);
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      __nv_bfloat162 pair = *reinterpret_cast<const __nv_bfloat162*>(&words[j]);
      const int page = at + 2 * j;
      if (page < row.range.first || page >= row.range.end || __hisnan(pair.x)) pair.x = lowest;
      if (page + 1 < row.range.first || page + 1 >= row.range.end || __hisnan(pair.y)) pair.y = lowest;
      x[i][j] = pair;
    }
  }

  int turn = 0;
  // How many scores of the row are at least that of `key`.
  const auto at_least = [&](unsigned key) {
    const __nv_bfloat162 bound = both(key);
    __nv_bfloat162 sum[4];  // at most kVectors each: exact
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] = __bfloat162bfloat162(__ushort_as_bfloat16(0));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i < count) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] = __hadd2(sum[j], __hge2(x[i][j], bound));
      }
    }
    const float2 total = __bfloat1622float2(__hadd2(__hadd2(sum[0], sum[1]), __hadd2(sum[2], sum[3])));
    int found = __reduce_add_sync(kFullMask, static_cast<int>(total.x + total.y));
    if constexpr (kTeam > 1) {
      if (lane == 0) partial[team][turn][warp] = found;
      __syncthreads();
      found = 0;
#pragma unroll
      for (int w = 0; w < kTeam; ++w) found += partial[team][turn][w];
      turn ^= 1;
    }
    return found;
  };
  unsigned low = kLowestKey<__nv_bfloat16>,
           high = kInfinityKey;  // the largest key with at least `wanted` scores is in [low, high]
  while (low < high) {
    const unsigned middle = (low + high + 1) / 2;
    if (at_least(middle) >= row.wanted) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  unsigned next = low;
  if (at_least(low) == row.wanted) {
    const __nv_bfloat162 bound = both(low);
    __nv_bfloat162 top = __bfloat162bfloat162(lowest);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i < count) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (x[i][j].x < bound.x) top.x = __hmax(top.x, x[i][j].x);
          if (x[i][j].y < bound.y) top.y = __hmax(top.y, x[i][j].y);
        }
      }
    }
    next = __reduce_max_sync(kFullMask, order_key(__hmax(top.x, top.y)));
    if constexpr (kTeam > 1) {
      if (lane == 0) partial[team][turn][warp] = static_cast<int>(next);
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kTeam; ++w) next = max(next, static_cast<unsigned>(partial[team][turn][w]));
    }
  }
  if (lane == 0 && warp == 0) {
    *row.theta = 0.5f * (key_score<__nv_bfloat16>(low) + key_score<__nv_bfloat16>(next));
  }
}

// ---- Any row ----

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

template <typename Score>
__global__ void __launch_bounds__(kThreads)
    boundary_radix_kernel(const PageBoundaryParams p, int begin, int row_pages) {
  __shared__ RadixScratch shared;
  __shared__ unsigned below[kWarps];
  const Row row = boundary_row(p, blockIdx.x, begin, row_pages);
  float theta;
  if (no_boundary(row, theta)) {
    if (threadIdx.x == 0) *row.theta = theta;
    return;
  }
  const Score* scores = static_cast<const Score*>(p.workspace) + int64_t{blockIdx.x} * row_pages;
  const RadixSelection kth = radix_select<kThreads>(scores, row.range.first, row.range.end, row.wanted, shared);
  unsigned next = kth.key;  // of the (k + 1)-th
  if (kth.equal == kth.ties) {
    next = 0;
    for (int i = row.range.first + static_cast<int>(threadIdx.x); i < row.range.end; i += kThreads) {
      const unsigned key = order_key(scores[i]);
      if (key < kth.key) next = max(next, key);
    }
    next = __reduce_max_sync(kFullMask, next);
    if (threadIdx.x % kWarp == 0) below[threadIdx.x / kWarp] = next;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) next = max(next, below[w]);
  }
  if (threadIdx.x == 0) *row.theta = 0.5f * (key_score<Score>(kth.key) + key_score<Score>(next));
}

template <int kTeam>
void launch_bisect(const PageBoundaryParams& p, int begin, int64_t rows, int row_pages, cudaStream_t stream) {
  constexpr int kTeams = kTeam < 4 ? 4 / kTeam : 1;
  constexpr int kBlock = kWarp * (kTeam < 4 ? 4 : kTeam);
  boundary_bisect_kernel<kTeam>
      <<<static_cast<unsigned>((rows + kTeams - 1) / kTeams), kBlock, 0, stream>>>(p, begin, rows, row_pages);
}

}  // namespace

cudaError_t boundary_select_cuda(const PageBoundaryParams& p, int begin, int end, int row_pages, cudaStream_t stream) {
  const int64_t rows = int64_t{end - begin} * p.num_kv_heads;
  const auto blocks = static_cast<unsigned>(rows);
  switch (plan_boundary_warps(row_pages, kWarpScores, p.dtype != DType::kFloat32)) {
    case 1:
      launch_bisect<1>(p, begin, rows, row_pages, stream);
      break;
    case 4:
      launch_bisect<4>(p, begin, rows, row_pages, stream);
      break;
    case 8:
      launch_bisect<8>(p, begin, rows, row_pages, stream);
      break;
    default:
      if (p.dtype == DType::kFloat32) {
        boundary_radix_kernel<float><<<blocks, kThreads, 0, stream>>>(p, begin, row_pages);
      } else {
        boundary_radix_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(p, begin, row_pages);
      }
  }
  return cudaGetLastError();
}

}  // namespace unique_attn
