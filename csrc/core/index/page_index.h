// Compute the index entries of the pages that an append touched.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/types.h"

namespace unique_attn {

// Touched pages of a sequence: from the page of token start_lens[b] to the page of its last token. Every one of them
// is computed anew from its keys (two-pass, accumulated in fp32, fp64 for fp64), using the tokens it has; nothing else
// is read or written.
struct PageIndexParams {
  DType dtype;  // of the keys and of the entries
  Rule rule;
  int batch;                  // B
  int num_kv_heads;           // H
  int head_dim;               // D
  PagedView k_cache;          // [num_blocks, H, block_size, D], read
  IndexView index;            // [num_blocks, H, pages_per_block, entry_bytes], written
  PageTable table;            // seq_lens are the lengths after the append
  const int32_t* start_lens;  // [B] lengths before the append; null: seq_len - max_new_tokens, at least 0
  int max_new_tokens;         // host-known upper bound of seq_len - start_len
  // Of an append that leaves tokens out, [B * max_new_tokens], without start_lens; else null. A page all of whose new
  // tokens have a negative slot is not touched.
  const int64_t* slots;
};

// As far as the table's row reaches; a start before the sequence's is the sequence's.
UA_HD PageRange touched_pages(const PageIndexParams& p, int b) {
  const int seq_len = max_of(p.table.seq_lens[b], 0);
  const int start = max_of(p.start_lens != nullptr ? p.start_lens[b] : seq_len - p.max_new_tokens, 0);
  if (start >= seq_len) return {0, 0};
  const int end = min_of((seq_len - 1) / p.table.page_size + 1, table_pages(p.table));
  return {min_of(start / p.table.page_size, end), end};
}

// Whether a page of touched_pages has a new token that was written.
UA_HD bool has_written_token(const PageIndexParams& p, int b, int page) {
  if (p.slots == nullptr) return true;
  bool any = false;
  for (int t = 0; t < p.max_new_tokens; ++t) {
    const int position = p.table.seq_lens[b] - p.max_new_tokens + t;
    any |= position >= 0 && position / p.table.page_size == page && p.slots[int64_t{b} * p.max_new_tokens + t] >= 0;
  }
  return any;
}

// Touched pages of any sequence, at most.
inline int max_touched_pages(const PageIndexParams& p) {
  if (p.max_new_tokens == 0) return 0;
  const int64_t pages = (int64_t{p.max_new_tokens} + p.table.page_size - 2) / p.table.page_size + 1;
  return pages < table_pages(p.table) ? static_cast<int>(pages) : table_pages(p.table);
}

void page_index_cpu(const PageIndexParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait.
cudaError_t page_index_cuda(const PageIndexParams& params, cudaStream_t stream);

}  // namespace unique_attn
