// Scores of the pages of one thread block by tensor-core products: what page_scores and the step of small batches share.
// A warp takes 16 or 32 pages at a time as the rows of products, and all heads of a group (of as many query tokens as
// fit) as its columns, so that each index entry is read once. The sum over the channels may run in any order that both
// sides share: a lane reads 16 bytes, 8 neighbouring channels, and these are its part of two products of 16 channels.
// Copies of the next entries are under way while the present ones are multiplied.
//
// Squares are rounded to bf16, whose range holds them, as in training: the sum over the channels errs by less than the
// rounding of the score to the score type.
#pragma once

#include "core/cuda/math.cuh"
#include "core/select/entry_ring.cuh"
#include "core/select/page_scores_common.cuh"
#include "core/select/page_scores_rows.cuh"

namespace unique_attn {

constexpr int kProductPages = 16;
constexpr int kColumns = 8;  // query rows of a product

// What a warp takes at a time.
template <typename Row, int kTiles, int kWarps, int kStages>
struct ScoreCut {
  static constexpr int kProducts = kTiles > 1 ? 1 : Row::kProducts;  // one below the other
  static constexpr int kPages = kProducts * kProductPages;
  static constexpr int kStep = kWarps * kPages;  // pages from a tile of a warp to its next
  using Ring = EntryRing<Row, kPages, kStep, kStages>;
};

template <ScoreForm kForm>
constexpr int kOperands = kHasVector<kForm> ? 2 : 1;  // of a query

// A lane's operands of a k-step: queries and, for the variance, their squares.
template <ScoreForm kForm>
struct alignas(8 * kOperands<kForm>) Operands {
  uint2 q[kOperands<kForm>];
};

// Operands of the query rows: [tile of 8 rows, k-step, lane]. One tile is one token, whose heads meet in registers; the
// scores of several tokens go through shared memory. Rows past the last one repeat the others, which changes no
// maximum.
template <ScoreForm kForm, int kSteps, int kTiles, int kWarps>
struct alignas(16) Queries {
  static constexpr int kScores = kTiles > 1 ? kTiles * kColumns + 1 : 1;
  Operands<kForm> operand[kTiles][kSteps][kWarp];
  float norm[kTiles * kColumns];
  float scores[kWarps][kProductPages][kScores];
};

template <typename T, typename Row, ScoreForm kForm, int kSteps, int kTiles, int kWarps>
__device__ __forceinline__ void load_queries(Queries<kForm, kSteps, kTiles, kWarps>& shared, const PageScoresParams& p,
                                             int b, int head, int token_begin, int num_rows, int group) {
  const int num_tiles = (num_rows + kColumns - 1) / kColumns;
  const auto source = [&](int row) {
    const int wrapped = row % num_rows;
    const int token = kTiles > 1 ? wrapped / group : 0;
    return static_cast<const T*>(p.q.data) + b * p.q.stride_batch + (token_begin + token) * p.q.stride_token +
           (head * group + wrapped - token * group) * p.q.stride_head;
  };
  constexpr int kChunks = kSteps * 2;  // of 8 channels
  for (int i = threadIdx.x; i < num_tiles * kColumns * kChunks; i += kWarps * kWarp) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (chunk * 8 < p.head_dim) raw = *reinterpret_cast<const uint4*>(source(row) + chunk * 8);
    unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    Row::query_words(words);
    const int lane = row % kColumns * 4 + Row::chunk_lane(chunk);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned a = words[half * 2], c = words[half * 2 + 1];
      Operands<kForm> operands;
      operands.q[0] = make_uint2(a, c);
      if constexpr (kHasVector<kForm>) operands.q[1] = make_uint2(square2<T>(a), square2<T>(c));
      shared.operand[row / kColumns][Row::chunk_of_lane(chunk) * 2 + half][lane] = operands;
    }
  }
  if constexpr (kHasScalar<kForm>) {
    for (int row = threadIdx.x / kWarp; row < num_tiles * kColumns; row += kWarps) {
      const T* q = source(row);
      float sum = 0.f;
      for (int d = threadIdx.x % kWarp; d < p.head_dim; d += kWarp) sum += to_float(q[d]) * to_float(q[d]);
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
      if (threadIdx.x % kWarp == 0) shared.norm[row] = sqrtf(sum);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// The part of a thread block of kWarps warps. `entries`: kWarps rings of shared memory. store(page, score) is called for
// every page of one query token that it sees (of all of the tile with fill_outside); scores of several go to p.scores.
template <typename T, typename Row, ScoreForm kForm, int kSteps, int kTiles, int kWarps, int kStages, typename Store>
__device__ __forceinline__ void score_pages(const PageScoresParams& p, const ScoreTile& tile, const EntryPieces& pieces,
                                            Queries<kForm, kSteps, kTiles, kWarps>& shared, uint8_t* entries,
                                            const Store& store) {
  using C = ScoreCut<Row, kTiles, kWarps, kStages>;
  const bool nothing = max(tile.seen.first, tile.page_begin) >= min(tile.seen.end, tile.page_end);
  if (nothing && !p.fill_outside) return;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int num_rows = tile.num_tokens * group;
  const int num_tiles = (num_rows + kColumns - 1) / kColumns;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  float weight = static_cast<float>(p.spread_weight);
  asm volatile("" : "+f"(weight));  // or it is converted again for every tile
  const int first = tile.page_begin + warp * C::kPages;

  typename C::Ring ring(p, tile, pieces, entries + warp * C::Ring::bytes(p.head_dim), first);
  if (!nothing) load_queries<T, Row>(shared, p, tile.b, tile.head, tile.token_begin, num_rows, group);

  for (int base = first; base < tile.page_end; base += C::kStep) {
    Row rows[C::kProducts][2];
    ring.wait();
#pragma unroll
    for (int m = 0; m < C::kProducts; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows[m][half].load(ring.entry(m * kProductPages + half * 8 + lane / 4), p.head_dim);
      }
    }
    ring.next();
    const bool any = max(base, tile.seen.first) < min(base + C::kPages, min(tile.seen.end, tile.page_end));
    float best[C::kProducts][2];  // one tile of queries: the maxima of the rows
#pragma unroll
    for (int m = 0; m < C::kProducts; ++m) best[m][0] = best[m][1] = -INFINITY;
    if (any) {
      unsigned mean[C::kProducts][kSteps][4], var[C::kProducts][kHasVector<kForm> ? kSteps : 1][4];
#pragma unroll
      for (int m = 0; m < C::kProducts; ++m) {
        rows[m][0].decode();
        rows[m][1].decode();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            mean[m][step][i] = rows[m][i % 2].mean_pair(step, i / 2);
            if constexpr (kHasVector<kForm>) var[m][step][i] = rows[m][i % 2].var_pair(step, i / 2);
          }
        }
      }
      for (int n = 0; n < (kTiles > 1 ? num_tiles : 1); ++n) {
        float u[C::kProducts][4] = {}, v[C::kProducts][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const Operands<kForm> b = shared.operand[n][step][lane];
#pragma unroll
          for (int m = 0; m < C::kProducts; ++m) {
            mma16816<T>(u[m], mean[m][step], b.q[0].x, b.q[0].y);
            if constexpr (kHasVector<kForm>) mma16816<__nv_bfloat16>(v[m], var[m][step], b.q[1].x, b.q[1].y);
          }
        }
#pragma unroll
        for (int m = 0; m < C::kProducts; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = n * kColumns + lane % 4 * 2 + i % 2;
            if constexpr (kHasVector<kForm>) u[m][i] = fmaf(weight, sqrt_fast(v[m][i]), u[m][i]);
            if constexpr (kHasScalar<kForm>) {
              u[m][i] = fmaf(weight * shared.norm[row], rows[m][i / 2].scalar, u[m][i]);
            }
            if constexpr (kTiles > 1) shared.scores[warp][lane / 4 + i / 2 * 8][row] = u[m][i];
          }
          best[m][0] = max_or_nan(u[m][0], u[m][1]);
          best[m][1] = max_or_nan(u[m][2], u[m][3]);
        }
      }
    } else if (!p.fill_outside) {
      continue;
    }

    if constexpr (kTiles == 1) {
      const auto with_lane = [&](int other) {
#pragma unroll
        for (int m = 0; m < C::kProducts; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            best[m][half] = max_or_nan(best[m][half], __shfl_xor_sync(kFullMask, best[m][half], other));
          }
        }
      };
      with_lane(1);
      if (group > 4) with_lane(2);  // else two lanes, 4 neighbouring columns, have seen all heads
      // Each lane of a quad writes one of its pages, if it has so many.
      const int page = base + lane / 4 + lane % 4 * 8;
      const bool visible = page >= tile.seen.first && page < tile.seen.end;
      if (lane % 4 < C::kProducts * 2 && page < tile.page_end && (visible || p.fill_outside)) {
        const auto pick = [&](int m) { return lane % 2 == 0 ? best[m][0] : best[m][1]; };
        const float score = C::kProducts == 1 || lane % 4 < 2 ? pick(0) : pick(C::kProducts - 1);
        store(page, __float2bfloat16_rn(visible ? score : -INFINITY));
      }
    } else {
      __syncwarp();
      for (int i = lane; i < tile.num_tokens * kProductPages; i += kWarp) {
        const int token = i / kProductPages;
        const int page = base + i % kProductPages;
        if (page >= tile.page_end) continue;
        float most = -INFINITY;
        if (any) {
          const float* scores = shared.scores[warp][i % kProductPages] + token * group;
          for (int g = 0; g < group; ++g) most = max_or_nan(most, scores[g]);
        }
        store_score<__nv_bfloat16>(p, tile, token, page, most);
      }
      __syncwarp();
    }
  }
}

}  // namespace unique_attn
