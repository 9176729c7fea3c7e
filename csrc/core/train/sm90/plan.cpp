#include "core/train/sm90/plan.h"

namespace unique_attn {
namespace {

// Memory for what is computed per (query, page), in bytes; a chunk never has less than one tile.
constexpr size_t kChunkBytes = size_t{384} << 20;

constexpr size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// The number of tiles, at most `most`, whose thread blocks fill the device best; the larger on near ties.
int full_waves(int64_t most, int blocks_per_tile, int multiprocessors) {
  int chosen = 1;
  double best = 0.;
  for (int64_t n = 1; n <= most && n <= 8 * multiprocessors; ++n) {
    const int64_t blocks = n * blocks_per_tile;
    const int64_t waves = (blocks + multiprocessors - 1) / multiprocessors;
    const double share = static_cast<double>(blocks) / static_cast<double>(waves * multiprocessors);
    if (share >= best - 0.02) {
      chosen = static_cast<int>(n);
      best = share > best ? share : best;
    }
  }
  return chosen;
}

}  // namespace

bool runs_on_hopper(DType dtype, int head_dim, const DeviceFacts& device) {
  return device.runs_sm90 && (dtype == DType::kBFloat16 || dtype == DType::kFloat16) &&
         (head_dim == 64 || head_dim == 128);
}

HopperPlan plan_soft_mask(const SoftMaskForwardParams& p, bool backward, const DeviceFacts& device) {
  HopperPlan plan;
  plan.use = runs_on_hopper(p.dtype, p.head_dim, device) && p.scale != 0. && p.seqs.total_tokens > 0 &&
             p.seqs.max_seqlen > 0 && p.num_kv_heads > 0;
  if (!plan.use) return plan;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t num_tokens = p.seqs.total_tokens;
  const int64_t longest = p.seqs.max_seqlen;
  const int heads = p.num_kv_heads;
  plan.tokens = 64 / group;
  plan.chunk_tokens = static_cast<int>(num_tokens);
  plan.chunk_keys = static_cast<int>(num_tokens);
  size_t offset = 0;
  const auto take = [&](size_t bytes) {
    const size_t at = offset;
    offset += aligned(bytes);
    return at;
  };
  const size_t rows = static_cast<size_t>(num_tokens) * p.num_q_heads;
  const size_t entries =
      static_cast<size_t>(num_page_slots(p.seqs.total_tokens, p.seqs.batch, p.seqs.page_size)) * heads * p.head_dim;
  if (backward) plan.stats = take(rows * 2 * sizeof(float));
  if (p.mode != MaskMode::kDense) {
    const int page_size = p.seqs.page_size;
    plan.width = static_cast<int>(((longest + page_size - 1) / page_size + 15) / 16 * 16);
    const bool soft = p.mode == MaskMode::kSoft;
    const size_t cell = backward && soft ? 5 : 2;  // bytes per (token, head, page)
    const size_t token_bytes = cell * heads * plan.width + (cell == 5 ? size_t{2} * p.num_q_heads * p.head_dim : 0);
    const int tile = 2 * plan.tokens;
    const int64_t all_tiles = (num_tokens + tile - 1) / tile;
    const int64_t most = static_cast<int64_t>(kChunkBytes / (token_bytes * tile));
    const int64_t chunk = all_tiles <= most ? all_tiles : full_waves(most, heads, device.multiprocessors);
    plan.chunk_tokens = static_cast<int>(chunk * tile < num_tokens ? chunk * tile : num_tokens);
    const size_t cells = static_cast<size_t>(plan.chunk_tokens) * heads * plan.width;
    size_t gates = cells;
    if (backward) {
      const int pages = kDkvKeys / page_size;  // of a tile
      const int64_t all_key_tiles = (num_tokens + kDkvKeys - 1) / kDkvKeys;
      const size_t tile_bytes = static_cast<size_t>(num_tokens) * heads * pages * 2;
      const int64_t most_keys = static_cast<int64_t>(kChunkBytes / tile_bytes);
      const int64_t key_tiles =
          all_key_tiles <= most_keys ? all_key_tiles : full_waves(most_keys, heads, device.multiprocessors);
      plan.chunk_keys = static_cast<int>(key_tiles * kDkvKeys);
      const int64_t longest_tiles = (longest + kDkvKeys - 1) / kDkvKeys;
      const int64_t tiles = key_tiles < longest_tiles ? key_tiles : longest_tiles;
      plan.key_width = static_cast<int>((tiles * pages + 15) / 16 * 16);
      const size_t key_cells = static_cast<size_t>(num_tokens) * heads * plan.key_width;
      gates = gates > key_cells ? gates : key_cells;
    }
    plan.log_gates = take(gates * 2);
    if (soft) plan.squares = take(entries * 2);
    if (soft && backward) {
      plan.best = take(cells);
      plan.slopes = take(cells * 2);
      plan.q_squares = take(static_cast<size_t>(plan.chunk_tokens) * p.num_q_heads * p.head_dim * 2);
      plan.page_grads = take(entries * 2 * sizeof(float));
    }
  }
  plan.bytes = offset;
  return plan;
}

}  // namespace unique_attn
