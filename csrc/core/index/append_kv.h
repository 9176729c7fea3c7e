// Write new keys and values into a paged cache.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/types.h"

namespace unique_attn {

struct AppendKvParams {
  DType dtype;        // of k, v and both caches
  int batch;          // B; token n = b * num_tokens + t
  int num_tokens;     // T
  int num_kv_heads;   // H
  int head_dim;       // D
  TokenView k;        // [B, T, H, D]
  TokenView v;        // [B, T, H, D]
  PagedView k_cache;  // [num_blocks, H, block_size, D], written
  PagedView v_cache;  // [num_blocks, H, block_size, D], written
  int block_size;
  int num_blocks;
  // Where token n goes. Without a table: slots[n] = block * block_size + offset. With one, token t of sequence b is the
  // one at query_position(seq_len, T, t) and goes where the table says, unless there are slots and its slot is negative.
  // A token without a place is skipped.
  const int64_t* slots;  // [B * T] or null
  PageTable table;
};

struct TokenPlace {
  int64_t block;  // negative: none
  int64_t offset;
};

UA_HD TokenPlace mapped_place(const AppendKvParams& p, int64_t n) {
  const int64_t slot = p.slots[n];
  if (slot < 0 || slot >= int64_t{p.num_blocks} * p.block_size) return {-1, 0};
  return {slot / p.block_size, slot % p.block_size};
}

// With a table: token n is not to be written.
UA_HD bool is_left_out(const AppendKvParams& p, int64_t n) { return p.slots != nullptr && p.slots[n] < 0; }

UA_HD TokenPlace table_place(const PageTable& table, int64_t b, int position) {
  if (position < 0) return {-1, 0};
  return {physical_block(table, b, position / table.block_size), position % table.block_size};
}

// fp32, fp64, bf16, fp16.
void append_kv_cpu(const AppendKvParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16, with slots: the table is append_index_cuda's. Launches on `stream` and does not wait.
cudaError_t append_kv_cuda(const AppendKvParams& params, cudaStream_t stream);

}  // namespace unique_attn
