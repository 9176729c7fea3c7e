// Attention of each query token over its selected pages.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/types.h"

namespace unique_attn {

// out = softmax(scale * q K_T^T) V_T over the tokens of the selected pages that the query may see (causal
// limit and window), lse = log sum exp of those logits (natural log). A query that sees no token gets
// out = 0 and lse = -inf. Keys and values that a query may not see are never multiplied in, so a NaN there
// cannot leak. Nor are pages past the table's row, and (CUDA; the CPU's op refuses) those for which it names no block.
struct SparseDecodeParams {
  DType dtype;           // of q, the caches and out
  int batch;             // B
  int num_query_tokens;  // T
  int num_q_heads;       // Hq = G * H
  int num_kv_heads;      // H
  int head_dim;          // D
  int k;                 // pages per row
  double scale;
  int window;            // tokens a query sees, 0 for all
  TokenView q;           // [B, T, Hq, D]
  PagedView k_cache;     // [num_blocks, H, block_size, D], read
  PagedView v_cache;     // [num_blocks, H, block_size, D], read
  const int32_t* pages;  // [B, T, H, k] contiguous logical pages, each at most once; negative entries are skipped
  PageTable table;
  void* out;  // [B, T, Hq, D] contiguous
  void* lse;  // [B, T, Hq] contiguous fp32, fp64 for fp64
  // Split over the keys (CUDA): see split_plan.h. Unused on the CPU.
  int num_splits;
  float* partial_out;  // [B, T, Hq, num_splits, D]
  float* partial_lse;  // [B, T, Hq, num_splits]
};

void sparse_decode_cpu(const SparseDecodeParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait.
cudaError_t sparse_decode_cuda(const SparseDecodeParams& params, cudaStream_t stream);

}  // namespace unique_attn
