// Exact selection of the k best pages of each row.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/types.h"

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
  int row_pages;         // P
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

// What a row takes of its candidates [first, end): sinks [first, first + sinks), recents [end - recents, end), and the
// rest of k from between them.
struct RowPlan {
  int first;
  int end;
  int k;  // pages this row may take
  int sinks;
  int recents;
};

UA_HD RowPlan plan_row(const TopkPagesParams& p, int b, int t) {
  const PageRange visible =
      visible_pages(p.table.seq_lens[b], p.num_query_tokens, t, t + 1, p.window, p.table.page_size, p.row_pages);
  RowPlan row;
  row.first = visible.first;
  row.end = visible.end;
  row.k = p.budget_pages != nullptr ? max_of(min_of(p.k, p.budget_pages[b]), 0) : p.k;
  row.recents = min_of(min_of(p.recent_pages, row.k), row.end - row.first);
  row.sinks = max_of(min_of(min_of(p.sink_pages, row.end - row.recents) - row.first, row.k - row.recents), 0);
  return row;
}

// What the output calls a page: itself, or its place among all physical pages, -1 where the table names no block. A row
// of the table holds as many pages as one of the scores.
UA_HD int output_page(const TopkPagesParams& p, int b, int page) {
  if (!p.physical) return page;
  const int pages_per_block = p.table.block_size / p.table.page_size;
  const int block = p.table.blocks[b * p.table.stride_seq + page / pages_per_block];
  return is_index(block, p.table.num_blocks) ? block * pages_per_block + page % pages_per_block : -1;
}

void topk_pages_cpu(const TopkPagesParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait.
cudaError_t topk_pages_cuda(const TopkPagesParams& params, cudaStream_t stream);

}  // namespace unique_attn
