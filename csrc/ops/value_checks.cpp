// The numbers in lengths, tables and slots: the first bad one is named before anything is computed or written.
#include "value_checks.h"

#include <cstdlib>
#include <cstring>

namespace unique_attn {
namespace {

// Blocks that hold the pages of sequence b.
void check_blocks(const char* op, const PageTable& table, int64_t b, PageRange pages) {
  if (pages.first >= pages.end) return;
  const int per_block = table.block_size / table.page_size;
  const int32_t* row = table.blocks + b * table.stride_seq;
  const int end = (pages.end - 1) / per_block + 1;
  bool good = true;
  for (int i = pages.first / per_block; i < end; ++i) good &= is_index(row[i], table.num_blocks);
  if (good) return;
  for (int i = pages.first / per_block; i < end; ++i) {
    if (!is_index(row[i], table.num_blocks)) {
      fail(op, "block_table", "expected blocks from 0 to ", table.num_blocks - 1, ", got ", row[i], " at [", b, ", ", i,
           "]");
    }
  }
}

void check_lengths(const char* op, const PageTable& table, int64_t batch, int64_t most) {
  for (int64_t b = 0; b < batch; ++b) {
    if (table.seq_lens[b] < 0 || table.seq_lens[b] > most) {
      fail(op, "seq_lens", "expected lengths from 0 to ", most, " (what the block table holds), got ",
           table.seq_lens[b], " at [", b, "]");
    }
  }
}

}  // namespace

bool debug_mode() {
  const char* value = std::getenv("UNIQUE_ATTN_CHECK");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

bool checks_values(const Arguments& args) { return !args.is_cuda() || debug_mode(); }

Tensor on_host(const Tensor& tensor) {
  if (tensor.is_cpu() && tensor.is_contiguous()) return tensor;
  const Tensor dense = torch::stable::contiguous(tensor);
  return torch::stable::to(dense, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

TableOnHost::TableOnHost(const PageTable& device_table, const std::optional<Tensor>& block_table,
                         const Tensor& seq_lens)
    : table(device_table), lens_(on_host(seq_lens)) {
  table.seq_lens = static_cast<const int32_t*>(lens_.data_ptr());
  if (block_table.has_value() && block_table->is_cuda()) {
    blocks_ = on_host(*block_table);
    table.blocks = static_cast<const int32_t*>(blocks_.data_ptr());
    table.stride_seq = block_table->size(1);
  }
}

void check_values(const char* op, const TableOnHost& host, PageIndexParams params,
                  const std::optional<Tensor>& start_lens) {
  params.table = host.table;
  check_lengths(op, host.table, params.batch, table_tokens(host.table));
  Tensor starts;
  if (start_lens.has_value()) {
    starts = on_host(*start_lens);
    params.start_lens = static_cast<const int32_t*>(starts.data_ptr());
    for (int b = 0; b < params.batch; ++b) {
      const int start = params.start_lens[b], length = host.table.seq_lens[b];
      if (start < 0 || start > length || length - start > params.max_new_tokens) {
        fail(op, "start_lens",
             "expected at least 0, at most seq_lens, and at most max_new_tokens = ", params.max_new_tokens,
             " below it, got ", start, " for a length of ", length, " at [", b, "]");
      }
    }
  }
  for (int b = 0; b < params.batch; ++b) check_blocks(op, host.table, b, touched_pages(params, b));
}

void check_values(const char* op, const TableOnHost& host, PageScoresParams params) {
  params.table = host.table;
  check_lengths(op, host.table, params.batch, table_tokens(host.table));
  for (int b = 0; b < params.batch; ++b) {
    check_blocks(op, host.table, b, scored_pages(params, b, 0, params.num_query_tokens));
  }
}

void check_values(const char* op, const TableOnHost& host, const TopkPagesParams& p) {
  check_lengths(op, host.table, p.batch, int64_t{p.row_pages} * p.table.page_size);
  if (!p.physical) return;
  for (int b = 0; b < p.batch; ++b) {
    check_blocks(op, host.table, b,
                 visible_pages(host.table.seq_lens[b], p.num_query_tokens, 0, p.num_query_tokens, p.window,
                               p.table.page_size, p.row_pages));
  }
}

void check_values(const char* op, const TableOnHost& host, const SparseDecodeParams& p, const Tensor& pages) {
  const int num_pages = table_pages(host.table);
  check_lengths(op, host.table, p.batch, table_tokens(host.table));
  for (int b = 0; b < p.batch; ++b) {
    check_blocks(op, host.table, b,
                 visible_pages(host.table.seq_lens[b], p.num_query_tokens, 0, p.num_query_tokens, p.window,
                               p.table.page_size, num_pages));
  }
  const Tensor selected = on_host(pages);
  const auto* values = static_cast<const int32_t*>(selected.data_ptr());
  for (int64_t n = 0; n < selected.numel(); ++n) {
    if (values[n] >= num_pages) {
      fail(op, "pages", "expected pages below ", num_pages, ", got ", values[n], " at flat position ", n);
    }
  }
}

void check_values(const char* op, const TableOnHost& host, const AppendKvParams& p, const Tensor& slot_mapping) {
  const Tensor slots = on_host(slot_mapping);
  const auto* values = static_cast<const int64_t*>(slots.data_ptr());
  for (int64_t n = 0; n < slots.numel(); ++n) {
    if (values[n] < 0) continue;
    const int64_t b = n / p.num_tokens;
    const int position = query_position(host.table.seq_lens[b], p.num_tokens, static_cast<int>(n % p.num_tokens));
    const TokenPlace place = table_place(host.table, b, position);
    const int64_t expected = place.block < 0 ? -1 : place.block * p.block_size + place.offset;
    if (values[n] != expected) {
      fail(op, "slot_mapping", "expected ", expected, ", where block_table has the token, or a negative number, got ",
           values[n], " at [", n, "]");
    }
  }
}

void check_slots(const char* op, const Tensor& slots, int64_t num_slots) {
  const Tensor host = on_host(slots);
  const auto* values = static_cast<const int64_t*>(host.data_ptr());
  for (int64_t n = 0; n < host.numel(); ++n) {
    if (values[n] >= num_slots) {
      fail(op, "slot_mapping", "expected slots below ", num_slots, ", got ", values[n], " at [", n, "]");
    }
  }
}

void check_cu_seqlens(const char* op, const char* name, const Tensor& cu_seqlens, int64_t total_tokens,
                      const char* max_name, int64_t max_seqlen) {
  const Tensor host = on_host(cu_seqlens);
  const auto* values = static_cast<const int32_t*>(host.data_ptr());
  const int64_t last = host.numel() - 1;
  if (values[0] != 0) fail(op, name, "expected 0 at [0], got ", values[0]);
  for (int64_t b = 0; b < last; ++b) {
    if (values[b + 1] < values[b] || values[b + 1] - values[b] > max_seqlen) {
      fail(op, name, "expected ascending numbers at most ", max_name, " = ", max_seqlen, " apart, got ", values[b],
           " and ", values[b + 1], " at [", b, "]");
    }
  }
  if (total_tokens >= 0 && values[last] != total_tokens) {
    fail(op, name, "expected the number of tokens ", total_tokens, " at the end, got ", values[last]);
  }
}

void check_key_blocks(const char* op, const PageTable& device_table, const Tensor& block_table,
                      const Tensor& cu_seqlens_k) {
  const TableOnHost host(device_table, block_table, cu_seqlens_k);
  const int32_t* bounds = host.table.seq_lens;
  for (int64_t b = 0; b + 1 < cu_seqlens_k.size(0); ++b) {
    check_blocks(op, host.table, b, visible_pages(bounds[b + 1] - bounds[b] - 1, 0, host.table.page_size));
  }
}

void check_queries_have_keys(const char* op, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  const Tensor host_q = on_host(cu_seqlens_q), host_k = on_host(cu_seqlens_k);
  const auto* q = static_cast<const int32_t*>(host_q.data_ptr());
  const auto* k = static_cast<const int32_t*>(host_k.data_ptr());
  for (int64_t b = 0; b + 1 < host_q.numel(); ++b) {
    if (q[b + 1] - q[b] > k[b + 1] - k[b]) {
      fail(op, "cu_seqlens_q", "expected at most as many queries as the sequence has keys, ", k[b + 1] - k[b], ", got ",
           q[b + 1] - q[b], " at [", b, "]");
    }
  }
}

void check_tau(const char* op, const Tensor& tau) {
  const Tensor host = on_host(tau);
  const float value = *static_cast<const float*>(host.data_ptr());
  if (!(value > 0.f)) fail(op, "tau", "expected a positive number, got ", value);
}

void check_selection(const char* op, const Tensor& pages, int64_t page_end) {
  const Tensor host = on_host(pages);
  const auto* values = static_cast<const int32_t*>(host.data_ptr());
  const int64_t width = pages.size(2);
  const int least_step = debug_mode() ? 1 : 0;
  for (int64_t i = 0; i < host.numel(); ++i) {
    const bool first = i % width == 0;
    const bool padding = values[i] == -1;
    const bool ascends = first || (values[i - 1] >= 0 && values[i - 1] + least_step <= values[i]);
    if (!padding && !(values[i] >= 0 && values[i] < page_end && ascends)) {
      fail(op, "pages", "expected ascending pages below ", page_end, ", then -1, got ", values[i],
           first ? "" : " after " + std::to_string(values[i - 1]), " at flat position ", i);
    }
  }
}

}  // namespace unique_attn
