// A bounded chunk of queries at a time: scores by matrix products into the workspace, then one thread block per row
// finds the two scores on either side of the boundary.
#include "page_boundary.h"
#include "radix_select.cuh"
#include "soft_mask_tile.cuh"

namespace unique_attn {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16 * kWarps;

template <typename T>
using Key = std::conditional_t<sizeof(T) == 4, float, __nv_bfloat16>;

template <typename T, int DP>
struct Shared {
  static constexpr int kPages = sizeof(T) == 4 || DP > 128 ? 32 : 64;
  T q[kRows * tile_stride<T>(DP)];
  T mean[kPages * tile_stride<T>(DP)];
  SpreadType<T> var[kPages * tile_stride<SpreadType<T>>(DP)];
  float std[kPages];
  float q_norm[kRows];
  float score[kRows * (kPages + 1)];
};

// Scores of the tokens [chunk_begin, chunk_end) of the packed batch on their candidate pages.
template <typename T, int DP>
__global__ void __launch_bounds__(kThreads) boundary_scores_kernel(const PageBoundaryParams p, int chunk_begin,
                                                                   int chunk_end, int tokens_per_tile, int max_pages) {
  constexpr int kPages = Shared<T, DP>::kPages;
  constexpr int kStride = tile_stride<T>(DP);
  constexpr int kVarStride = tile_stride<SpreadType<T>>(DP);
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<T, DP>*>(shared_bytes);

  const int b = blockIdx.z;
  const int head = blockIdx.y;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int start = p.seqs.cu_seqlens[b];
  const int begin = max(start, chunk_begin) + static_cast<int>(blockIdx.x) * tokens_per_tile;
  const int end = min(p.seqs.cu_seqlens[b + 1], chunk_end);
  if (begin >= end) return;
  const int num_tokens = min(tokens_per_tile, end - begin);
  const int page_size = p.seqs.page_size;
  const PageRange range = candidate_pages(begin + num_tokens - 1 - start, page_size, p.sink_pages, p.recent_pages);
  if (range.first >= range.end) return;

  load_tile<DP, kThreads>(shared.q, kRows, p.head_dim, [&](int row) -> const T* {
    const int token = row / group;
    if (token >= num_tokens) return nullptr;
    return static_cast<const T*>(p.q) + int64_t{begin + token} * p.q_stride_token +
           (head * group + row % group) * p.q_stride_head;
  });
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int first = range.first; first < range.end; first += kPages) {
    const auto entry = [&](int i) -> const T* {
      if (first + i >= range.end) return nullptr;
      const int slot = page_slot(start, b, page_size, first + i);
      return reinterpret_cast<const T*>(p.index.data + slot * p.index.stride_block + head * p.index.stride_head);
    };
    load_tile<DP, kThreads>(shared.mean, kPages, p.head_dim, entry);
    copy_async_commit();
    if (p.rule == Rule::kDirectional) {
      for (int i = threadIdx.x; i < kPages * DP; i += kThreads) {
        const T* vectors = entry(i / DP);
        const int d = i % DP;
        const float std = vectors != nullptr && d < p.head_dim ? to_float(vectors[p.head_dim + d]) : 0.f;
        shared.var[i / DP * kVarStride + d] = from_float<SpreadType<T>>(std * std);
      }
    } else if (p.rule == Rule::kUnique && threadIdx.x < kPages) {
      const T* vectors = entry(threadIdx.x);
      shared.std[threadIdx.x] = vectors != nullptr ? to_float(vectors[p.head_dim]) : 0.f;
    }
    copy_async_wait<0>();
    __syncthreads();
    if (first == range.first && p.rule == Rule::kUnique) {
      for (int row = threadIdx.x; row < kRows; row += kThreads) {
        float sum = 0.f;
        for (int d = 0; d < DP; ++d)
          sum += to_float(shared.q[row * kStride + d]) * to_float(shared.q[row * kStride + d]);
        shared.q_norm[row] = sqrtf(sum);
      }
      __syncthreads();
    }
    float u[kPages / 8][4] = {}, v[kPages / 8][4] = {};
    multiply_abt<kPages / 8>(u, shared.q + warp * 16 * kStride, kStride, shared.mean, kStride, DP);
    if (p.rule == Rule::kDirectional) {
      multiply_squared_abt<kPages / 8>(v, shared.q + warp * 16 * kStride, kStride, shared.var, kVarStride, DP);
    }
#pragma unroll
    for (int n = 0; n < kPages / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = warp * 16 + lane / 4 + c / 2 * 8;
        const int page = n * 8 + lane % 4 * 2 + c % 2;
        float spread = 0.f;
        if (p.rule == Rule::kDirectional) spread = sqrtf(v[n][c]);
        if (p.rule == Rule::kUnique) spread = shared.q_norm[row] * shared.std[page];
        shared.score[row * (kPages + 1) + page] = u[n][c] + static_cast<float>(p.spread) * spread;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens * kPages; i += kThreads) {
      const int token = i / kPages;
      const int page = i % kPages;
      if (first + page >= range.end) continue;
      float best = -INFINITY;
      bool any_nan = false;
      for (int g = 0; g < group; ++g) {
        const float score = shared.score[(token * group + g) * (kPages + 1) + page];
        any_nan = any_nan || isnan(score);
        best = fmaxf(best, score);
      }
      const int64_t row = int64_t{begin + token - chunk_begin} * p.num_kv_heads + head;
      static_cast<Key<T>*>(p.workspace)[row * max_pages + first + page] = from_float<Key<T>>(any_nan ? NAN : best);
    }
    __syncthreads();
  }
}

