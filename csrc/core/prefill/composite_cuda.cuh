// What the CUDA kernels of composite_blocks share: how pages are stored, and how rows of sums become shares.
#pragma once

#include "core/cuda/math.cuh"
#include "core/cuda/vec.cuh"
#include "core/prefill/composite_blocks.h"

namespace unique_attn {

// Variances and squared queries of 16-bit inputs are bf16, whose range holds the squares of fp16.
template <typename T>
using VarianceType = std::conditional_t<sizeof(T) == 4, float, __nv_bfloat16>;

// Fills params.pages.
cudaError_t composite_pages_cuda(const CompositeBlocksParams& params, cudaStream_t stream);

// Blocks of queries of one sequence and one head of the result that a thread block works on.
struct CompositeTile {
  int sequence;
  int head;         // of the result
  int first_block;  // of the sequence
  int num_blocks;   // none or less: nothing to do
};

// Tiles of a call: `tile_blocks` blocks each, of every sequence and head, the late blocks of a sequence first.
__device__ __forceinline__ CompositeTile composite_tile(const CompositeBlocksParams& p, int64_t item, int tiles,
                                                        int tile_blocks) {
  const int heads = composite_heads(p);
  CompositeTile tile;
  tile.head = static_cast<int>(item % heads);
  const int from_end = static_cast<int>(item / heads % tiles);
  tile.sequence = static_cast<int>(item / heads / tiles);
  const int start = p.cu_seqlens_q[tile.sequence];
  const int slot = block_slot(start, tile.sequence, p.block_q, 0);
  const int end = min((p.cu_seqlens_q[tile.sequence + 1] - start + p.block_q - 1) / p.block_q, p.end_slot - slot);
  const int first = max(p.first_slot - slot, 0);
  const int place = (end - first + tile_blocks - 1) / tile_blocks - 1 - from_end;
  tile.first_block = first + place * tile_blocks;
  tile.num_blocks = place < 0 ? 0 : min(tile_blocks, end - tile.first_block);
  return tile;
}

// Most tiles of a sequence in a call.
inline int64_t composite_tiles(const CompositeBlocksParams& p, int tile_blocks) {
  const int64_t of_sequence = (int64_t{p.max_queries} + p.block_q - 1) / p.block_q;
  const int64_t of_call = p.end_slot - p.first_slot;
  return ((of_sequence < of_call ? of_sequence : of_call) + tile_blocks - 1) / tile_blocks;
}

// What a tile sees: pages of its sequence up to the last key that a row's queries see.
struct CompositeView {
  int first_query;  // of the tile in its sequence
  int num_queries, num_keys;
  int key_end;  // keys of which there are shares

