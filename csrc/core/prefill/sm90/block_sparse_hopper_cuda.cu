// Flash attention over listed blocks of keys, on Hopper. Thread blocks stay: each takes one item, a block of 128 queries of
// one head, after the other, and its roles see one stream of tiles. One warp walks the item's row of the mask from its
// end and copies the listed keys, 64 at a time, one or two times 64 side by side; two warpgroups multiply, each 64
// queries, in turns. Of every tile the softmax runs under the product of the tile before with its values, and an item's
// results are stored under the first product of the next one.
#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/sm90/roles.cuh"
#include "core/cuda/sm90/softmax.cuh"
#include "core/prefill/sm90/block_sparse_hopper.h"

namespace unique_attn {
namespace {

constexpr int kQueries = 128;                             // of an item
constexpr int kHalf = 64;                                 // keys of a copy, and queries of a warpgroup
[[maybe_unused]] constexpr int kNowhere = INT32_MAX / 2;  // position of keys that nobody sees
[[maybe_unused]] constexpr int kNoHead = -1;              // of what comes after the last item
using Roles = WarpRoles<2, 56, 224>;

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
struct QueryTile {
  int head;      // or kNoHead
  int first;     // in the packed batch
  int count;     // that are there; may be less than 1
  int position;  // of the first one in its sequence
  int num_keys;  // of the sequence
};

template <int D>
struct Shared {
  using Tile = Tiling<D>;
  alignas(1024) char q[Tile::kQueryStages][Tile::kTiles][kHalf * kSwizzleRow];
  alignas(1024) char k[Tile::kKeyStages][Tile::kTiles][Tile::kKeys * kSwizzleRow];
  alignas(1024) char v[Tile::kValueStages][Tile::kTiles][Tile::kKeys * kSwizzleRow];
  QueryTile query_tiles[Tile::kQueryStages];
  int first_key[Tile::kKeyStages][Tile::kHalves];  // positions of a tile's halves
  int is_last[Tile::kKeyStages];                   // of its item
  StageBarriers<Tile::kQueryStages> queries;
  StageBarriers<Tile::kKeyStages> keys;
  StageBarriers<Tile::kValueStages> values;
};

struct Maps {
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
__device__ __forceinline__ void copy_items(Shared<D>& shared, const Maps& maps, const BlockSparseParams& p, int lane) {
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

template <typename T, int D, bool kPaged>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    block_sparse_hopper(const __grid_constant__ Maps maps, const __grid_constant__ BlockSparseParams p) {
#ifdef UA_HOPPER
  using S = Shared<D>;
  using Tile = Tiling<D>;
  constexpr int kKeys = Tile::kKeys, kHalves = Tile::kHalves;
  extern __shared__ char shared_bytes[];
  auto& shared = shared_storage<S>(shared_bytes);
  const int warpgroup = enter_roles<Roles>([&] {
    shared.queries.init(kWarpgroup / kWarp);
    shared.keys.init(Roles::kReaders);
    shared.values.init(Roles::kReaders);
  });
  if (Roles::copies(warpgroup)) {
    // No expression that the other role has as well: the compiler would compute it before the branch.
    const int lane = static_cast<int>(threadIdx.x) - Roles::kMultiplying * kWarpgroup;
    if (lane < kWarp) copy_items<T, D, kPaged>(shared, maps, p, lane);
    return;
  }

  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int column = lane % 4 * 2;
  const int row = thread / kWarp * 16 + lane / 4;  // and 8 further
  const float scale = static_cast<float>(p.scale) * kLog2e;
  constexpr int kQNext = sizeof(shared.q[0][0]);
  constexpr int kNext = sizeof(shared.k[0][0]);
  float s[kKeys / 2];
  unsigned probabilities[kKeys / 4] = {};
  Ring<Tile::kQueryStages> queries;
  Ring<Tile::kKeyStages> keys;
  Ring<Tile::kValueStages> values;
  const auto multiply_keys = [&] {
    keys.wait(shared.keys);
    wgmma_fence();
    product_abt<T, D>(s, shared.q[queries.stage][0], kQNext, shared.k[keys.stage][0], kNext);
    wgmma_commit();
  };

  if (warpgroup == 1) queries.advance();
  queries.wait(shared.queries);
  QueryTile tile = shared.query_tiles[queries.stage];
  const Turns<2> turns(warpgroup);
  multiply_keys();

  // An item. The product of its queries with its first keys is on its way; after the last item, one of whatever is there.
#pragma unroll 1
  while (tile.head != kNoHead) {
    float out[Tile::kOuts][D / Tile::kOuts / 2] = {};
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
    bool multiplies_values = false;
    int previous = 0;  // stage of the values that the product in flight reads
    const auto multiply_values = [&] {
      values.wait(shared.values);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < Tile::kOuts; ++i) {
        product_ab<T, kKeys / 16>(out[i], probabilities, shared.v[values.stage][i * Tile::kTiles / Tile::kOuts], kNext);
      }
      wgmma_commit();
    };
    const auto pin_out = [&] {
#pragma unroll
      for (int i = 0; i < Tile::kOuts; ++i) pin(out[i]);
    };
    wgmma_wait<0>();
    pin(s);

#pragma unroll 1
    while (true) {
      int first_key[kHalves], last_half = 0;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        first_key[half] = shared.first_key[keys.stage][half];
        last_half = max(last_half, first_key[half]);
      }
      const bool is_last = shared.is_last[keys.stage];
      shared.keys.release(keys.stage);
      keys.advance();
      if (is_last) shared.queries.release(queries.stage);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] *= scale;
      if (last_half + kHalf - 1 > tile.position) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int n = i / 4 * 8;
          const int key = first_key[n / kHalf] + n % kHalf + column + i % 2;
          if (key > tile.position + row + i / 2 % 2 * 8) s[i] = -INFINITY;
        }
      }
      float correction[2];
      online_softmax(s, m, l, correction);
      wgmma_wait<0>();
      keep_operand(probabilities, p.batch == 0, &shared.queries);
      if (multiplies_values) shared.values.release(previous);
      pin_out();
      pin(probabilities);
#pragma unroll
      for (int i = 0; i < Tile::kOuts; ++i) {
#pragma unroll
        for (int n = 0; n < D / Tile::kOuts / 2; ++n) out[i][n] *= correction[n / 2 % 2];
      }
      pack_operand<T>(probabilities, s);
      pin_out();
      pin(probabilities);
      // A tile may reach past the sequence's end. Of keys there no logit is used, but 0 times their values is NaN if
      // those are. A half that is nowhere holds the first one's keys again.
      if (last_half + kHalf > tile.num_keys) {
        values.wait(shared.values);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const int left = tile.num_keys - (first_key[half] == kNowhere ? first_key[0] : first_key[half]);
          zero_rows<Tile::kTiles, 2 * kWarpgroup>(shared.v[values.stage][0], kNext,
                                                  half * kHalf + max(min(left, kHalf), 0), (half + 1) * kHalf,
                                                  threadIdx.x);
        }
        finish_zero_rows<2 * kWarpgroup>(1);
      }
      turns.wait();
      if (is_last) break;
      multiply_keys();
      multiply_values();
      turns.pass();
      previous = values.stage;
      multiplies_values = true;
      values.advance();
      wgmma_wait<1>();
      pin(s);
    }

    // What is last here comes first for the tensor cores: the next item's may not be there yet.
    multiply_values();
    queries.advance();
    queries.advance();
    queries.wait(shared.queries);
    const QueryTile next = shared.query_tiles[queries.stage];
    multiply_keys();
    turns.pass();
    wgmma_wait<1>();
    keep_operand(probabilities, p.batch == 0, &shared.queries);
    pin_out();
    shared.values.release(values.stage);
    values.advance();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] += __shfl_xor_sync(kFullMask, l[half], 1);
      l[half] += __shfl_xor_sync(kFullMask, l[half], 2);
      if (row + half * 8 >= tile.count) continue;
      const int64_t at = (int64_t{tile.first} + row + half * 8) * p.num_q_heads + tile.head;
      T* o = static_cast<T*>(p.out) + at * p.head_dim + column;
      const float factor = l[half] == 0.f ? 0.f : 1.f / l[half];  // 0: nothing was seen
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        if (n * 8 >= p.head_dim) break;
        const float* pair = &out[n / (D / Tile::kOuts / 8)][4 * (n % (D / Tile::kOuts / 8)) + 2 * half];
        *reinterpret_cast<unsigned*>(o + n * 8) = pack2<T>(pair[0] * factor, pair[1] * factor);
      }
      if (lane % 4 == 0) static_cast<float*>(p.lse)[at] = (m[half] + log2f(l[half])) * kLn2;
    }
    tile = next;
  }
  wgmma_wait<0>();
