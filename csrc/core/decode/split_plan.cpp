#include "core/decode/split_plan.h"

#include <algorithm>
#include <cstdint>

namespace unique_attn {
namespace {

constexpr int kMinSplitTokens = 32;  // below this the merge costs more than the split gains
constexpr int kMaxSplits = 128;

}  // namespace

int decode_head_tile(int group) { return group >= 5 ? 8 : group >= 3 ? 4 : group; }

SplitPlan plan_sparse_decode(int batch, int num_query_tokens, int num_q_heads, int num_kv_heads, int head_dim, int k,
                             int page_size, int slots) {
  if (batch == 0 || num_kv_heads == 0) return {1, 0};
  const int64_t rows = int64_t{batch} * num_query_tokens * num_kv_heads;
  // Three quarters of them use all of the bandwidth, and one split needs no merge.
  if (rows * 4 >= int64_t{slots} * 3) return {1, 0};
  const int64_t wanted = (slots + rows - 1) / rows;
  const int64_t possible = std::max<int64_t>(1, int64_t{k} * page_size / kMinSplitTokens);
  int splits = static_cast<int>(std::min<int64_t>({wanted, possible, kMaxSplits}));
  // No empty splits, and no ragged ones where that costs nothing: the same pages per split, whole steps of the kernel,
  // with as few splits as they fill.
  const int step = std::max(1, kMinSplitTokens / page_size);
  const int pages_per_split = ((k + splits - 1) / splits + step - 1) / step * step;
  splits = (k + pages_per_split - 1) / pages_per_split;
  if (splits == 1) return {1, 0};
  const size_t partials = size_t(batch) * num_query_tokens * num_q_heads * splits;
  return {splits, partials * (head_dim + 1) * sizeof(float)};
}

int plan_decode_warps(int64_t blocks, int tokens_per_split, int step_tokens, int multiprocessors) {
  return blocks <= 2 * int64_t{multiprocessors} && tokens_per_split > 2 * step_tokens ? 4 : 2;
}

}  // namespace unique_attn
