// Score every visible page of every query token.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/types.h"

namespace unique_attn {

// scores[b, t, h, p] = max over the G query heads of the group of rule(q, entry of page p), accumulated
// in fp32 (fp64 for fp64) and stored in the score type: bf16 for bf16 and fp16 inputs, fp32, fp64.
// NaN if any head's score is NaN, and (CUDA; the CPU's op refuses) where the table names no block.
struct PageScoresParams {
  DType dtype;  // of q and of the index entries
  Rule rule;
  double spread_weight;  // of the rule's spread
  int batch;             // B
  int num_query_tokens;  // T
  int num_q_heads;       // Hq = G * H
  int num_kv_heads;      // H
  int head_dim;          // D
  TokenView q;           // [B, T, Hq, D]
  IndexView index;       // [num_blocks, H, pages_per_block, entry_bytes]
  PageTable table;
  int window;         // tokens a query sees, 0 for all
  int row_pages;      // P, the length of a row of scores; what a row of the table can hold
  bool fill_outside;  // write -inf to the pages a query does not see; else leave them unwritten
  void* scores;       // [B, T, H, P] contiguous
};

// Pages that the query tokens t .. t_end - 1 of a sequence see.
UA_HD PageRange scored_pages(const PageScoresParams& p, int b, int t, int t_end) {
  return visible_pages(p.table.seq_lens[b], p.num_query_tokens, t, t_end, p.window, p.table.page_size, p.row_pages);
}

void page_scores_cpu(const PageScoresParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait.
cudaError_t page_scores_cuda(const PageScoresParams& params, cudaStream_t stream);

}  // namespace unique_attn
