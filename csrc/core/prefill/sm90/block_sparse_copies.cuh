// What the Hopper kernel of block_sparse_attention keeps in shared memory, and the warp that fills it: it walks an item's
// row of the mask from its end and copies the queries and the listed keys and values.
#pragma once

#include "core/cuda/sm90/roles.cuh"
#include "core/cuda/sm90/tma.cuh"
#include "core/prefill/block_sparse.h"

namespace unique_attn {

constexpr int kQueries = 128;                             // of an item
constexpr int kHalf = 64;                                 // keys of a copy, and queries of a warpgroup
[[maybe_unused]] constexpr int kNowhere = INT32_MAX / 2;  // position of keys that nobody sees
[[maybe_unused]] constexpr int kNoHead = -1;              // of what comes after the last item

// Tiles of keys and rings for D channels, as shared memory and registers allow.
template <int D>
struct Tiling {
  static constexpr int kHalves = D > 128 ? 1 : 2;  // of a tile of keys
  static constexpr int kKeys = kHalves * kHalf;
  [[maybe_unused]] static constexpr int kOuts = D > 128 ? 2 : 1;  // products that make the outputs of a tile
  static constexpr int kTiles = D / kTileChannels;
  static constexpr int kQueryStages = D > 128 ? 2 : 4;  // a warpgroup uses every second one
  static constexpr int kKeyStages = D > 64 ? 2 : 3;
  // Values are released after the next tile's softmax, keys before their own: one stage more keeps as many ahead.
  static constexpr int kValueStages = kKeyStages + 1;
};

// The queries of a warpgroup.
struct WarpgroupQueries {
  int head;      // or kNoHead
  int first;     // in the packed batch
  int count;     // that are there; may be less than 1
  int position;  // of the first one in its sequence
  int num_keys;  // of the sequence
};

template <int D>
struct BlockSparseShared {
  using Tile = Tiling<D>;
  alignas(1024) char q[Tile::kQueryStages][Tile::kTiles][kHalf * kSwizzleRow];
  alignas(1024) char k[Tile::kKeyStages][Tile::kTiles][Tile::kKeys * kSwizzleRow];
  alignas(1024) char v[Tile::kValueStages][Tile::kTiles][Tile::kKeys * kSwizzleRow];
  WarpgroupQueries query_tiles[Tile::kQueryStages];
  int first_key[Tile::kKeyStages][Tile::kHalves];  // positions of a tile's halves
  int is_last[Tile::kKeyStages];                   // of its item
  StageBarriers<Tile::kQueryStages> queries;
  StageBarriers<Tile::kKeyStages> keys;
  StageBarriers<Tile::kValueStages> values;
};

struct BlockSparseMaps {
  CUtensorMap q, k, v;
};

#ifdef UA_HOPPER
// The set bits of a row of the mask from its end, as halves of 64 keys. A warp walks: its lanes hold 32 words, and those
// before them are on their way.
class HalfWalk {
 public:
  // `end_block`: of the row, what its queries see.
  __device__ __forceinline__ HalfWalk(int lane, const uint32_t* row, int end_block, int halves)
      : lane_(lane),
        row_(row),
        end_block_(end_block),
        halves_(halves),
        first_word_((end_block - 1) / kMaskBits / kWarp * kWarp) {
    words_ = load(first_word_);
    before_ = load(first_word_ - kWarp);
  }
  // Position of the next half's first key; kNowhere after the last one.
  __device__ __forceinline__ int next() {
    if (half_ == 0) {
      while (bits_ == 0u) {
        const unsigned lanes = __ballot_sync(kFullMask, words_ != 0u);
        if (lanes != 0u) {
          const int lane = 31 - __clz(lanes);
          bits_ = __shfl_sync(kFullMask, words_, lane);
          word_ = first_word_ + lane;
          if (lane_ == lane) words_ = 0u;
        } else if (first_word_ > 0) {
          first_word_ -= kWarp;
          words_ = before_;
          before_ = load(first_word_ - kWarp);
        } else {
          return kNowhere;
        }
      }
      const int bit = 31 - __clz(bits_);
      bits_ &= ~(1u << bit);
      block_ = word_ * kMaskBits + bit;
      half_ = halves_;
    }
    return (block_ * halves_ + --half_) * kHalf;
  }

 private:
  __device__ __forceinline__ uint32_t load(int first_word) const {
    const int word = first_word + lane_;
    const int left = end_block_ - word * kMaskBits;
    if (first_word < 0 || left <= 0) return 0u;
    return row_[word] & (kFullMask >> max(kMaskBits - left, 0));
  }

