// What the forward pass and both halves of the backward pass share: which queries a thread block serves, loading tiles,
// and the gates of a tile of queries against the pages of a tile of keys.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/mma.cuh"
#include "core/train/soft_mask_attention.h"

namespace unique_attn {

constexpr int kTilePages = 16;               // most pages of a tile of 64 keys
constexpr int kGateStride = kTilePages + 1;  // odd, against bank conflicts

// The spread's squares leave the range of fp16, so its product runs in bf16; fp32 stays fp32.
template <typename T>
using SpreadType = std::conditional_t<sizeof(T) == 4, float, __nv_bfloat16>;

// One sequence, one KV head.
struct Segment {
  int b, head, group;
  int start;   // first token of the sequence in the packed batch
  int length;  // tokens of the sequence
};

__device__ __forceinline__ Segment segment(const SoftMaskForwardParams& p, int b, int head) {
  const int start = p.seqs.cu_seqlens[b];
  return {b, head, p.num_q_heads / p.num_kv_heads, start, p.seqs.cu_seqlens[b + 1] - start};
}

// The index entries of the pages of one tile of keys.
template <typename T, int DP>
struct PageTile {
  T mean[kTilePages * tile_stride<T>(DP)];
  SpreadType<T> var[kTilePages * tile_stride<SpreadType<T>>(DP)];  // kVectorSpread
  float std[kTilePages];                                           // kScalarSpread
};

template <int DP, int kThreads, typename T>
__device__ __forceinline__ void load_pages(PageTile<T, DP>& tile, const SoftMaskForwardParams& p, const Segment& s,
                                           int first_page) {
  const int num_pages = s.length / p.seqs.page_size;  // complete ones; no other has a gate
  const auto entry = [&](int i) -> const T* {
    const int page = first_page + i;
    if (page >= num_pages) return nullptr;
    const int slot = page_slot(s.start, s.b, p.seqs.page_size, page);
    return reinterpret_cast<const T*>(p.index.data + slot * p.index.stride_block + s.head * p.index.stride_head);
  };
  load_tile<DP, kThreads>(tile.mean, kTilePages, p.head_dim, entry);
  if (p.form == ScoreForm::kVectorSpread) {
    for (int i = threadIdx.x; i < kTilePages * DP; i += kThreads) {
      const T* vectors = entry(i / DP);
      const int d = i % DP;
      const float std = vectors != nullptr && d < p.head_dim ? to_float(vectors[p.head_dim + d]) : 0.f;
      tile.var[i / DP * tile_stride<SpreadType<T>>(DP) + d] = from_float<SpreadType<T>>(std * std);
    }
  } else if (p.form == ScoreForm::kScalarSpread && threadIdx.x < kTilePages) {
    const T* vectors = entry(threadIdx.x);
    tile.std[threadIdx.x] = vectors != nullptr ? to_float(vectors[p.head_dim]) : 0.f;
  }
}

// Gates of a tile: rows are token * group + head, `kRows` of them; columns are pages.
template <int kRows>
struct GateTile {
  float score[kRows * kGateStride];     // per row; later the sums of d logits over a page's keys
  float spread[kRows * kGateStride];    // per row: sqrt(v) of kVectorSpread
  float log_gate[kRows * kGateStride];  // per token (row `token`), base 2
  float slope[kRows * kGateStride];     // per token: d log gate / d score, natural logarithm
  int best[kRows * kGateStride];        // per token: row of the head with the largest score
  float q_norm[kRows];                  // kScalarSpread
};

template <int DP, int kRows, int kThreads, typename T>
__device__ __forceinline__ void query_norms(GateTile<kRows>& gates, const T* q_tile) {
  for (int row = threadIdx.x; row < kRows; row += kThreads) {
    float sum = 0.f;
    for (int d = 0; d < DP; ++d) {
      const float x = to_float(q_tile[row * tile_stride<T>(DP) + d]);
      sum += x * x;
    }
    gates.q_norm[row] = sqrtf(sum);
  }
}

// Whether a query at one of the positions [first, last] has a gate on one of the pages [first_page, end_page).
__device__ __forceinline__ bool any_gate(const SoftMaskForwardParams& p, int last_position, int first_page,
                                         int end_page) {
  if (p.mode == MaskMode::kDense) return false;
  const PageRange range = candidate_pages(last_position, p.seqs.page_size, p.sink_pages, p.recent_pages);
  return max(range.first, first_page) < min(range.end, end_page);
}

// Position of `page` in an ascending list padded with -1, as a yes or no.
__device__ __forceinline__ bool contains(const int32_t* pages, int count, int page) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    const int at = pages[middle];
    if (at == page) return true;
    if (at >= 0 && at < page) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return false;
}

