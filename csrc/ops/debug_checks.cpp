// UNIQUE_ATTN_CHECK=1: read device values back and name the first bad one.
#include <cstdlib>
#include <cstring>

#include "arguments.h"

namespace unique_attn {
namespace {

Tensor on_host(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  return torch::stable::to(dense, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

}  // namespace

bool debug_checks() {
  const char* value = std::getenv("UNIQUE_ATTN_CHECK");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

void check_seq_lens(const char* op, const Tensor& seq_lens, int64_t max_tokens) {
  const Tensor host = on_host(seq_lens);
  const auto* values = static_cast<const int32_t*>(host.data_ptr());
  for (int64_t b = 0; b < host.numel(); ++b) {
    if (values[b] < 0 || values[b] > max_tokens) {
      fail(op, "seq_lens", "expected lengths from 0 to ", max_tokens, " (what the block table holds), got ", values[b],
           " at [", b, "]");
    }
  }
}

void check_block_table(const char* op, const Tensor& block_table, const Tensor& seq_lens, int64_t block_size,
                       int64_t num_blocks) {
  const int64_t width = block_table.size(1);
  check_seq_lens(op, seq_lens, width * block_size);
  const Tensor lens = on_host(seq_lens);
  const Tensor host = on_host(block_table);
  const auto* len = static_cast<const int32_t*>(lens.data_ptr());
  const auto* blocks = static_cast<const int32_t*>(host.data_ptr());
  for (int64_t b = 0; b < lens.numel(); ++b) {
    for (int64_t i = 0; i * block_size < len[b]; ++i) {
      const int32_t block = blocks[b * width + i];
      if (block < 0 || block >= num_blocks) {
        fail(op, "block_table", "expected blocks from 0 to ", num_blocks - 1, ", got ", block, " at [", b, ", ", i,
             "]");
      }
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

void check_pages(const char* op, const Tensor& pages, int64_t num_pages) {
  const Tensor host = on_host(pages);
  const auto* values = static_cast<const int32_t*>(host.data_ptr());
  for (int64_t n = 0; n < host.numel(); ++n) {
    if (values[n] >= num_pages) {
      fail(op, "pages", "expected pages below ", num_pages, ", got ", values[n], " at flat position ", n);
    }
  }
}

void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t total_tokens, int64_t max_seqlen) {
  const Tensor host = on_host(cu_seqlens);
  const auto* values = static_cast<const int32_t*>(host.data_ptr());
  const int64_t last = host.numel() - 1;
  if (values[0] != 0) fail(op, "cu_seqlens", "expected 0 at [0], got ", values[0]);
  for (int64_t b = 0; b < last; ++b) {
    if (values[b + 1] < values[b] || values[b + 1] - values[b] > max_seqlen) {
      fail(op, "cu_seqlens", "expected ascending numbers at most max_seqlen = ", max_seqlen, " apart, got ", values[b],
           " and ", values[b + 1], " at [", b, "]");
    }
  }
  if (values[last] != total_tokens) {
    fail(op, "cu_seqlens", "expected the number of tokens ", total_tokens, " at the end, got ", values[last]);
  }
}

void check_start_lens(const char* op, const Tensor& start_lens, const Tensor& seq_lens, int64_t max_new_tokens) {
  const Tensor starts = on_host(start_lens);
  const Tensor lens = on_host(seq_lens);
  const auto* start = static_cast<const int32_t*>(starts.data_ptr());
  const auto* len = static_cast<const int32_t*>(lens.data_ptr());
  for (int64_t b = 0; b < lens.numel(); ++b) {
    if (start[b] < 0 || start[b] > len[b] || len[b] - start[b] > max_new_tokens) {
      fail(op, "start_lens", "expected at least 0, at most seq_lens, and at most max_new_tokens = ", max_new_tokens,
           " below it, got ", start[b], " for a length of ", len[b], " at [", b, "]");
    }
  }
}

}  // namespace unique_attn