  int lane_;
  const uint32_t* row_;
  int end_block_;
  int halves_;      // of a key block: 1 or 2
  int first_word_;  // of the first lane
  uint32_t words_, before_;
  uint32_t bits_ = 0u;  // of word_, still to come
  int word_ = 0;
  int half_ = 0;  // of block_, still to come
  int block_ = 0;
};

// Copies the 64 keys from `key` on into a half of a tile. `key` counts from the first key of the packed batch or, paged,
// of the sequence, which has `num_keys`.
template <int D, bool kPaged>
__device__ __forceinline__ void copy_half(char* half, int tile_bytes, const CUtensorMap& map, uint64_t* full,
                                          const BlockSparseParams& p, int b, int kv_head, int key, int num_keys) {
  if constexpr (kPaged) {
    const int rows = min(p.table.block_size, kHalf);  // in one block
#pragma unroll 1
    for (int end = key + kHalf; key < end; key += rows, half += rows * kSwizzleRow) {
      // A block that there is not is filled with zeros. No entry of the table past the sequence's end is looked at.
      const int block = key < num_keys ? physical_block(p.table, b, key / p.table.block_size) : -1;
      tma_load_tiles<D>(half, tile_bytes, map, full, key % p.table.block_size, kv_head, block);
    }
  } else {
    tma_load_tiles<D>(half, tile_bytes, map, full, kv_head, key);
  }
}

// Results of queries that see nothing, by a warp.
template <typename T>
__device__ __forceinline__ void store_nothing(const BlockSparseParams& p, int lane, int first_query, int num_queries,
                                              int head) {
#pragma unroll 1
  for (int row = 0; row < num_queries; ++row) {
    const int64_t at = int64_t{first_query + row} * p.num_q_heads + head;
    uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(p.out) + at * p.head_dim);
    if (lane * 8 < p.head_dim) out[lane] = make_uint4(0u, 0u, 0u, 0u);
    if (lane == 0) static_cast<float*>(p.lse)[at] = -INFINITY;
  }
}

// The warp that copies: items as they come, and of each its queries and the tiles of its listed keys.
template <typename T, int D, bool kPaged>
__device__ __forceinline__ void copy_items(BlockSparseShared<D>& shared, const BlockSparseMaps& maps,
                                           const BlockSparseParams& p, int lane) {
  using Tile = Tiling<D>;
  constexpr int kHalves = Tile::kHalves;
  constexpr int kNext = sizeof(shared.k[0][0]);
  const bool leads = lane == 0;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int head_items = num_block_slots(p.total_queries, p.batch, kQueries) * group;  // of a KV head
  const int num_items = head_items * p.num_kv_heads;
  Ring<Tile::kQueryStages> queries;
  Ring<Tile::kKeyStages> keys;
  Ring<Tile::kValueStages> values;

#pragma unroll 1
  for (int item = blockIdx.x; item < num_items;) {
    const int taken = leads ? atomicAdd(p.items_taken, 1) : 0;  // the next one, which is not waited for here
    // The last queries see the most keys: start them first, and all heads that read the same keys together.
    const int kv_head = item / head_items;
    const int slot = (head_items - 1 - item % head_items) / group;
    const int head = kv_head * group + item % group;
    const QueryBlock block = query_block_at(p.cu_seqlens_q, p.cu_seqlens_k, p.batch, kQueries, slot);
    if (block.num_queries > 0) {
      const int b = block.sequence;
      const int k_start = p.cu_seqlens_k[b], num_keys = p.cu_seqlens_k[b + 1] - k_start;
      const uint32_t* row = p.mask + (int64_t{slot} * p.num_mask_heads + mask_head(p, head)) * p.mask_words;
      HalfWalk walk(lane, row, visible_blocks(p, block.position + block.num_queries - 1), p.block_k / kHalf);
      int key = walk.next();
      if (key == kNowhere) store_nothing<T>(p, lane, block.first_query, block.num_queries, head);
#pragma unroll 1
      for (bool is_first = true; key != kNowhere; is_first = false) {
        int position[kHalves];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          position[half] = key;
          if (key != kNowhere) key = walk.next();
        }
        keys.wait_free(shared.keys);
        if (leads) {
          uint64_t* full = &shared.keys.full[keys.stage];
          shared.is_last[keys.stage] = key == kNowhere;
#pragma unroll
          for (int half = 0; half < kHalves; ++half) shared.first_key[keys.stage][half] = position[half];
          barrier_expect(full, sizeof(shared.k[0]));
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            // Keys of no place are copied once more, as something that can be read.
            const int from = (kPaged ? 0 : k_start) + (position[half] == kNowhere ? position[0] : position[half]);
            copy_half<D, kPaged>(shared.k[keys.stage][0] + half * kHalf * kSwizzleRow, kNext, maps.k, full, p, b,
                                 kv_head, from, num_keys);
          }
        }
        keys.advance();
        if (is_first) {
#pragma unroll 1
          for (int skipped = 0; skipped < kQueries; skipped += kHalf) {
            queries.wait_free(shared.queries);
            if (leads) {
              shared.query_tiles[queries.stage] = {head, block.first_query + skipped, block.num_queries - skipped,
                                                   block.position + skipped, num_keys};
              uint64_t* full = &shared.queries.full[queries.stage];
              barrier_expect(full, sizeof(shared.q[0]));
              tma_load_tiles<D>(shared.q[queries.stage][0], sizeof(shared.q[0][0]), maps.q, full, head,
                                block.first_query + skipped);
            }
            queries.advance();
          }
        }
        values.wait_free(shared.values);
        if (leads) {
          uint64_t* full = &shared.values.full[values.stage];
          barrier_expect(full, sizeof(shared.v[0]));
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            const int from = (kPaged ? 0 : k_start) + (position[half] == kNowhere ? position[0] : position[half]);
            copy_half<D, kPaged>(shared.v[values.stage][0] + half * kHalf * kSwizzleRow, kNext, maps.v, full, p, b,
                                 kv_head, from, num_keys);
          }
        }
        values.advance();
      }
    }
    item = static_cast<int>(gridDim.x) + __shfl_sync(kFullMask, taken, 0);
  }
  for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
    queries.wait_free(shared.queries);
    if (leads) {
      shared.query_tiles[queries.stage].head = kNoHead;
      barrier_arrive(&shared.queries.full[queries.stage]);
    }
    queries.advance();
  }
  keys.wait_free(shared.keys);
  if (leads) barrier_arrive(&shared.keys.full[keys.stage]);
}
#endif

}  // namespace unique_attn
