// How much parallel work a launch gets: a pure host function of shapes, so that a CUDA graph captured once stays
// valid while sequences grow.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unique_attn {

struct SplitPlan {
  int num_splits;          // parts the selected pages of a row are cut into
  size_t workspace_bytes;  // partial outputs and log-sum-exps, 0 for one split
};

// sparse_decode: splits over the selected pages until about `slots` thread blocks have work.
SplitPlan plan_sparse_decode(int batch, int num_query_tokens, int num_q_heads, int num_kv_heads, int head_dim, int k,
                             int page_size, int slots);

// sparse_decode on tensor cores: warps of a thread block, 2 or 4. Four pay where the device has room for them and each
// has more than one step of the loop, `step_tokens`.
int plan_decode_warps(int64_t blocks, int tokens_per_split, int step_tokens, int multiprocessors);

// Heads of a group that one thread block of sparse_decode serves.
int decode_head_tile(int group);

}  // namespace unique_attn