#endif
}

// Query blocks of all heads, and those slots that belong to none.
int64_t num_items(const BlockSparseParams& p) {
  return int64_t{num_block_slots(p.total_queries, p.batch, kQueries)} * p.num_q_heads;
}

// Rows of 64 tokens of one head.
cudaError_t packed_rows(CUtensorMap& map, const BlockSparseParams& p, const void* data, int heads, int tokens,
                        int64_t stride_token, int64_t stride_head) {
  return encode_tensor_map(
      map,
      {data, 2, {p.head_dim, heads, tokens}, {stride_head * 2, stride_token * 2}, {kTileChannels, 1, kHalf}, true});
}

// Keys or values: the same rows, or those of one block of a cache.
cudaError_t key_rows(CUtensorMap& map, const BlockSparseParams& p, const KeyView& view) {
  const PageTable& table = p.table;
  if (!is_paged(table)) {
    return packed_rows(map, p, view.data, p.num_kv_heads, p.total_keys, view.stride_token, view.stride_head);
  }
  return encode_tensor_map(map, {view.data,
                                 2,
                                 {p.head_dim, table.block_size, p.num_kv_heads, table.num_blocks},
                                 {view.stride_token * 2, view.stride_head * 2, view.stride_block * 2},
                                 {kTileChannels, min_of(table.block_size, kHalf), 1, 1},
                                 true});
}

