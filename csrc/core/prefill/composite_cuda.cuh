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

// Weights of the units of all rows at work, relative to a base of each row and tile of pages, the largest logit of the
// row up to there. 16-bit inputs have 16-bit weights: their last place is below the rounding of the pooled inputs.
template <typename T>
using WeightType = std::conditional_t<sizeof(T) == 4, float, __half>;

template <typename T>
struct UnitWeights {
  WeightType<T>* weights;  // [rows][units]
  float* bases;            // [rows][tiles]
  int64_t units, tiles;

  // Of the rows from `row` on.
  __device__ __forceinline__ UnitWeights(const CompositeBlocksParams& p, int rows_at_work, int64_t row)
      : units(composite_units(p)), tiles(composite_units(p) * composite_unit(p) / composite_tile_pages(p)) {
    bases = static_cast<float*>(p.workspace);
    weights = reinterpret_cast<WeightType<T>*>(bases + rows_at_work * tiles) + row * units;
    bases += row * tiles;
  }
};

// Two neighbours of 8 sums over the columns of a tile each: lane i of 4 gets those of the columns 8 (2 i) and
// 8 (2 i + 1) on. Half of what is left is sent at a time.
__device__ __forceinline__ float2 sum_columns(const float (&x)[8]) {
  const bool upper = (threadIdx.x & 2) != 0, odd = (threadIdx.x & 1) != 0;
  float keep[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keep[i] = upper ? x[4 + i] : x[i];
    keep[i] += __shfl_xor_sync(kFullMask, upper ? x[i] : x[4 + i], 2);
  }
  float2 sum = odd ? make_float2(keep[2], keep[3]) : make_float2(keep[0], keep[1]);
  sum.x += __shfl_xor_sync(kFullMask, odd ? keep[0] : keep[2], 1);
  sum.y += __shfl_xor_sync(kFullMask, odd ? keep[1] : keep[3], 1);
  return sum;
}

// The softmax of a thread's row of logits so far, in base 2.
template <typename T>
struct RowSoftmax {
  using W = WeightType<T>;
  float m = -INFINITY;
  float l = 0.f;  // of this lane's columns

  // Weighs a tile of 8 NT pages in accumulator layout: logits(n, c) is column n * 8 + lane % 4 * 2 + c, already -INFINITY
  // where the row does not see the page. The sums of units go to `row`, what they are relative to goes to `base`.
  template <int NT, typename Logits>
  __device__ __forceinline__ void add_tile(const Logits& logits, int unit, W* row, float* base) {
    float top = m;
#pragma unroll
    for (int n = 0; n < NT; ++n) top = fmaxf(top, fmaxf(logits(n, 0), logits(n, 1)));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
    const float offset = top == -INFINITY ? 0.f : top;
    l *= exp2_fast(m - offset);
    m = top;
    const int lane = threadIdx.x % 4;
    if (lane == 0) *base = offset;
    float x[NT], y[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      x[n] = exp2_fast(logits(n, 0) - offset), y[n] = exp2_fast(logits(n, 1) - offset);
      l += x[n] + y[n];
    }
    if constexpr (NT == 8) {
      if (unit == 8) {
#pragma unroll
        for (int n = 0; n < NT; ++n) x[n] += y[n];
        const float2 sums = sum_columns(x);
        if constexpr (sizeof(W) == 2) {
          reinterpret_cast<__half2*>(row)[lane] = __floats2half2_rn(sums.x, sums.y);
        } else {
          reinterpret_cast<float2*>(row)[lane] = sums;
        }
        return;
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      if (unit == 1) {
        row[n * 8 + lane * 2] = from_float<W>(x[n]);
        row[n * 8 + lane * 2 + 1] = from_float<W>(y[n]);
        continue;
      }
      float sum = x[n] + y[n];
      if (unit >= 4) sum += __shfl_xor_sync(kFullMask, sum, 1);
      if (unit >= 8) sum += __shfl_xor_sync(kFullMask, sum, 2);
      if (lane * 2 % unit == 0) row[n * (8 / unit) + lane * 2 / unit] = from_float<W>(sum);
    }
  }

  // The logarithm of the whole sum.
  __device__ __forceinline__ float finish() {
    l += __shfl_xor_sync(kFullMask, l, 1);
    l += __shfl_xor_sync(kFullMask, l, 2);
    return m + log2_fast(l);
  }
};

constexpr int kMostBlockRows = 16;  // pooled queries of a block

// Shares of a tile's query blocks of `rows` rows from the weights of their units and lse[row], the logarithm of all of a
// row's weight. kThreads threads come here.
template <int kThreads, int kTilePages, typename T>
__device__ __forceinline__ void write_shares(const CompositeBlocksParams& p, const CompositeTile& tile, int rows,
                                             const UnitWeights<T>& from, const float* lse, int thread) {
  const int heads = composite_heads(p);
  const int num_keys = p.cu_seqlens_k[tile.sequence + 1] - p.cu_seqlens_k[tile.sequence];
  const int unit = composite_unit(p);
  const int block_pages = p.block_k / p.pool_k;
  const int block_units = block_pages / unit;
  const int start = p.cu_seqlens_q[tile.sequence];
  for (int i = 0; i < tile.num_blocks; ++i) {
    const int slot = block_slot(start, tile.sequence, p.block_q, tile.first_block + i);
    const QueryBlock at = query_block_at(p.cu_seqlens_q, p.cu_seqlens_k, p.batch, p.block_q, slot);
    const int count = (at.num_queries + p.pool_q - 1) / p.pool_q;
    const int all_see = composite_seen(p, at, 0, num_keys);
    const int one_sees = composite_seen(p, at, count - 1, num_keys);
    float totals[kMostBlockRows];
#pragma unroll
    for (int r = 0; r < kMostBlockRows; ++r) totals[r] = lse[i * rows + min(r, count - 1)];
    float* shares = static_cast<float*>(p.shares) + (int64_t{slot - p.first_slot} * heads + tile.head) * p.key_blocks;
    for (int block = thread; block < p.key_blocks; block += kThreads) {
      const int first_page = block * block_pages;
      if (first_page >= one_sees) {
        shares[block] = 0.f;
        continue;
      }
      float masses[kMostBlockRows] = {};
      for (int u = 0; u < block_units; ++u) {
        const int page = first_page + u * unit;
        const WeightType<T>* weights = from.weights + i * rows * from.units + block * block_units + u;
        const float* bases = from.bases + i * rows * from.tiles + page / kTilePages;
        // Rows past the last one are that one again, so that all loads are under way at once.
#pragma unroll
        for (int r = 0; r < kMostBlockRows; ++r) {
          const int row = min(r, count - 1);
          const float weight = to_float(weights[row * from.units]);
          const float mass = weight * exp2_fast(bases[row * from.tiles] - totals[r]);
          if (page + unit <= all_see || page < composite_seen(p, at, row, num_keys)) masses[r] += mass;
        }
      }
      float share = masses[0];
#pragma unroll
      for (int r = 1; r < kMostBlockRows; ++r) {
        if (p.aggregate == Aggregate::kMean) {
          if (r < count) share += masses[r];
        } else if (!(share >= masses[r]) && share == share) {
          share = masses[r];  // NaN wins
        }
      }
      shares[block] = p.aggregate == Aggregate::kMean ? share / static_cast<float>(count) : share;
    }
  }
}

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
