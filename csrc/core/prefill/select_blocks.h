// Turn shares of attention into a mask of blocks: every row keeps the fewest key blocks, largest share first, that do.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/half.h"
#include "core/prefill/blocks.h"

namespace unique_attn {

// Forced blocks (the first one and those that hold the positions of the row's queries) come first, then NaN, then blocks
// by their share, lower blocks first among equals. A row keeps the shortest prefix of that order which
//   has all forced blocks, at least min_blocks blocks, all shares of at least `threshold`, and top_p of the row's sum
// or has max_blocks blocks and all forced ones. Sums are of integers, so they are the same on every device.
struct SelectBlocksParams {
  DType dtype;                  // of the shares: fp32 or fp64, which is used as fp32
  int batch;                    // B
  int num_heads;                // Hm
  int block_q;                  // queries of a block
  int block_k;                  // keys of a block
  int key_blocks;               // of a row of shares
  int mask_words;               // of a row of the mask
  float threshold;              // above 1 for none
  double top_p;                 // 0 for none
  int min_blocks;               // 0 for none
  int max_blocks;               // INT32_MAX for none
  const int32_t* cu_seqlens_q;  // [B + 1]
  const int32_t* cu_seqlens_k;  // [B + 1]
  int first_slot, end_slot;     // query block slots of this call
  const void* shares;           // [end_slot - first_slot, Hm, key_blocks] contiguous
  uint32_t* mask;               // [end_slot - first_slot, Hm, mask_words] contiguous: bit i of word w is block 32 w + i
  float* kept;                  // [end_slot - first_slot, Hm] contiguous: share of the row's sum that is kept
};

constexpr uint32_t kForcedKey = 0xffffffffu;
constexpr uint32_t kNanKey = 0xfffffffeu;

// Blocks of a row: [0, visible) are seen, of which block 0 and [diagonal, visible) are forced.
struct SelectRow {
  int visible;
  int diagonal;
  UA_HD bool forces(int block) const { return block == 0 || block >= diagonal; }
  UA_HD int num_forced() const { return visible == 0 ? 0 : visible - diagonal + (diagonal > 0 ? 1 : 0); }
};

UA_HD SelectRow select_row(const SelectBlocksParams& p, int slot) {
  const QueryBlock at = query_block_at(p.cu_seqlens_q, p.cu_seqlens_k, p.batch, p.block_q, slot);
  if (at.num_queries <= 0) return {0, 0};
  const int visible = min_of((at.position + at.num_queries - 1) / p.block_k + 1, p.key_blocks);
  return {visible, min_of(at.position / p.block_k, visible)};
}

// Keys order as the blocks do. What is below 0 counts as 0, what is above 1 as 1.
UA_HD uint32_t share_key(float share) {
  if (share != share) return kNanKey;
  return share > 0.f ? float_bits(share < 1.f ? share : 1.f) : 0u;
}
// The share of a key in units of 2^-32; NaN counts 0.
UA_HD uint64_t fixed_share(uint32_t key) {
  if (key >= kNanKey) return 0;
  const double units = static_cast<double>(bits_float(key)) * 4294967296.0;
  return static_cast<uint64_t>(units + 0.5);  // halves up: fewer than 2^53
}

struct CountAndSum {
  int count;
  uint64_t sum;
};

// What a prefix has to have.
struct SelectGoal {
  int count;
  uint64_t sum;
  int most;
  UA_HD bool is_met(const CountAndSum& x) const { return (x.count >= count && x.sum >= sum) || x.count >= most; }
};

UA_HD SelectGoal select_goal(const SelectBlocksParams& p, const SelectRow& row, int at_threshold, uint64_t total) {
  const int forced = row.num_forced();
  const int wanted = max_of(max_of(p.min_blocks, forced), at_threshold);
  const double share = p.top_p * static_cast<double>(total);
  uint64_t sum = static_cast<uint64_t>(share);
  if (static_cast<double>(sum) < share) ++sum;  // no ceil(): it is another function on each side
  return {min_of(wanted, row.visible), sum < total ? sum : total, max_of(p.max_blocks, forced)};
}

// A row keeps the keys above `key` and the first `ties` blocks with that key.
struct SelectCut {
  uint32_t key;
  int ties;
};

// reach(key): number and sum of the blocks of at least that key, forced ones with their own shares.
template <typename Reach>
UA_HD SelectCut select_cut(const SelectGoal& goal, const Reach& reach) {
  uint32_t low = 0, high = kForcedKey;  // the largest key that reaches the goal is in [low, high]
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    if (goal.is_met(reach(middle))) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (low == kForcedKey) return {low, INT32_MAX};
  const CountAndSum above = reach(low + 1);
  const uint64_t each = fixed_share(low);
  int ties = max_of(goal.count - above.count, 0);
  if (above.sum < goal.sum && each > 0) {
    const uint64_t missing = (goal.sum - above.sum + each - 1) / each;
    ties = missing > static_cast<uint64_t>(ties) ? static_cast<int>(missing < INT32_MAX ? missing : INT32_MAX) : ties;
  } else if (above.sum < goal.sum) {
    ties = INT32_MAX;
  }
  return {low, min_of(ties, goal.most - above.count)};
}

void select_blocks_cpu(const SelectBlocksParams& params, const CpuExecutor& exec);

// Launches on `stream` and does not wait. The same results as on the CPU.
cudaError_t select_blocks_cuda(const SelectBlocksParams& params, cudaStream_t stream);

}  // namespace unique_attn