template <typename Score>
__global__ void __launch_bounds__(kThreads)
    boundary_select_kernel(const PageBoundaryParams p, int chunk_begin, int max_pages) {
  __shared__ RadixScratch shared;
  __shared__ unsigned below[kWarps];
  const int token = chunk_begin + static_cast<int>(blockIdx.x) / p.num_kv_heads;
  const int head = static_cast<int>(blockIdx.x) % p.num_kv_heads;
  // The sequence of the token: the last one that starts at or before it and is not empty.
  int low = 0, high = p.seqs.batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.seqs.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int position = token - p.seqs.cu_seqlens[low];
  const PageRange range = candidate_pages(position, p.seqs.page_size, p.sink_pages, p.recent_pages);
  float* theta = static_cast<float*>(p.theta) + int64_t{token} * p.num_kv_heads + head;
  const int wanted = max(p.k - p.sink_pages - p.recent_pages, 0);
  if (range.end - range.first <= wanted || wanted == 0) {
    if (threadIdx.x == 0) *theta = range.end - range.first <= wanted ? -INFINITY : INFINITY;
    return;
  }
  const Score* scores = static_cast<const Score*>(p.workspace) + int64_t{blockIdx.x} * max_pages;
  const RadixSelection kth = radix_select<kThreads>(scores, range.first, range.end, wanted, shared);
  unsigned next = kth.key;  // of the (k + 1)-th
  if (kth.equal == kth.ties) {
    next = 0;
    for (int i = range.first + static_cast<int>(threadIdx.x); i < range.end; i += kThreads) {
      const unsigned key = order_key(scores[i]);
      if (key < kth.key) next = max(next, key);
    }
    next = __reduce_max_sync(kFullMask, next);
    if (threadIdx.x % kWarp == 0) below[threadIdx.x / kWarp] = next;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) next = max(next, below[w]);
  }
  if (threadIdx.x == 0) *theta = 0.5f * (key_score<Score>(kth.key) + key_score<Score>(next));
}

template <typename T, int DP>
cudaError_t launch(const PageBoundaryParams& p, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  const int tokens_per_tile = kRows / group;
  const int max_pages = (p.seqs.max_seqlen + p.seqs.page_size - 1) / p.seqs.page_size;
  const auto scores = boundary_scores_kernel<T, DP>;
  cudaError_t error = cudaFuncSetAttribute(scores, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<T, DP>));
  if (error != cudaSuccess) return error;
  for (int begin = 0; begin < p.seqs.total_tokens; begin += p.chunk_tokens) {
    const int end = begin + p.chunk_tokens < p.seqs.total_tokens ? begin + p.chunk_tokens : p.seqs.total_tokens;
    const dim3 grid((end - begin + tokens_per_tile - 1) / tokens_per_tile, p.num_kv_heads, p.seqs.batch);
    scores<<<grid, kThreads, sizeof(Shared<T, DP>), stream>>>(p, begin, end, tokens_per_tile, max_pages);
    const unsigned rows = static_cast<unsigned>(end - begin) * p.num_kv_heads;
    boundary_select_kernel<Key<T>><<<rows, kThreads, 0, stream>>>(p, begin, max_pages);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t page_boundary_cuda(const PageBoundaryParams& params, cudaStream_t stream) {
  if (params.seqs.total_tokens == 0 || params.num_kv_heads == 0) return cudaSuccess;
  cudaError_t error = cudaErrorInvalidValue;
  UA_DISPATCH_CUDA_DTYPE(params.dtype, T, {
    error = params.head_dim <= 64    ? launch<T, 64>(params, stream)
            : params.head_dim <= 128 ? launch<T, 128>(params, stream)
                                     : launch<T, 256>(params, stream);
  });
  return error;
}

}  // namespace unique_attn
