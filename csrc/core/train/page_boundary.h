// The boundary score of every query of a training batch: what its soft mask is centred on.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/train/packed.h"

namespace unique_attn {

// Of query token n and KV head h, with s the page scores of its candidate_pages (maximum over the group, rounded to the
// score type exactly as page_scores does), sorted descending, and k' = k - sink_pages - recent_pages:
//   theta[n, h] = (s_(k') + s_(k'+1)) / 2;  -inf with at most k' candidates (every gate is 1);  else +inf if k' = 0.
// NaN scores rank below every number. Bitwise deterministic.
struct PageBoundaryParams {
  DType dtype;     // of q and of the index entries
  ScoreForm form;  // of the rule, a trainable one
  double spread_weight;
  PackedSequences seqs;
  int num_q_heads;   // Hq = G * H
  int num_kv_heads;  // H
  int head_dim;      // D
  int k;             // selected pages per query, sink and recent ones included
  int sink_pages;
  int recent_pages;
  const void* q;  // [N, Hq, D], unit channel stride
  int64_t q_stride_token;
  int64_t q_stride_head;
  IndexView index;  // [num_page_slots, H, 1, entry_bytes]
  void* theta;      // [N, H] contiguous fp32 (fp64 for fp64)
  // CUDA: scores of a bounded chunk of queries at a time, [chunk_tokens, H, boundary_row_pages] in the score type.
  void* workspace;
  int chunk_tokens;
  void* squares;  // CUDA, 16-bit inputs: [num_page_slots, H, D] bf16
};

// Pages of the longest sequence, padded so that a row of 16-bit scores is a multiple of 32 bytes.
inline int boundary_row_pages(int64_t max_seqlen, int page_size) {
  return static_cast<int>(((max_seqlen + page_size - 1) / page_size + 15) / 16 * 16);
}

// Queries of a chunk on CUDA whose scores, `row_bytes` bytes a query, fit in a bounded workspace.
inline int boundary_chunk_tokens(int64_t row_bytes, int64_t total_tokens) {
  constexpr int64_t kWorkspaceBytes = int64_t{256} << 20;
  const int64_t most = total_tokens > 64 ? total_tokens : 64;
  const int64_t fitting = kWorkspaceBytes / row_bytes;
  return static_cast<int>(fitting < 64 ? 64 : fitting < most ? fitting : most);
}

// Warps that hold a row of scores in registers, `warp_scores` each: 1, 4 or 8, or 0 where the row is too long for them
// or its scores have not 16 bits.
inline int plan_boundary_warps(int row_pages, int warp_scores, bool is_16_bit) {
  if (!is_16_bit || row_pages > 8 * warp_scores) return 0;
  return row_pages <= warp_scores ? 1 : row_pages <= 4 * warp_scores ? 4 : 8;
}

void page_boundary_cpu(const PageBoundaryParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait.
cudaError_t page_boundary_cuda(const PageBoundaryParams& params, cudaStream_t stream);

}  // namespace unique_attn
