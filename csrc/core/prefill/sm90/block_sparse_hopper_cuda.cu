// Flash attention over listed blocks of keys, on Hopper. A thread block serves a block of 128 queries of one head: one
// warp walks the block's row of the mask from its end and copies the listed keys, 64 at a time and two times 64 side by
// side; two warpgroups multiply, each 64 queries, in turns. Of every tile the softmax runs under the product of the tile
// before with its values.
#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/sm90/roles.cuh"
#include "core/cuda/sm90/softmax.cuh"
#include "core/prefill/sm90/block_sparse_hopper.h"

namespace unique_attn {
namespace {

constexpr int kQueries = 128;  // of a thread block
constexpr int kHalf = 64;      // keys of a copy, and queries of a warpgroup
constexpr int kKeys = 2 * kHalf;
constexpr int kKeyStages = 3;  // a stage's positions are read after its product
constexpr int kValueStages = 2;
constexpr int kMostWords = 1024;                          // of a row of the mask: 2 million keys
[[maybe_unused]] constexpr int kNowhere = INT32_MAX / 2;  // position of keys that nobody sees
using Roles = WarpRoles<2, 24, 240>;

template <int D>
struct Shared {
  static constexpr int kTiles = D / kTileChannels;
  alignas(1024) char q[2][kTiles][kHalf * kSwizzleRow];
  alignas(1024) char k[kKeyStages][kTiles][kKeys * kSwizzleRow];
  alignas(1024) char v[kValueStages][kTiles][kKeys * kSwizzleRow];
  alignas(16) uint32_t words[kMostWords];  // the blocks' row of the mask, as far as its queries see
  int first_key[kKeyStages][2];            // positions of a tile's halves
  // For each role: of one number the read would move to before their branch, where neither has its registers yet.
  int num_halves[2];
  uint64_t q_full;
  StageBarriers<kKeyStages> keys;
  StageBarriers<kValueStages> values;
};

struct Maps {
  CUtensorMap q, k, v;
};

#ifdef UA_HOPPER
// The set bits of a row of the mask from its end, as halves of 64 keys.
struct HalfWalk {
  const uint32_t* words;
  int halves;  // of a key block: 1 or 2
  int word;
  uint32_t bits = 0;
  int half = 0;  // of the present block, still to come
  int block = 0;

