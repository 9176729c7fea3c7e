// Causal attention of blocks of queries over the blocks of keys that a mask of bits lists: prefill.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/prefill/blocks.h"

namespace unique_attn {

// Queries of sequence b are the last of its tokens: query i of cu_seqlens_q[b] .. cu_seqlens_q[b + 1] stands at position
// (keys of b) - (queries of b) + i, and sees the keys up to it, of the key blocks in its query block's row of the mask:
//   out = softmax(scale * q . k_j over those j) . v_j,  lse the natural logarithm of the sum
// Query blocks are counted from each sequence's first query, key blocks from its first key. A query that sees no listed
// key has out = 0 and lse = -inf. Keys and values of blocks that no query of a block sees are not read: NaN there is no
// matter. On CUDA a key for which the table names no block is zeros, and so is its value.
struct BlockSparseParams {
  DType dtype;         // of q, k, v and out
  int batch;           // B
  int num_q_heads;     // Hq = G * H
  int num_kv_heads;    // H
  int num_mask_heads;  // Hm: Hq (a row for every query head), H (the heads of a group share one) or 1
  int head_dim;        // D
  int total_queries;   // N
  int max_queries;     // host-known upper bound of a sequence's queries
  int block_q;         // queries of a block: 64 or 128
  int block_k;         // keys of a block: 64 or 128
  int mask_words;      // of a row of the mask
  double scale;
  const int32_t* cu_seqlens_q;  // [B + 1] first query of each sequence, ascending from 0 to N
  const int32_t* cu_seqlens_k;  // [B + 1] first key of each sequence, ascending from 0 to Nk; paged: counted likewise
  const void* q;                // [N, Hq, D], unit channel stride
  int64_t q_stride_token, q_stride_head;
  KeyView k, v;
  PageTable table;       // of a paged cache
  int total_keys;        // Nk of packed keys
  const uint32_t* mask;  // [num_query_block_slots, Hm, mask_words] contiguous: bit i of word w is key block 32 w + i
  void* out;             // [N, Hq, D] contiguous
  void* lse;             // [N, Hq] contiguous fp32 (fp64 for fp64)
  int32_t* items_taken;  // CUDA: a number to count with
};

// Head of the mask that query head `head` uses.
UA_HD int mask_head(const BlockSparseParams& p, int head) { return head / (p.num_q_heads / p.num_mask_heads); }

// Key blocks [0, end) that the queries up to `position` see, as far as a row of the mask reaches.
UA_HD int visible_blocks(const BlockSparseParams& p, int position) {
  return position < 0 ? 0 : min_of(position / p.block_k + 1, p.mask_words * kMaskBits);
}

void block_sparse_attention_cpu(const BlockSparseParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait. Deterministic.
cudaError_t block_sparse_attention_cuda(const BlockSparseParams& params, cudaStream_t stream);

}  // namespace unique_attn
