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

// Tiles of a call, `blocks` blocks each, of every sequence and head, and the order in which a grid of thread blocks takes
// them: KV heads in sets whose pages stay in L2 together, in a set the late tiles of every sequence first.
struct CompositeTiles {
  int blocks;       // of queries
  int of_sequence;  // at most
  int set_heads;    // KV heads
  int64_t count;
};

// Item `round` of this thread block. Every other round goes through the grid backwards, so that all get about as much.
__device__ __forceinline__ int64_t composite_item(int64_t round) {
  return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

__device__ __forceinline__ CompositeTile composite_tile(const CompositeBlocksParams& p, const CompositeTiles& tiles,
                                                        int64_t item) {
  CompositeTile tile{0, 0, 0, 0};
  if (item >= tiles.count) return tile;
  const int group = composite_heads(p) / p.num_kv_heads;
  const int64_t head_items = int64_t{group} * p.batch * tiles.of_sequence;  // of a KV head
  const int first_head = static_cast<int>(item / (head_items * tiles.set_heads)) * tiles.set_heads;
  const int heads = min(tiles.set_heads, p.num_kv_heads - first_head) * group;
  const int64_t in_set = item - first_head * head_items;
  tile.head = first_head * group + static_cast<int>(in_set % heads);
  tile.sequence = static_cast<int>(in_set / heads % p.batch);
  const int from_end = static_cast<int>(in_set / heads / p.batch);
  const int start = p.cu_seqlens_q[tile.sequence];
  const int slot = block_slot(start, tile.sequence, p.block_q, 0);
  const int end = min((p.cu_seqlens_q[tile.sequence + 1] - start + p.block_q - 1) / p.block_q, p.end_slot - slot);
  const int first = max(p.first_slot - slot, 0);
  const int place = (end - first + tiles.blocks - 1) / tiles.blocks - 1 - from_end;
  tile.first_block = first + place * tiles.blocks;
  tile.num_blocks = place < 0 ? 0 : min(tiles.blocks, end - tile.first_block);
  return tile;
}

inline CompositeTiles composite_tiles(const CompositeBlocksParams& p, int blocks) {
  constexpr int64_t kSetBytes = int64_t{32} << 20;
  const int64_t of_sequence = (int64_t{p.max_queries} + p.block_q - 1) / p.block_q;
  const int64_t of_call = p.end_slot - p.first_slot;
  const int64_t most = of_sequence < of_call ? of_sequence : of_call;
  const int64_t head_bytes = (p.total_keys / p.pool_k + int64_t{p.batch}) * composite_vectors(p.form) * p.head_dim *
                             static_cast<int64_t>(dtype_size(p.dtype));
  const int64_t sets = (head_bytes * p.num_kv_heads + kSetBytes - 1) / kSetBytes;
  CompositeTiles tiles;
  tiles.blocks = blocks;
  tiles.of_sequence = static_cast<int>((most + blocks - 1) / blocks);
  tiles.set_heads = static_cast<int>((p.num_kv_heads + sets - 1) / sets);
  tiles.count = int64_t{p.batch} * tiles.of_sequence * composite_heads(p);
  return tiles;
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
// row up to there. 16-bit inputs have weights of fp16, which are rounded no more coarsely than those.
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

// Shares of a tile's query blocks of `rows` rows, at most kRows, from the weights of their units and lse[row], the
// logarithm of all of a row's weight. kThreads threads come here.
template <int kThreads, int kTilePages, int kRows, typename T>
__device__ __forceinline__ void write_shares(const CompositeBlocksParams& p, const CompositeTile& tile, int rows,
                                             const UnitWeights<T>& from, const float* lse, int thread) {
  constexpr int kBatch = 32 / kRows;  // key blocks whose loads are under way together
  const int heads = composite_heads(p);
  const int num_keys = p.cu_seqlens_k[tile.sequence + 1] - p.cu_seqlens_k[tile.sequence];
  const int unit = composite_unit(p);
  const int block_pages = p.block_k / p.pool_k;
  const int block_units = block_pages / unit;
  const int start = p.cu_seqlens_q[tile.sequence];
  const int units = static_cast<int>(from.units), tiles = static_cast<int>(from.tiles);
  for (int i = 0; i < tile.num_blocks; ++i) {
    const int slot = block_slot(start, tile.sequence, p.block_q, tile.first_block + i);
    const QueryBlock at = query_block_at(p.cu_seqlens_q, p.cu_seqlens_k, p.batch, p.block_q, slot);
    const int count = (at.num_queries + p.pool_q - 1) / p.pool_q;
    const int all_see = composite_seen(p, at, 0, num_keys);
    const int end = (composite_seen(p, at, count - 1, num_keys) + block_pages - 1) / block_pages;
    const WeightType<T>* weights = from.weights + i * rows * from.units;
    const float* bases = from.bases + i * rows * from.tiles;
    float* shares = static_cast<float*>(p.shares) + (int64_t{slot - p.first_slot} * heads + tile.head) * p.key_blocks;
    for (int first = thread; first < end; first += kThreads * kBatch) {
      float masses[kBatch][kRows] = {};
      for (int u = 0; u < block_units; ++u) {
        WeightType<T> weight[kBatch][kRows];
        float base[kBatch][kRows];
        // Rows and blocks past the last one are that one again, so that all loads are under way at once.
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int block = min(first + j * kThreads, end - 1);
          const int page = block * block_pages + u * unit;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int row = min(r, count - 1);
            weight[j][r] = weights[row * units + block * block_units + u];
            base[j][r] = bases[row * tiles + page / kTilePages];
          }
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int page = (first + j * kThreads) * block_pages + u * unit;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int row = min(r, count - 1);
            const float mass = to_float(weight[j][r]) * exp2_fast(base[j][r] - lse[i * rows + row]);
            if (page + unit <= all_see || page < composite_seen(p, at, row, num_keys)) masses[j][r] += mass;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        float share = masses[j][0];
#pragma unroll
        for (int r = 1; r < kRows; ++r) {
          if (p.aggregate == Aggregate::kMean) {
            if (r < count) share += masses[j][r];
          } else if (!(share >= masses[j][r]) && share == share) {
            share = masses[j][r];  // NaN wins
          }
        }
        if (p.aggregate == Aggregate::kMean) share /= static_cast<float>(count);
        const int block = first + j * kThreads;
        if (block < end) shares[block] = share > 1.f ? 1.f : share;  // by rounding
      }
    }
    for (int block = end + thread; block < p.key_blocks; block += kThreads) shares[block] = 0.f;
  }
}

// The same for any number of rows of a block: a power of 2 up to 16.
template <int kThreads, int kTilePages, typename T>
__device__ __forceinline__ void write_all_shares(const CompositeBlocksParams& p, const CompositeTile& tile, int rows,
                                                 const UnitWeights<T>& from, const float* lse, int thread) {
  if (rows == 16) {
    write_shares<kThreads, kTilePages, 16>(p, tile, rows, from, lse, thread);
  } else if (rows == 8) {
    write_shares<kThreads, kTilePages, 8>(p, tile, rows, from, lse, thread);
  } else {
    write_shares<kThreads, kTilePages, 4>(p, tile, rows, from, lse, thread);
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
