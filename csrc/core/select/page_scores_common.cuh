// What both kernels of page_scores share: which tokens and pages a thread block serves, and what it writes.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/order_key.cuh"
#include "core/index/format.h"
#include "core/select/page_scores.h"
#include "core/select/score_plan.h"

namespace unique_attn {

// How the work is cut: thread blocks are [sequence and tile of tokens, chunk of pages, KV head].
struct ScoreGrid {
  int tokens_per_tile;
  int num_token_tiles;
  int pages_per_block;
  int num_chunks;
};

// `tokens_per_tile` tokens per tile and whole steps of `step` pages; the device holds `slots` thread blocks.
inline ScoreGrid plan_score_grid(const PageScoresParams& p, int tokens_per_tile, int step, int slots) {
  ScoreGrid grid;
  grid.tokens_per_tile = tokens_per_tile;
  grid.num_token_tiles = (p.num_query_tokens + tokens_per_tile - 1) / tokens_per_tile;
  grid.pages_per_block = plan_score_chunk(p.batch * grid.num_token_tiles * p.num_kv_heads, p.row_pages, step, slots);
  grid.num_chunks = (p.row_pages + grid.pages_per_block - 1) / grid.pages_per_block;
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

__device__ __forceinline__ ScoreTile score_tile(const PageScoresParams& p, const ScoreGrid& grid) {
  ScoreTile tile;
  tile.head = blockIdx.z;
  tile.b = blockIdx.x / grid.num_token_tiles;
  tile.token_begin = blockIdx.x % grid.num_token_tiles * grid.tokens_per_tile;
  tile.num_tokens = min(grid.tokens_per_tile, p.num_query_tokens - tile.token_begin);
  tile.page_begin = static_cast<int>(blockIdx.y) * grid.pages_per_block;
  tile.page_end = min(tile.page_begin + grid.pages_per_block, p.row_pages);
  tile.seq_len = p.table.seq_lens[tile.b];
  tile.seen = scored_pages(p, tile.b, tile.token_begin, tile.token_begin + tile.num_tokens);
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