  __device__ __forceinline__ HalfWalk(const uint32_t* words, int num_words, int halves)
      : words(words), halves(halves), word(num_words) {}
  // Position of the next half's first key; kNowhere after the last one.
  __device__ __forceinline__ int next() {
    if (half == 0) {
      while (bits == 0u) {
        if (word == 0) return kNowhere;
        bits = words[--word];
      }
      const int bit = 31 - __clz(bits);
      bits &= ~(1u << bit);
      block = word * kMaskBits + bit;
      half = halves;
    }
    return (block * halves + --half) * kHalf;
  }
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
#endif

template <typename T, int D, bool kPaged>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    block_sparse_hopper(const __grid_constant__ Maps maps, const __grid_constant__ BlockSparseParams p,
                        int first_sequence) {
#ifdef UA_HOPPER
  using S = Shared<D>;
  extern __shared__ char shared_bytes[];
  auto& shared = shared_storage<S>(shared_bytes);
  const int b = first_sequence + static_cast<int>(blockIdx.z);
  const int head = blockIdx.y;
  const int kv_head = head / (p.num_q_heads / p.num_kv_heads);
  const int q_start = p.cu_seqlens_q[b], num_queries = p.cu_seqlens_q[b + 1] - q_start;
  const int k_start = p.cu_seqlens_k[b], num_keys = p.cu_seqlens_k[b + 1] - k_start;
  // The last queries see the most keys: start them first.
  const int block = (num_queries - 1) / kQueries - static_cast<int>(blockIdx.x);
  if (num_queries <= 0 || block < 0) return;
  const int first_query = block * kQueries;
  const int first_position = num_keys - num_queries + first_query;
  const int last_position = min(first_position + kQueries, num_keys) - 1;
  const int end_block = visible_blocks(p, last_position);
  const int num_words = (end_block + kMaskBits - 1) / kMaskBits;
  const int halves = p.block_k / kHalf;

  const int warpgroup = enter_roles<Roles>(
      [&] {
        barrier_init(&shared.q_full, 1);
        shared.keys.init(Roles::kReaders);
        shared.values.init(Roles::kReaders);
      },
      [&] {
        if (threadIdx.x / kWarp != 1) return;
        const int64_t row = block_slot(q_start, b, kQueries, block);
        const uint32_t* mask = p.mask + (row * p.num_mask_heads + mask_head(p, head)) * p.mask_words;
        int count = 0;
        for (int i = threadIdx.x % kWarp; i < num_words; i += kWarp) {
          const int bits = min(end_block - i * kMaskBits, kMaskBits);
          const uint32_t word = bits == kMaskBits ? mask[i] : mask[i] & ((1u << bits) - 1u);
          shared.words[i] = word;
          count += __popc(word);
        }
        count = __reduce_add_sync(kFullMask, count);
        if (threadIdx.x % kWarp < 2) shared.num_halves[threadIdx.x % kWarp] = count * halves;
      });

  if (Roles::copies(warpgroup)) {
    const int num_tiles = (shared.num_halves[0] + 1) / 2;
    if (Roles::one_copies() && num_tiles > 0) {
      barrier_expect(&shared.q_full, static_cast<int>(sizeof(shared.q)));
      for (int w = 0; w < 2; ++w) {
        tma_load_tiles<D>(shared.q[w][0], sizeof(shared.q[0][0]), maps.q, &shared.q_full, head,
                          q_start + first_query + w * kHalf);
      }
      Ring<kKeyStages> keys;
      Ring<kValueStages> values;
      HalfWalk walk(shared.words, num_words, halves);
      constexpr int kNext = sizeof(shared.k[0][0]);
      for (int tile = 0; tile < num_tiles; ++tile) {
        const int position[2] = {walk.next(), walk.next()};
        // Keys of no place are copied once more, as something that can be read.
        const int origin = kPaged ? 0 : k_start;
        const int from[2] = {origin + position[0], origin + (position[1] == kNowhere ? position[0] : position[1])};
        keys.wait_free(shared.keys);
        shared.first_key[keys.stage][0] = position[0];
        shared.first_key[keys.stage][1] = position[1];
        uint64_t* full = &shared.keys.full[keys.stage];
        barrier_expect(full, sizeof(shared.k[0]));
        for (int half = 0; half < 2; ++half) {
          copy_half<D, kPaged>(shared.k[keys.stage][0] + half * kHalf * kSwizzleRow, kNext, maps.k, full, p, b, kv_head,
                               from[half], num_keys);
        }
        keys.advance();
        full = values.acquire(shared.values, sizeof(shared.v[0]));
        for (int half = 0; half < 2; ++half) {
          copy_half<D, kPaged>(shared.v[values.stage][0] + half * kHalf * kSwizzleRow, kNext, maps.v, full, p, b,
                               kv_head, from[half], num_keys);
        }
        values.advance();
      }
    }
    return;
  }

  const int num_tiles = (shared.num_halves[1] + 1) / 2;
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int column = lane % 4 * 2;
  const int row = thread / kWarp * 16 + lane / 4;  // and 8 further
  const int query = first_query + warpgroup * kHalf + row;
  const int position = first_position + warpgroup * kHalf + row;
  float out[D / 2] = {};
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};

