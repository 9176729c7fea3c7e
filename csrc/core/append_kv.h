// Write new keys and values into a paged cache.
#pragma once

#include "cpu_exec.h"
#include "cuda_fwd.h"
#include "types.h"

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
  // Where token n goes: slots[n] = block * block_size + offset, negative skips the token. When null,
  // token t of sequence b is the one at query_position(seq_len, T, t) and goes where `table` says.
  const int64_t* slots;  // [B * T] or null
  PageTable table;       // read only when slots is null
};

// fp32, fp64, bf16, fp16.
void append_kv_cpu(const AppendKvParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait.
cudaError_t append_kv_cuda(const AppendKvParams& params, cudaStream_t stream);

}  // namespace unique_attn
