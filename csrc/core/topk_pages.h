// Exact selection of the k best pages of each row.
#pragma once

#include "cpu_exec.h"
#include "cuda_fwd.h"
#include "types.h"

namespace unique_attn {

// The row of (b, t, h) has visible_pages(...) as candidates; k_b = min(k, budget_pages[b]).
//   1. Recent pages (the query's own page and the recent_pages - 1 before it) are taken first, newest
//      first; then the sink pages 0 .. sink_pages-1 that are visible, lowest first; as far as k_b goes.
//   2. The rest of k_b goes to the other candidates with the largest scores. NaN ranks below every number
//      (below -inf), -0 equals +0, ties go to the lowest page index.
//   3. With at most k_b candidates all of them are selected.
// The selected pages come out in ascending order, then -1. Bitwise deterministic.
struct TopkPagesParams {
  DType dtype;           // of the scores: bf16, fp32 (fp64 on the CPU)
  int batch;             // B
  int num_query_tokens;  // T
  int num_kv_heads;      // H
  int num_pages;         // P
  int k;                 // width of the output
  int sink_pages;
  int recent_pages;
  int window;                   // tokens a query sees, 0 for all
  const void* scores;           // [B, T, H, P] contiguous
  PageTable table;              // seq_lens and page_size always; blocks only for physical output
  const int32_t* budget_pages;  // [B] or null
  bool physical;                // emit block * pages_per_block + page-in-block instead of the logical page
  int32_t* pages;               // [B, T, H, k] contiguous
};

void topk_pages_cpu(const TopkPagesParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait.
cudaError_t topk_pages_cuda(const TopkPagesParams& params, cudaStream_t stream);

}  // namespace unique_attn
