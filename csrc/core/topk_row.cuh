// What one row of topk_pages may and must take; shared by its kernels.
#pragma once

#include "device_utils.cuh"
#include "topk_pages.h"

namespace unique_attn {

struct RowPlan {
  int first;  // candidates are [first, end)
  int end;
  int k;        // pages this row may take
  int sinks;    // forced at the front: [first, first + sinks)
  int recents;  // forced at the back: [end - recents, end)
};

__device__ __forceinline__ RowPlan plan_row(const TopkPagesParams& p, int b, int t) {
  const int position = query_position(p.table.seq_lens[b], p.num_query_tokens, t);
  const PageRange range = visible_pages(position, p.window, p.table.page_size);
  RowPlan row;
  row.first = range.first;
  row.end = min(range.end, p.num_pages);
  row.k = p.budget_pages != nullptr ? max(0, min(p.k, p.budget_pages[b])) : p.k;
  row.recents = min(min(p.recent_pages, row.k), max(row.end - row.first, 0));
  row.sinks = max(0, min(min(p.sink_pages, row.end - row.recents) - row.first, row.k - row.recents));
  return row;
}

// One row of the output.
struct RowOutput {
  const TopkPagesParams& p;
  int b;
  int32_t* out;

  __device__ __forceinline__ void emit(int at, int page) const {
    if (p.physical) {
      const int pages_per_block = p.table.block_size / p.table.page_size;
      page = p.table.blocks[b * p.table.stride_seq + page / pages_per_block] * pages_per_block + page % pages_per_block;
    }
    out[at] = page;
  }

  // All that needs no scores, by `threads` threads; false if nothing is left to select. Short loops, which are not to
  // be unrolled: fetching the code takes longer than running it.
  __device__ __forceinline__ bool emit_forced(const RowPlan& row, int thread, int threads) const {
    const int candidates = max(row.end - row.first, 0);
    const int taken = min(candidates, row.k);
#pragma unroll 1
    for (int i = taken + thread; i < p.k; i += threads) out[i] = -1;
    if (candidates <= row.k) {
#pragma unroll 1
      for (int i = thread; i < candidates; i += threads) emit(i, row.first + i);
      return false;
    }
#pragma unroll 1
    for (int i = thread; i < row.sinks; i += threads) emit(i, row.first + i);
#pragma unroll 1
    for (int i = thread; i < row.recents; i += threads) emit(taken - row.recents + i, row.end - row.recents + i);
    return row.k > row.sinks + row.recents;
  }
};

// Any k, by radix select in several passes over memory.
cudaError_t topk_radix_cuda(const TopkPagesParams& params, cudaStream_t stream);
// One pass over memory, for k <= 512; cudaErrorNotSupported for others.
cudaError_t topk_stream_cuda(const TopkPagesParams& params, cudaStream_t stream);

}  // namespace unique_attn
