// Blocks of queries, of keys and pages of packed sequences, as prefill counts them: each from its sequence's first token.
#pragma once

#include "core/types.h"

namespace unique_attn {

constexpr int kMaskBits = 32;  // key blocks of a word of the mask

// What belongs to the blocks of a packed batch lies in slots, numbered so that no prefix sum over the sequences is
// needed: block i of sequence b has slot cu_seqlens[b] / size + b + i, as pages have in train/packed.h. Between two
// sequences one slot may belong to no block.
UA_HD int block_slot(int cu_seqlen, int b, int size, int block) { return cu_seqlen / size + b + block; }
UA_HD int num_block_slots(int total_tokens, int batch, int size) { return total_tokens / size + batch; }

struct BlockOfSlot {
  int sequence;
  int block;  // past the sequence's last one for a slot that belongs to none
};

UA_HD BlockOfSlot block_of_slot(const int32_t* cu_seqlens, int batch, int size, int slot) {
  int low = 0, high = batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (block_slot(cu_seqlens[middle], middle, size, 0) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, slot - block_slot(cu_seqlens[low], low, size, 0)};
}

// The queries of a sequence are the last of its tokens.
struct QueryBlock {
  int sequence;
  int first_query;  // in the packed batch
  int num_queries;  // none or less for a slot that belongs to no block
  int position;     // of the first query in its sequence
};

UA_HD QueryBlock query_block_at(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int batch, int block_q,
                                int slot) {
  const BlockOfSlot at = block_of_slot(cu_seqlens_q, batch, block_q, slot);
  const int first = cu_seqlens_q[at.sequence] + at.block * block_q;
  const int left = cu_seqlens_q[at.sequence + 1] - first;
  const int num_keys = cu_seqlens_k[at.sequence + 1] - cu_seqlens_k[at.sequence];
  return {at.sequence, first, min_of(left, block_q), num_keys - left};
}

}  // namespace unique_attn
