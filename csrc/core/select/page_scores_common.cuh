// What both kernels of page_scores share: which tokens and pages a thread block serves, and what it writes.
#pragma once

#include <algorithm>

#include "core/cuda/launch.cuh"
#include "core/cuda/order_key.cuh"
#include "core/index/format.h"
#include "core/select/page_scores.h"
#include "core/select/score_plan.h"

namespace unique_attn {

// How the work is cut: thread blocks are [sequence and tile of tokens, chunk of pages, KV head]. There are as many
// chunks as a row has that fills the table; a shorter row, whose length the device alone knows, is cut anew, so that a
// table as wide as any length to come costs little.
struct ScoreGrid {
  int tokens_per_tile;
  int num_token_tiles;
  int max_steps;  // that a thread block takes
  int num_chunks;
  int resident_chunks;  // of those of a row that the device holds at once, if rows are alike
};

// `tokens_per_tile` tokens per tile and whole steps of `step` pages; the device holds `slots` thread blocks.
inline ScoreGrid plan_score_grid(const PageScoresParams& p, int tokens_per_tile, int step, int slots) {
  ScoreGrid grid;
  grid.tokens_per_tile = tokens_per_tile;
  grid.num_token_tiles = (p.num_query_tokens + tokens_per_tile - 1) / tokens_per_tile;
  const int rows = p.batch * grid.num_token_tiles * p.num_kv_heads;
  const int steps = (p.row_pages + step - 1) / step;
  grid.max_steps = plan_score_steps(rows, steps, slots);
  grid.num_chunks = (steps + grid.max_steps - 1) / grid.max_steps;
  grid.resident_chunks = std::clamp(slots / rows, 1, grid.num_chunks);
  return grid;
}

inline dim3 score_blocks(const PageScoresParams& p, const ScoreGrid& grid) {
  return dim3(static_cast<unsigned>(p.batch) * grid.num_token_tiles, grid.num_chunks, p.num_kv_heads);
}

// The part of one thread block.
struct ScoreTile {
  int b, head;
  int token_begin, num_tokens;
  int page_begin, page_end;
  int seq_len;
  PageRange seen;  // pages that any token of the tile sees
};

// In steps of `kStep` pages.
template <int kStep>
__device__ __forceinline__ ScoreTile score_tile(const PageScoresParams& p, const ScoreGrid& grid) {
  ScoreTile tile;
  tile.head = blockIdx.z;
  tile.b = blockIdx.x / grid.num_token_tiles;
  tile.token_begin = blockIdx.x % grid.num_token_tiles * grid.tokens_per_tile;
  tile.num_tokens = min(grid.tokens_per_tile, p.num_query_tokens - tile.token_begin);
  tile.seq_len = p.table.seq_lens[tile.b];
  tile.seen = scored_pages(p, tile.b, tile.token_begin, tile.token_begin + tile.num_tokens);
  const int first = p.fill_outside ? 0 : tile.seen.first / kStep;
  const int end = ((p.fill_outside ? p.row_pages : tile.seen.end) + kStep - 1) / kStep;
  const int steps = min((end - first + grid.resident_chunks - 1) / grid.resident_chunks, grid.max_steps);
  tile.page_begin = (first + static_cast<int>(blockIdx.y) * steps) * kStep;
  tile.page_end = min(tile.page_begin + steps * kStep, p.row_pages);
  return tile;
}

template <typename Score>
__device__ __forceinline__ Score* score_row(const PageScoresParams& p, const ScoreTile& tile, int token) {
  return static_cast<Score*>(p.scores) +
         ((int64_t{tile.b} * p.num_query_tokens + tile.token_begin + token) * p.num_kv_heads + tile.head) * p.row_pages;
}

// The score of a page for one token of the tile; -inf, or nothing, if the token does not see it.
template <typename Score>
__device__ __forceinline__ void store_score(const PageScoresParams& p, const ScoreTile& tile, int token, int page,
                                            float score) {
  Score* row = score_row<Score>(p, tile, token);
  const int position = query_position(tile.seq_len, p.num_query_tokens, tile.token_begin + token);
  const PageRange range = visible_pages(position, p.window, p.table.page_size);
  if (page >= range.first && page < range.end) {
    row[page] = from_float<Score>(score);
  } else if (p.fill_outside) {
    row[page] = from_float<Score>(-INFINITY);
  }
}

// Whether page_scores_mma_cuda can: a score of products, and 16-bit inputs and an exact index, or bf16 and a compressed
// one with a usual head dimension.
bool page_scores_on_mma(const PageScoresParams& params);
cudaError_t page_scores_mma_cuda(const PageScoresParams& params, const DeviceFacts& device, cudaStream_t stream);

}  // namespace unique_attn
