// composite_blocks_cuda.cu on Hopper: three warpgroups hold 64 pooled queries each in registers, also squared, and one
// warp copies means and variances of 64 pages at a time for all of them. A warpgroup's rows are its own from the first
// page to their shares, so warpgroups wait for nothing but copies.
#include "core/cuda/launch.cuh"
#include "core/cuda/sm90/roles.cuh"
#include "core/prefill/composite_cuda.cuh"
#include "core/prefill/sm90/composite_hopper.h"

namespace unique_attn {
namespace {

constexpr int kPages = 64;  // of a copy
constexpr int kGroups = kCompositeHopperRows / 64;
constexpr int kStages = 4;
using Roles = WarpRoles<kGroups, 24, 160>;

template <int D>
struct Shared {
  static constexpr int kTiles = D / kTileChannels;
  alignas(1024) char mean[kStages][kTiles][kPages * kSwizzleRow];
  alignas(1024) char var[kStages][kTiles][kPages * kSwizzleRow];
  float lse[kGroups][64];
  StageBarriers<kStages> ring;
};

struct Maps {
  CUtensorMap mean, var;
};

#ifdef UA_HOPPER
// Means of pool_q queries (and of a group's heads) as the operand A of 64 rows; zeros where there is no query.
template <typename T, int D>
__device__ __forceinline__ void pool_operand(unsigned (&a)[D / 4], const CompositeBlocksParams& p,
                                             const CompositeTile& tile, int end_query) {
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
  const int group = p.pools_heads ? p.num_q_heads / p.num_kv_heads : 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = tile.first_block * p.block_q + (row + half * 8) * p.pool_q;
    const int count = min(end_query - query, p.pool_q);
    const T* source = static_cast<const T*>(p.q) + (int64_t{p.cu_seqlens_q[tile.sequence]} + query) * p.q_stride_token +
                      int64_t{tile.head} * group * p.q_stride_head + lane % 4 * 2;
    const float inverse = count > 0 ? 1.f / static_cast<float>(count * group) : 0.f;
    float2 sums[D / 8] = {};  // of pairs of channels, 8 apart
    for (int j = 0; j < count; ++j) {
      for (int g = 0; g < group; ++g) {
        const T* token = source + j * p.q_stride_token + g * p.q_stride_head;
#pragma unroll
        for (int at = 0; at < D / 8; ++at) {
          const float2 x = unpack2<T>(*reinterpret_cast<const unsigned*>(token + at * 8));
          sums[at].x += x.x, sums[at].y += x.y;
        }
      }
    }
#pragma unroll
    for (int at = 0; at < D / 8; ++at) a[at * 2 + half] = pack2<T>(sums[at].x * inverse, sums[at].y * inverse);
  }
}
#endif

template <typename T, int D, bool kSpread>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    composite_hopper(const __grid_constant__ Maps maps, const __grid_constant__ CompositeBlocksParams p,
                     const CompositeTiles tiles) {
#ifdef UA_HOPPER
  using S = Shared<D>;
  extern __shared__ char shared_bytes[];
  auto& shared = shared_storage<S>(shared_bytes);
  const int block_rows = p.block_q / p.pool_q;
  const int warpgroup = enter_roles<Roles>([&] { shared.ring.init(Roles::kReaders); }, [&] { clear_spare_slots(p); });

  if (Roles::copies(warpgroup)) {
    if (Roles::one_copies()) {
      Ring<kStages> ring;
      for (int64_t round = 0; round * gridDim.x < tiles.count; ++round) {
        const CompositeTile tile = composite_tile(p, tiles, composite_item(round));
        if (tile.num_blocks <= 0) continue;
        const int pages = CompositeView(p, tile).pages(p, tile.num_blocks * block_rows - 1);
        const int slot = block_slot(p.cu_seqlens_k[tile.sequence], tile.sequence, p.pool_k, 0);
        const int kv_head = p.pools_heads ? tile.head : tile.head / (p.num_q_heads / p.num_kv_heads);
        for (int first = 0; first < pages; first += kPages) {
          uint64_t* full = ring.acquire(shared.ring, static_cast<int>(sizeof(shared.mean[0])) * (kSpread ? 2 : 1));
          tma_load_tiles<D>(shared.mean[ring.stage][0], sizeof(shared.mean[0][0]), maps.mean, full, kv_head,
                            slot + first);
          if (kSpread) {
            tma_load_tiles<D>(shared.var[ring.stage][0], sizeof(shared.var[0][0]), maps.var, full, kv_head,
                              slot + first);
          }
          ring.advance();
        }
      }
    }
    return;
  }

  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int row = thread / kWarp * 16 + lane / 4;  // and 8 further
  const int unit = composite_unit(p);
  const UnitWeights<T> kept(p, gridDim.x * kCompositeHopperRows,
                            int64_t{blockIdx.x} * kCompositeHopperRows + warpgroup * 64);
  float* const lse = shared.lse[warpgroup];
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const float weight = static_cast<float>(p.spread_weight) * scale;
  Ring<kStages> ring;
  for (int64_t round = 0; round * gridDim.x < tiles.count; ++round) {
    CompositeTile tile = composite_tile(p, tiles, composite_item(round));
    if (tile.num_blocks <= 0) continue;
    const CompositeView all(p, tile);
    const int pages = all.pages(p, tile.num_blocks * block_rows - 1);
    const int end_query = min(all.num_queries, (tile.first_block + tile.num_blocks) * p.block_q);
    const int own_blocks = 64 / block_rows;
    tile.first_block += warpgroup * own_blocks;
    tile.num_blocks = min(tile.num_blocks - warpgroup * own_blocks, own_blocks);
    const CompositeView view(p, tile);
    unsigned q[D / 4], squares[D / 4];
    pool_operand<T, D>(q, p, tile, end_query);
    if constexpr (kSpread) {
#pragma unroll
      for (int i = 0; i < D / 4; ++i) squares[i] = square2<T>(q[i]);
    }
    const int seen[2] = {view.pages(p, row), view.pages(p, row + 8)};
    const int all_see = view.pages(p, 0);  // rows see more and more
    const int own_pages = tile.num_blocks > 0 ? view.pages(p, tile.num_blocks * block_rows - 1) : 0;
    RowSoftmax<T> softmax[2];
    for (int first = 0; first < pages; first += kPages) {
      ring.wait(shared.ring);
      if (first < own_pages) {
        float u[kPages / 2], v[kPages / 2];
        if constexpr (kSpread) {
          wgmma_fence();
          product_abt<T, D>(u, q, shared.mean[ring.stage][0], sizeof(shared.mean[0][0]));
          product_abt<__nv_bfloat16, D>(v, squares, shared.var[ring.stage][0], sizeof(shared.var[0][0]));
          wgmma_commit();
        } else {
          wgmma_fence();
          product_abt<T, D>(u, q, shared.mean[ring.stage][0], sizeof(shared.mean[0][0]));
          wgmma_commit();
        }
        wgmma_wait<0>();
        pin(u);
        if constexpr (kSpread) pin(v);
        shared.ring.release(ring.stage);
#pragma unroll
        for (int i = 0; i < kPages / 2; ++i) {
          u[i] *= scale;
          if constexpr (kSpread) u[i] += weight * sqrt_fast(v[i]);
        }
        if (first + kPages > all_see) {
#pragma unroll
          for (int i = 0; i < kPages / 2; ++i) {
            const int page = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (page >= seen[i / 2 % 2]) u[i] = -INFINITY;
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          softmax[half].add_tile<kPages / 8>([&](int n, int c) { return u[n * 4 + half * 2 + c]; }, unit,
                                             kept.weights + (row + half * 8) * kept.units + first / unit,
                                             kept.bases + (row + half * 8) * kept.tiles + first / kPages);
        }
      } else {
        shared.ring.release(ring.stage);
      }
      ring.advance();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = softmax[half].finish();
      if (lane % 4 == 0) lse[row + half * 8] = total;
    }
    named_barrier(1 + warpgroup, kWarpgroup);  // all weights are written
    write_all_shares<kWarpgroup, kPages>(p, tile, block_rows, kept, lse, thread);
    named_barrier(1 + warpgroup, kWarpgroup);  // and read
  }
#endif
}

template <typename T, int D, bool kSpread>
cudaError_t launch(const CompositeBlocksParams& p, const Maps& maps, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = kSharedBytes<Shared<D>>;
  const auto kernel = composite_hopper<T, D, kSpread>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const CompositeTiles tiles = composite_tiles(p, kCompositeHopperRows / (p.block_q / p.pool_q));
  const int64_t most = multiprocessors;
  // At least one: slots that belong to no block are cleared in any case.
  const unsigned blocks = static_cast<unsigned>(tiles.count < 1 ? 1 : tiles.count < most ? tiles.count : most);
  kernel<<<blocks, Roles::kThreads, kBytes, stream>>>(maps, p, tiles);
  return cudaGetLastError();
}

template <typename T, int D>
cudaError_t launch(const CompositeBlocksParams& p, const Maps& maps, int multiprocessors, cudaStream_t stream) {
  return p.form == ScoreForm::kVectorSpread ? launch<T, D, true>(p, maps, multiprocessors, stream)
                                            : launch<T, D, false>(p, maps, multiprocessors, stream);
}

}  // namespace

bool composite_on_hopper(const CompositeBlocksParams& p, const DeviceFacts& device) {
  return device.runs_sm90 && (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) &&
         (p.head_dim == 64 || p.head_dim == 128) && p.total_keys > 0;
}

cudaError_t composite_blocks_hopper(const CompositeBlocksParams& p, const DeviceFacts& device, cudaStream_t stream) {
  const int vectors = composite_vectors(p.form);
  const int slots = num_block_slots(p.total_keys, p.batch, p.pool_k);
  const int64_t entry = int64_t{vectors} * p.head_dim * 2;
  Maps maps;
  const auto encode = [&](CUtensorMap& map, int vector) {
    return encode_tensor_map(map, {static_cast<const char*>(p.pages) + int64_t{vector} * p.head_dim * 2,
                                   2,
                                   {p.head_dim, p.num_kv_heads, slots},
                                   {entry, entry * p.num_kv_heads},
                                   {kTileChannels, 1, kPages},
                                   true});
  };
  cudaError_t error = encode(maps.mean, 0);
  if (error == cudaSuccess) error = encode(maps.var, vectors - 1);
  if (error != cudaSuccess) return error;
  const bool bf16 = p.dtype == DType::kBFloat16;
  const int sms = device.multiprocessors;
  if (p.head_dim == 64) {
    return bf16 ? launch<__nv_bfloat16, 64>(p, maps, sms, stream) : launch<__half, 64>(p, maps, sms, stream);
  }
  return bf16 ? launch<__nv_bfloat16, 128>(p, maps, sms, stream) : launch<__half, 128>(p, maps, sms, stream);
}

}  // namespace unique_attn