  if (num_tiles > 0) {
    const float scale = static_cast<float>(p.scale) * kLog2e;
    const char* q = shared.q[warpgroup][0];
    constexpr int kQNext = sizeof(shared.q[0][0]);
    constexpr int kNext = sizeof(shared.k[0][0]);
    float s[kKeys / 2];
    unsigned probabilities[kKeys / 4] = {};
    Ring<kKeyStages> keys;
    Ring<kValueStages> values;
    int previous = 0;  // stage of the values that the product in flight reads
    const Turns<2> turns(warpgroup);

    barrier_wait(&shared.q_full, 0);
    keys.wait(shared.keys);
    wgmma_fence();
    product_abt<T, D>(s, q, kQNext, shared.k[0][0], kNext);
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    // The first tile may reach past the sequence's end. Of keys there no logit is used, but 0 times their values is NaN
    // if those are. A half that is nowhere holds the other one's keys again.
    const int first = shared.first_key[0][0];
    const int second = shared.first_key[0][1] == kNowhere ? first : shared.first_key[0][1];
    const int tails[2] = {max(min(num_keys - first, kHalf), 0), max(min(num_keys - second, kHalf), 0)};
    if (tails[0] < kHalf || tails[1] < kHalf) {
      values.wait(shared.values);
      zero_rows<S::kTiles, 2 * kWarpgroup>(shared.v[0][0], kNext, tails[0], kHalf, threadIdx.x);
      zero_rows<S::kTiles, 2 * kWarpgroup>(shared.v[0][0], kNext, kHalf + tails[1], kKeys, threadIdx.x);
      finish_zero_rows<2 * kWarpgroup>(1);
    }
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int first_key[2] = {shared.first_key[keys.stage][0], shared.first_key[keys.stage][1]};
      shared.keys.release(keys.stage);
      keys.advance();
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] *= scale;
      if (max(first_key[0], first_key[1]) + kHalf - 1 > first_position + warpgroup * kHalf) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int n = i / 4 * 8;
          const int key = first_key[n / kHalf] + n % kHalf + column + i % 2;
          if (key > position + i / 2 % 2 * 8) s[i] = -INFINITY;
        }
      }
      float correction[2];
      online_softmax(s, m, l, correction);
      wgmma_wait<0>();
      keep_operand(probabilities, p.batch == 0, &shared.q_full);
      if (tile > 0) shared.values.release(previous);
      pin(out);
      pin(probabilities);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] *= correction[i / 2 % 2];
      pack_operand<T>(probabilities, s);
      pin(out);
      pin(probabilities);
      turns.wait();
      if (tile + 1 < num_tiles) {
        keys.wait(shared.keys);
        wgmma_fence();
        product_abt<T, D>(s, q, kQNext, shared.k[keys.stage][0], kNext);
        wgmma_commit();
      }
      values.wait(shared.values);
      wgmma_fence();
      product_ab<T, kKeys / 16>(out, probabilities, shared.v[values.stage][0], kNext);
      wgmma_commit();
      turns.pass();
      previous = values.stage;
      values.advance();
      wgmma_wait<1>();
      if (tile + 1 < num_tiles) pin(s);
    }
    wgmma_wait<0>();
    pin(out);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] += __shfl_xor_sync(kFullMask, l[half], 1);
    l[half] += __shfl_xor_sync(kFullMask, l[half], 2);
    if (query + half * 8 >= num_queries) continue;
    const int64_t at = (int64_t{q_start} + query + half * 8) * p.num_q_heads + head;
    T* o = static_cast<T*>(p.out) + at * D + column;
    const float factor = l[half] == 0.f ? 0.f : 1.f / l[half];  // 0: nothing was seen
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<unsigned*>(o + n * 8) =
          pack2<T>(out[4 * n + 2 * half] * factor, out[4 * n + 2 * half + 1] * factor);
    }
    if (lane % 4 == 0) static_cast<float*>(p.lse)[at] = (m[half] + log2f(l[half])) * kLn2;
  }
#endif
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
cudaError_t launch(const BlockSparseParams& p, const Maps& maps, cudaStream_t stream) {
  constexpr int kBytes = kSharedBytes<Shared<D>>;
  const auto kernel = is_paged(p.table) ? block_sparse_hopper<T, D, true> : block_sparse_hopper<T, D, false>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int blocks = (p.max_queries + kQueries - 1) / kQueries;
  return launch_sequences(p.batch, [&](int first, unsigned count) {
    kernel<<<dim3(blocks, p.num_q_heads, count), Roles::kThreads, kBytes, stream>>>(maps, p, first);
  });
}

}  // namespace

bool block_sparse_on_hopper(const BlockSparseParams& p, const DeviceFacts& device) {
  const int block_size = p.table.block_size;
  const bool keys = is_paged(p.table) ? (block_size % kHalf == 0 || block_size == 16 || block_size == 32) &&
                                            p.table.num_blocks > 0 && can_map(p, p.k) && can_map(p, p.v)
                                      : p.total_keys > 0;
  return device.runs_sm90 && (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) &&
         (p.head_dim == 64 || p.head_dim == 128) && p.block_q == kQueries && p.mask_words <= kMostWords && keys;
}

cudaError_t block_sparse_attention_hopper(const BlockSparseParams& p, cudaStream_t stream) {
  Maps maps;
  cudaError_t error = packed_rows(maps.q, p, p.q, p.num_q_heads, p.total_queries, p.q_stride_token, p.q_stride_head);
  if (error == cudaSuccess) error = key_rows(maps.k, p, p.k);
  if (error == cudaSuccess) error = key_rows(maps.v, p, p.v);
  if (error != cudaSuccess) return error;
  const bool bf16 = p.dtype == DType::kBFloat16;
  if (p.head_dim == 64) return bf16 ? launch<__nv_bfloat16, 64>(p, maps, stream) : launch<__half, 64>(p, maps, stream);
  return bf16 ? launch<__nv_bfloat16, 128>(p, maps, stream) : launch<__half, 128>(p, maps, stream);
}

}  // namespace unique_attn
