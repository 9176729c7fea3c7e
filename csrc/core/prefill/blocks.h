// Blocks of queries, of keys and pages of packed sequences, as prefill counts them: each from its sequence's first token.
// And where the keys are: packed as well, or in the blocks of a paged cache, which are other blocks.
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

// ---- Keys and values: the only place that knows both layouts. ----

// [Nk, H, D] of a packed batch, or with a table of blocks a paged cache [num_blocks, H, block_size, D]. The channel
// stride is 1; in elements.
struct KeyView {
  const void* data;
  int64_t stride_block;  // of a cache
  int64_t stride_head;
  int64_t stride_token;
};

constexpr int kBlockAlign = 16;  // a cache's block has a multiple of so many tokens

// A batch's table, of which `seq_lens` is not used and a page is a block. Packed keys have one whose block size is 0.
UA_HD bool is_paged(const PageTable& table) { return table.block_size > 0; }

// The keys, or the values, of one sequence and KV head.
template <typename T, bool kPaged>
class HeadKeys {
 public:
  // `start`: the sequence's first key in the packed batch.
  UA_HD HeadKeys(const KeyView& view, const PageTable& table, int start, int sequence, int head)
      : view_(view),
        table_(table),
        sequence_(sequence),
        rows_(static_cast<const T*>(view.data) + head * view.stride_head + (kPaged ? 0 : start * view.stride_token)) {}

  // Key `key` of the sequence; null if the table names no block for it.
  UA_HD const T* row(int key) const {
    if constexpr (kPaged) {
      const int block = physical_block(table_, sequence_, key / table_.block_size);
      if (block < 0) return nullptr;
      return rows_ + block * view_.stride_block + key % table_.block_size * view_.stride_token;
    } else {
      return rows_ + key * view_.stride_token;
    }
  }
  // Keys from `key` on that lie a token's stride apart.
  UA_HD int run(int key) const { return kPaged ? table_.block_size - key % table_.block_size : INT32_MAX; }
  UA_HD int64_t stride() const { return view_.stride_token; }

 private:
  const KeyView& view_;
  const PageTable& table_;
  const int sequence_;
  const T* const rows_;  // of the first key; paged: of the first token of block 0
};

}  // namespace unique_attn