// Fills gates.log_gate (and slope, best, spread for the backward pass) of `num_tokens` tokens from `first_token` on
// against the pages [first_page, first_page + num_pages). Every thread of the block calls it; it ends with a barrier.
template <int DP, int kRows, int kThreads, typename T>
__device__ __forceinline__ void compute_gates(GateTile<kRows>& gates, const SoftMaskForwardParams& p, const Segment& s,
                                              const T* q_tile, const PageTile<T, DP>& pages, int first_token,
                                              int num_tokens, int first_page, int num_pages) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (p.mode == MaskMode::kSoft && warp * 16 < kRows) {
    float u[2][4] = {}, v[2][4] = {};
    const T* rows = q_tile + warp * 16 * tile_stride<T>(DP);
    multiply_abt<2>(u, rows, tile_stride<T>(DP), pages.mean, tile_stride<T>(DP), DP);
    if (p.form == ScoreForm::kVectorSpread) {
      multiply_squared_abt<2>(v, rows, tile_stride<T>(DP), pages.var, tile_stride<SpreadType<T>>(DP), DP);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = warp * 16 + lane / 4 + c / 2 * 8;
        const int page = n * 8 + lane % 4 * 2 + c % 2;
        float root = 0.f;
        if (p.form == ScoreForm::kVectorSpread) root = sqrtf(v[n][c]);
        if (p.form == ScoreForm::kScalarSpread) root = gates.q_norm[row] * pages.std[page];
        gates.score[row * kGateStride + page] = u[n][c] + static_cast<float>(p.spread_weight) * root;
        gates.spread[row * kGateStride + page] = root;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_tokens * num_pages; i += kThreads) {
    const int token = i / num_pages;
    const int page = i % num_pages;
    const int at = token * kGateStride + page;
    const PageRange range = candidate_pages(first_token + token, p.seqs.page_size, p.sink_pages, p.recent_pages);
    float log_gate = 0.f, slope = 0.f;
    int best = token * s.group;
    if (first_page + page >= range.first && first_page + page < range.end) {
      const int64_t n = int64_t{s.start} + first_token + token;
      if (p.mode == MaskMode::kHard) {
        const int32_t* list = p.pages + (n * p.num_kv_heads + s.head) * p.num_selected;
        log_gate = contains(list, p.num_selected, first_page + page) ? 0.f : -INFINITY;
      } else {
        float score = gates.score[best * kGateStride + page];
        for (int row = best + 1; row < (token + 1) * s.group; ++row) {
          const float other = gates.score[row * kGateStride + page];
          if (other > score || (isnan(other) && !isnan(score))) {
            score = other;
            best = row;
          }
        }
        const float theta = static_cast<const float*>(p.theta)[n * p.num_kv_heads + s.head];
        // No gate where there is no boundary, whatever the score is.
        if (theta != -INFINITY) {
          const float x = (score - theta) / *p.tau;
          log_gate = (fminf(x, 0.f) - log1pf(expf(-fabsf(x)))) * kLog2e;  // log2 sigmoid(x)
          slope = 1.f / ((1.f + expf(x)) * *p.tau);                       // (1 - g) / tau
        }
      }
    }
    gates.log_gate[at] = log_gate;
    gates.slope[at] = slope;
    gates.best[at] = best;
  }
  __syncthreads();
}

}  // namespace unique_attn
