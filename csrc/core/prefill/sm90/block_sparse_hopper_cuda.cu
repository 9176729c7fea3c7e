// Flash attention over listed blocks of keys, on Hopper. Thread blocks stay: each takes one item, a block of 128 queries of
// one head, after the other, and its roles see one stream of tiles. One warp walks the item's row of the mask from its
// end and copies the listed keys, 64 at a time, one or two times 64 side by side; two warpgroups multiply, each 64
// queries, in turns. Of every tile the softmax runs under the product of the tile before with its values, and an item's
// results are stored under the first product of the next one.
#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/sm90/softmax.cuh"
#include "core/prefill/sm90/block_sparse_copies.cuh"
#include "core/prefill/sm90/block_sparse_hopper.h"

namespace unique_attn {
namespace {

using Roles = WarpRoles<2, 56, 224>;

template <typename T, int D, bool kPaged>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    block_sparse_hopper(const __grid_constant__ BlockSparseMaps maps, const __grid_constant__ BlockSparseParams p) {
#ifdef UA_HOPPER
  using S = BlockSparseShared<D>;
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
  WarpgroupQueries tile = shared.query_tiles[queries.stage];
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
    const WarpgroupQueries next = shared.query_tiles[queries.stage];
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
cudaError_t launch(const BlockSparseParams& p, const BlockSparseMaps& maps, const DeviceFacts& device,
                   cudaStream_t stream) {
  constexpr int kBytes = kSharedBytes<BlockSparseShared<D>>;
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
cudaError_t launch(const BlockSparseParams& p, const BlockSparseMaps& maps, const DeviceFacts& device,
                   cudaStream_t stream) {
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
  BlockSparseMaps maps;
  cudaError_t error = packed_rows(maps.q, p, p.q, p.num_q_heads, p.total_queries, p.q_stride_token, p.q_stride_head);
  if (error == cudaSuccess) error = key_rows(maps.k, p, p.k);
  if (error == cudaSuccess) error = key_rows(maps.v, p, p.v);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(p, maps, device, stream)
                                     : launch<__half>(p, maps, device, stream);
}

}  // namespace unique_attn
