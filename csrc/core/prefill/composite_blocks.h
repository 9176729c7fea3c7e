// Estimate, from pooled queries and pooled keys, which share of attention every block of keys gets from every block of
// queries.
#pragma once

#include <cstddef>

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/prefill/blocks.h"

namespace unique_attn {

// How the shares that the pooled queries of a block give a key block become one.
enum class Aggregate : int { kMean, kMax };

// Queries are pooled pool_q at a time into their mean, keys pool_k at a time into a page's mean and variance, both from
// the sequence's first one. Pooled query r sees page j if its last query sees the page's first key:
//   logit = scale * (qbar . mean + spread_weight * sqrt(sum_d qbar_d^2 var_d))       (kMean: without the second term)
// and a softmax over the seen pages gives every key block its share. NaN wins in both aggregates.
struct CompositeBlocksParams {
  DType dtype;           // of q and k
  ScoreForm form;        // kMean or kVectorSpread
  double spread_weight;  // of kVectorSpread
  bool pools_heads;      // the heads of a group are pooled into one: Hm = H, else Hm = Hq
  Aggregate aggregate;
  int batch;          // B
  int num_q_heads;    // Hq = G * H
  int num_kv_heads;   // H
  int head_dim;       // D
  int total_queries;  // N
  int total_keys;     // Nk; paged: at least the sum of the lengths
  int max_queries;    // host-known upper bound of a sequence's queries
  int block_q;        // queries of a block
  int block_k;        // keys of a block
  int pool_q;         // divides block_q
  int pool_k;         // divides block_k
  int key_blocks;     // of a row of shares; blocks of a sequence past them have none
  double scale;
  const int32_t* cu_seqlens_q;  // [B + 1]
  const int32_t* cu_seqlens_k;  // [B + 1]
  const void* q;                // [N, Hq, D], unit channel stride
  int64_t q_stride_token, q_stride_head;
  KeyView k;
  PageTable table;           // of a paged cache; on CUDA a key for which it names no block is zeros
  int first_slot, end_slot;  // query block slots of this call
  bool pools_keys;           // `pages` is to be filled; else it is as an earlier call left it
  void* pages;               // [page slots, H, vectors, D]: means, then the spread. CUDA: in the dtype; CPU: unrounded
  void* workspace;           // CUDA: composite_workspace(p, multiprocessors) bytes
  void* shares;              // [end_slot - first_slot, Hm, key_blocks] contiguous fp32 (fp64 for fp64)
};

constexpr int kPools[] = {8, 16, 32, 64};

UA_HD int composite_vectors(ScoreForm form) { return form == ScoreForm::kVectorSpread ? 2 : 1; }
UA_HD int composite_heads(const CompositeBlocksParams& p) { return p.pools_heads ? p.num_kv_heads : p.num_q_heads; }

// Pages that pooled query r of a block sees, of a sequence of `num_keys` keys.
UA_HD int composite_seen(const CompositeBlocksParams& p, const QueryBlock& at, int r, int num_keys) {
  const int last = at.position + min_of((r + 1) * p.pool_q, at.num_queries) - 1;
  return min_of(last, min_of(num_keys, p.key_blocks * p.block_k) - 1) / p.pool_k + 1;
}

// ---- How the CUDA kernels work. ----

// A row's shares are kept as weights of units of pages until its last page is known. A unit is a key block, or 8 pages of
// one.
constexpr int kUnitPages = 8;
UA_HD int composite_unit(const CompositeBlocksParams& p) { return min_of(p.block_k / p.pool_k, kUnitPages); }
// Units of a row, as many as whole tiles of pages have.
UA_HD int composite_units(const CompositeBlocksParams& p) {
  const int pages = p.key_blocks * (p.block_k / p.pool_k);
  return (pages + 63) / 64 * 64 / composite_unit(p);
}
// Pages that rows meet at a time.
UA_HD constexpr int composite_tile_pages(bool wide, int head_dim) {
  return head_dim > 128 ? 16 : wide && head_dim > 64 ? 32 : 64;
}
UA_HD int composite_tile_pages(const CompositeBlocksParams& p) {
  return composite_tile_pages(p.dtype == DType::kFloat32, p.head_dim);
}
// Rows (pooled queries) of a thread block, and thread blocks at work on each multiprocessor.
constexpr int kCompositeRows = 64;
constexpr int kCompositeResident = 2;
constexpr int kCompositeHopperRows = 192;
// Bytes for the weights and bases of all rows at work, of either kernel.
inline size_t composite_workspace(const CompositeBlocksParams& p, int multiprocessors) {
  constexpr size_t kRows = max_of(kCompositeRows * kCompositeResident, kCompositeHopperRows);
  const size_t units = static_cast<unsigned>(composite_units(p));
  const size_t tiles = units * static_cast<unsigned>(composite_unit(p)) / composite_tile_pages(p);
  return kRows * static_cast<unsigned>(multiprocessors) *
         (units * (p.dtype == DType::kFloat32 ? 4 : 2) + tiles * sizeof(float));
}

void composite_blocks_cpu(const CompositeBlocksParams& params, const CpuExecutor& exec);

// fp32, bf16 and fp16. Launches on `stream` and does not wait. Deterministic.
cudaError_t composite_blocks_cuda(const CompositeBlocksParams& params, cudaStream_t stream);

}  // namespace unique_attn
