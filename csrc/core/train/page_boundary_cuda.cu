// A bounded chunk of queries at a time: scores by matrix products into the workspace, then boundary_select_cuda.cu
// finds the two scores on either side of the boundary.
#include "core/cuda/order_key.cuh"
#include "core/train/boundary_select.cuh"
#include "core/train/sm90/plan.h"
#include "core/train/soft_mask_tile.cuh"

namespace unique_attn {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16 * kWarps;

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
__global__ void __launch_bounds__(kThreads)
    boundary_scores_kernel(const PageBoundaryParams p, int chunk_begin, int chunk_end, int tokens_per_tile,
                           int row_pages, int first_sequence) {
  constexpr int kPages = Shared<T, DP>::kPages;
  constexpr int kStride = tile_stride<T>(DP);
  constexpr int kVarStride = tile_stride<SpreadType<T>>(DP);
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<T, DP>*>(shared_bytes);

  const int b = first_sequence + static_cast<int>(blockIdx.z);
  const int head = blockIdx.y;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int start = p.seqs.cu_seqlens[b];
  const int begin = max(start, chunk_begin) + static_cast<int>(blockIdx.x) * tokens_per_tile;
  const int end = min(p.seqs.cu_seqlens[b + 1], chunk_end);
  if (begin >= end) return;
  const int num_tokens = min(tokens_per_tile, end - begin);
  const int page_size = p.seqs.page_size;
  PageRange range = candidate_pages(begin + num_tokens - 1 - start, page_size, p.sink_pages, p.recent_pages);
  range.end = min(range.end, row_pages);  // a sequence longer than max_seqlen must not leave the workspace
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
    if (p.form == ScoreForm::kVectorSpread) {
      for (int i = threadIdx.x; i < kPages * DP; i += kThreads) {
        const T* vectors = entry(i / DP);
        const int d = i % DP;
        const float std = vectors != nullptr && d < p.head_dim ? to_float(vectors[p.head_dim + d]) : 0.f;
        shared.var[i / DP * kVarStride + d] = from_float<SpreadType<T>>(std * std);
      }
    } else if (p.form == ScoreForm::kScalarSpread && threadIdx.x < kPages) {
      const T* vectors = entry(threadIdx.x);
      shared.std[threadIdx.x] = vectors != nullptr ? to_float(vectors[p.head_dim]) : 0.f;
    }
    copy_async_wait<0>();
    __syncthreads();
    if (first == range.first && p.form == ScoreForm::kScalarSpread) {
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
    if (p.form == ScoreForm::kVectorSpread) {
      multiply_squared_abt<kPages / 8>(v, shared.q + warp * 16 * kStride, kStride, shared.var, kVarStride, DP);
    }
#pragma unroll
    for (int n = 0; n < kPages / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = warp * 16 + lane / 4 + c / 2 * 8;
        const int page = n * 8 + lane % 4 * 2 + c % 2;
        float spread = 0.f;
        if (p.form == ScoreForm::kVectorSpread) spread = sqrtf(v[n][c]);
        if (p.form == ScoreForm::kScalarSpread) spread = shared.q_norm[row] * shared.std[page];
        shared.score[row * (kPages + 1) + page] = u[n][c] + static_cast<float>(p.spread_weight) * spread;
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
      static_cast<ScoreOf<T>*>(p.workspace)[row * row_pages + first + page] =
          from_float<ScoreOf<T>>(any_nan ? NAN : best);
    }
    __syncthreads();
  }
}

// Rows of the workspace are padded, so that they can be read 16 bytes at a time.
int row_pages(const PageBoundaryParams& p) { return boundary_row_pages(p.seqs.max_seqlen, p.seqs.page_size); }

template <typename T, int DP>
cudaError_t launch_scores(const PageBoundaryParams& p, int begin, int end, cudaStream_t stream) {
  const int tokens_per_tile = kRows / (p.num_q_heads / p.num_kv_heads);
  const auto kernel = boundary_scores_kernel<T, DP>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<T, DP>));
  if (error != cudaSuccess) return error;
  const int longest = end - begin < p.seqs.max_seqlen ? end - begin : p.seqs.max_seqlen;
  if (longest == 0) return cudaSuccess;
  const int tiles = (longest + tokens_per_tile - 1) / tokens_per_tile;
  return launch_sequences(p.seqs.batch, [&](int first, unsigned count) {
    const dim3 grid(tiles, p.num_kv_heads, count);
    kernel<<<grid, kThreads, sizeof(Shared<T, DP>), stream>>>(p, begin, end, tokens_per_tile, row_pages(p), first);
  });
}

}  // namespace

cudaError_t page_boundary_cuda(const PageBoundaryParams& params, cudaStream_t stream) {
  const PageBoundaryParams& p = params;
  if (p.seqs.total_tokens == 0 || p.num_kv_heads == 0) return cudaSuccess;
  DeviceFacts device;
  cudaError_t error = device_facts(device);
  const bool hopper = error == cudaSuccess && runs_on_hopper(p.dtype, p.head_dim, device);
  for (int begin = 0; begin < p.seqs.total_tokens && error == cudaSuccess; begin += p.chunk_tokens) {
    const int end = begin + p.chunk_tokens < p.seqs.total_tokens ? begin + p.chunk_tokens : p.seqs.total_tokens;
    error = cudaErrorInvalidValue;
    if (hopper) {
      error = boundary_scores_hopper(p, begin, end, row_pages(p), stream);
    } else {
      UA_DISPATCH_CUDA_DTYPE(p.dtype, T, {
        error = p.head_dim <= 64    ? launch_scores<T, 64>(p, begin, end, stream)
                : p.head_dim <= 128 ? launch_scores<T, 128>(p, begin, end, stream)
                                    : launch_scores<T, 256>(p, begin, end, stream);
      });
    }
    if (error == cudaSuccess) error = boundary_select_cuda(p, begin, end, row_pages(p), stream);
  }
  return error;
}

}  // namespace unique_attn
