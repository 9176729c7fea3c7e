// Checks of values that live on the tensors' device. On the CPU they are always made: they cost a few integers. On CUDA
// the values would have to be read back, so they are made with UNIQUE_ATTN_CHECK=1 alone (slow; not in a CUDA graph).
// Padding is legal: -1 in slots and pages, anything in the table past a sequence's end or before its window.
#pragma once

#include "ops.h"

namespace unique_attn {

bool debug_mode();
bool checks_values(const Arguments& args);

// The tensor itself if it is contiguous and on the CPU, else a copy that is.
Tensor on_host(const Tensor& tensor);

// A table with pointers that the host can follow.
class TableOnHost {
 public:
  TableOnHost(const PageTable& device_table, const std::optional<Tensor>& block_table, const Tensor& seq_lens);
  PageTable table;

 private:
  Tensor blocks_, lens_;
};

// Lengths, the blocks that the op looks up, and what else it goes by.
void check_values(const char* op, const TableOnHost& host, PageIndexParams params,
                  const std::optional<Tensor>& start_lens);
void check_values(const char* op, const TableOnHost& host, PageScoresParams params);
// Slots of a step that appends through its table.
void check_values(const char* op, const TableOnHost& host, const AppendKvParams& params, const Tensor& slot_mapping);
void check_values(const char* op, const TableOnHost& host, const TopkPagesParams& params);
void check_values(const char* op, const TableOnHost& host, const SparseDecodeParams& params, const Tensor& pages);
void check_slots(const char* op, const Tensor& slots, int64_t num_slots);

// ---- Packed sequences. ----

// `name` and `max_name`: what the op calls the argument, and the most tokens of a sequence. `total_tokens` -1: any
// number of them.
void check_cu_seqlens(const char* op, const char* name, const Tensor& cu_seqlens, int64_t total_tokens,
                      const char* max_name, int64_t max_seqlen);
// The blocks that hold the keys of each sequence. Bounds are good by themselves, and no length is above the table's row.
void check_key_blocks(const char* op, const PageTable& device_table, const Tensor& block_table,
                      const Tensor& cu_seqlens_k);
// No sequence has more queries than keys. Both are good by themselves.
void check_queries_have_keys(const char* op, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k);

// ---- Training. ----

// The temperature is a positive number.
void check_tau(const char* op, const Tensor& tau);
// Every row of `pages` has ascending pages of its sequence, then -1. A repeated one changes nothing; debug mode names
// it.
void check_selection(const char* op, const Tensor& pages, int64_t page_end);

}  // namespace unique_attn