bool can_map(const BlockSparseParams& p, const KeyView& view) {
  return view.stride_token != 0 && (view.stride_head != 0 || p.num_kv_heads == 1) &&
         (view.stride_block != 0 || p.table.num_blocks == 1);
}

template <typename T, int D>
cudaError_t launch(const BlockSparseParams& p, const Maps& maps, const DeviceFacts& device, cudaStream_t stream) {
  constexpr int kBytes = kSharedBytes<Shared<D>>;
  static_assert(kBytes <= 227 * 1024, "shared memory of a thread block");
  const auto kernel = is_paged(p.table) ? block_sparse_hopper<T, D, true> : block_sparse_hopper<T, D, false>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) error = cudaMemsetAsync(p.items_taken, 0, sizeof(*p.items_taken), stream);
  if (error != cudaSuccess) return error;
  const int blocks = min_of(static_cast<int>(num_items(p)), device.multiprocessors);
  kernel<<<blocks, Roles::kThreads, kBytes, stream>>>(maps, p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const BlockSparseParams& p, const Maps& maps, const DeviceFacts& device, cudaStream_t stream) {
  return p.head_dim <= 64    ? launch<T, 64>(p, maps, device, stream)
         : p.head_dim <= 128 ? launch<T, 128>(p, maps, device, stream)
                             : launch<T, 256>(p, maps, device, stream);
}

}  // namespace

bool block_sparse_on_hopper(const BlockSparseParams& p, const DeviceFacts& device) {
  const int block_size = p.table.block_size;
  const bool keys = is_paged(p.table) ? (block_size % kHalf == 0 || block_size == 16 || block_size == 32) &&
                                            p.table.num_blocks > 0 && can_map(p, p.k) && can_map(p, p.v)
                                      : p.total_keys > 0;
  const bool channels = p.head_dim == 64 || p.head_dim >= 128;  // fewer are right too, but not as tested
  return device.runs_sm90 && channels && (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) &&
         p.block_q == kQueries && num_items(p) <= INT32_MAX / 2 && keys;
}

cudaError_t block_sparse_attention_hopper(const BlockSparseParams& p, const DeviceFacts& device, cudaStream_t stream) {
  Maps maps;
  cudaError_t error = packed_rows(maps.q, p, p.q, p.num_q_heads, p.total_queries, p.q_stride_token, p.q_stride_head);
  if (error == cudaSuccess) error = key_rows(maps.k, p, p.k);
  if (error == cudaSuccess) error = key_rows(maps.v, p, p.v);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(p, maps, device, stream)
                                     : launch<__half>(p, maps, device, stream);
}

}  // namespace unique_attn