  __device__ __forceinline__ CompositeView(const CompositeBlocksParams& p, const CompositeTile& tile)
      : first_query(tile.first_block * p.block_q),
        num_queries(p.cu_seqlens_q[tile.sequence + 1] - p.cu_seqlens_q[tile.sequence]),
        num_keys(p.cu_seqlens_k[tile.sequence + 1] - p.cu_seqlens_k[tile.sequence]),
        key_end(min(num_keys, p.key_blocks * p.block_k)) {}
  // Pages of row `row`; a row without queries sees what the sequence's last query does.
  __device__ __forceinline__ int pages(const CompositeBlocksParams& p, int row) const {
    const int query = min(first_query + (row + 1) * p.pool_q, num_queries) - 1;
    return min(num_keys - num_queries + query, key_end - 1) / p.pool_k + 1;
  }
};

// Shares of a tile's query blocks from the sums of its rows: sums[row][unit] is the base 2 logarithm of a unit's sum of
// weights, lse[row] that of all of a row's. kThreads threads come here; `rows` are those of a query block.
template <int kThreads>
__device__ __forceinline__ void write_shares(const CompositeBlocksParams& p, const CompositeTile& tile, int rows,
                                             const float* sums, int64_t sums_stride, const float* lse, int thread) {
  const int heads = composite_heads(p);
  const int num_keys = p.cu_seqlens_k[tile.sequence + 1] - p.cu_seqlens_k[tile.sequence];
  const int unit = composite_unit(p);
  const int block_units = p.block_k / p.pool_k / unit;
  const int start = p.cu_seqlens_q[tile.sequence];
  for (int i = 0; i < tile.num_blocks; ++i) {
    const int slot = block_slot(start, tile.sequence, p.block_q, tile.first_block + i);
    const QueryBlock at = query_block_at(p.cu_seqlens_q, p.cu_seqlens_k, p.batch, p.block_q, slot);
    const int count = (at.num_queries + p.pool_q - 1) / p.pool_q;
    float* shares = static_cast<float*>(p.shares) + (int64_t{slot - p.first_slot} * heads + tile.head) * p.key_blocks;
    for (int block = thread; block < p.key_blocks; block += kThreads) {
      float share = 0.f;
      for (int r = 0; r < count; ++r) {
        const int seen = composite_seen(p, at, r, num_keys);
        const float* row = sums + (i * rows + r) * sums_stride;
        float mass = 0.f;
        for (int u = block * block_units; u < (block + 1) * block_units; ++u) {
          if (u * unit < seen) mass += exp2_fast(row[u] - lse[i * rows + r]);
        }
        if (p.aggregate == Aggregate::kMean) {
          share += mass / static_cast<float>(count);
        } else if (!(share >= mass) && share == share) {
          share = mass;  // NaN wins
        }
      }
      shares[block] = share;
    }
  }
}

// The softmax of a thread's row of logits so far, in base 2.
struct RowSoftmax {
  float m = -INFINITY;
  float l = 0.f;  // of this lane's columns

  // Weighs a tile of 8 NT pages from `first` on, in accumulator layout: logits(n, c) is column n * 8 + lane % 4 * 2 + c,
  // already -INFINITY where the row does not see the page. The sums of units go to `row` by the lanes that have them.
  template <int NT, typename Logits>
  __device__ __forceinline__ void add_tile(const Logits& logits, int unit, float* row) {
    float top = m;
#pragma unroll
    for (int n = 0; n < NT; ++n) top = fmaxf(top, fmaxf(logits(n, 0), logits(n, 1)));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
    const float base = top == -INFINITY ? 0.f : top;
    l *= exp2_fast(m - base);
    m = top;
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float x = exp2_fast(logits(n, 0) - base), y = exp2_fast(logits(n, 1) - base);
      float sum = x + y;
      l += sum;
      if (unit == 1) {
        *reinterpret_cast<float2*>(row + n * 8 + lane * 2) = make_float2(log2_fast(x) + base, log2_fast(y) + base);
        continue;
      }
      if (unit >= 4) sum += __shfl_xor_sync(kFullMask, sum, 1);
      if (unit >= 8) sum += __shfl_xor_sync(kFullMask, sum, 2);
      if (lane * 2 % unit == 0) row[n * (8 / unit) + lane * 2 / unit] = log2_fast(sum) + base;
    }
  }

  // The logarithm of the whole sum.
  __device__ __forceinline__ float finish() {
    l += __shfl_xor_sync(kFullMask, l, 1);
    l += __shfl_xor_sync(kFullMask, l, 2);
    return m + log2_fast(l);
  }
};

// Zeros in the rows of slots that belong to no block; all threads of a grid come here.
__device__ __forceinline__ void clear_spare_slots(const CompositeBlocksParams& p) {
  const int64_t row = int64_t{composite_heads(p)} * p.key_blocks;
  for (int b = blockIdx.x; b < p.batch; b += gridDim.x) {
    const int start = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
    const int first = block_slot(start, b, p.block_q, (end - start + p.block_q - 1) / p.block_q);
    const int next = b + 1 < p.batch ? block_slot(end, b + 1, p.block_q, 0) : p.end_slot;
    for (int slot = max(first, p.first_slot); slot < min(next, p.end_slot); ++slot) {
      float* shares = static_cast<float*>(p.shares) + (slot - p.first_slot) * row;
      for (int64_t i = threadIdx.x; i < row; i += blockDim.x) shares[i] = 0.f;
    }
  }
}

}  // namespace unique_attn
