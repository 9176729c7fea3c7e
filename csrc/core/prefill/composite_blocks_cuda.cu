// Attention between pooled queries and pages, of which only the shares of key blocks are kept. A thread block takes one
// tile of pooled queries after another: it pools them, meets all pages that they see, keeps the weight of every unit of
// pages, relative to the row's largest logit so far, and when the rows' sums are known makes them shares. So nothing is
// computed twice, and memory is what the thread blocks at work need.
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "core/prefill/composite_cuda.cuh"
#include "core/prefill/sm90/composite_hopper.h"

namespace unique_attn {
namespace {

template <typename T, int DP>
struct Config {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWide && DP > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kPages = composite_tile_pages(kWide, DP);
  static constexpr int kStride = tile_stride<T>(DP);
  static constexpr int kVarStride = tile_stride<VarianceType<T>>(DP);
  static constexpr int kSharedBytes =
      (kRows + kPages) * (kStride * static_cast<int>(sizeof(T))) +
      (kPages + (kWide ? 0 : kRows)) * (kVarStride * static_cast<int>(sizeof(VarianceType<T>))) +
      kRows * static_cast<int>(sizeof(float));
  static_assert(kRows <= kCompositeRows);
  static_assert(kSharedBytes <= 99 * 1024, "what a thread block of sm_86 and sm_89 can have");
};

// Means of pool_q queries (and of a group's heads) into the rows of a tile, zeros in the others, and their squares.
template <typename T, int DP, bool kSpread>
__device__ __forceinline__ void pool_queries(const CompositeBlocksParams& p, const CompositeTile& tile, T* q_tile,
                                             VarianceType<T>* squares) {
  using C = Config<T, DP>;
  const int group = p.pools_heads ? p.num_q_heads / p.num_kv_heads : 1;
  const int start = p.cu_seqlens_q[tile.sequence];
  const int num_queries = p.cu_seqlens_q[tile.sequence + 1] - start;
  const int first = tile.first_block * p.block_q;
  const int end = min(num_queries, first + tile.num_blocks * p.block_q);
  for (int i = threadIdx.x; i < C::kRows * (DP / 8); i += C::kThreads) {
    const int row = i / (DP / 8);
    const int d = i % (DP / 8) * 8;
    const int query = first + row * p.pool_q;
    const int count = min(end - query, p.pool_q);
    float sum[8] = {};
    if (count > 0 && d < p.head_dim) {
      const T* from = static_cast<const T*>(p.q) + (int64_t{start} + query) * p.q_stride_token +
                      int64_t{tile.head} * group * p.q_stride_head + d;
      for (int j = 0; j < count; ++j) {
        for (int g = 0; g < group; ++g) {
          Vec8<T> raw;
          float x[8];
          raw.load(from + j * p.q_stride_token + g * p.q_stride_head);
          raw.unpack(x);
#pragma unroll
          for (int c = 0; c < 8; ++c) sum[c] += x[c];
        }
      }
      const float number = static_cast<float>(count * group);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] /= number;
    }
    store8(q_tile + row * C::kStride + d, sum);
    if constexpr (kSpread && !C::kWide) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] = to_float(from_float<T>(sum[c]));
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] *= sum[c];
      store8(squares + row * C::kVarStride + d, sum);
    }
  }
}

template <typename T, int DP, bool kSpread>
__global__ void __launch_bounds__(Config<T, DP>::kThreads)
    composite_blocks_kernel(const CompositeBlocksParams p, const CompositeTiles tiles) {
  using C = Config<T, DP>;
  using V = VarianceType<T>;
  constexpr int kPages = C::kPages;
  extern __shared__ __align__(16) char shared_bytes[];
  T* const q_tile = reinterpret_cast<T*>(shared_bytes);
  T* const mean_tile = q_tile + C::kRows * C::kStride;
  V* const var_tile = reinterpret_cast<V*>(mean_tile + kPages * C::kStride);
  V* const squares = var_tile + kPages * C::kVarStride;
  float* const lse = reinterpret_cast<float*>(squares + (C::kWide ? 0 : C::kRows * C::kVarStride));

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int block_rows = p.block_q / p.pool_q;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int unit = composite_unit(p);
  const UnitWeights<T> kept(p, gridDim.x * kCompositeRows, int64_t{blockIdx.x} * kCompositeRows);
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const float weight = static_cast<float>(p.spread_weight);
  const int64_t entry = int64_t{kSpread ? 2 : 1} * p.head_dim;

  clear_spare_slots(p);
  for (int64_t round = 0; round * gridDim.x < tiles.count; ++round) {
    const CompositeTile tile = composite_tile(p, tiles, composite_item(round));
    if (tile.num_blocks <= 0) continue;
    __syncthreads();  // nobody reads the shared memory of the tile before any more
    pool_queries<T, DP, kSpread>(p, tile, q_tile, squares);

    const CompositeView view(p, tile);
    const int pages = view.pages(p, tile.num_blocks * block_rows - 1);
    const int kv_head = p.pools_heads ? tile.head : tile.head / group;
    const T* entries =
        static_cast<const T*>(p.pages) +
        (int64_t{block_slot(p.cu_seqlens_k[tile.sequence], tile.sequence, p.pool_k, 0)} * p.num_kv_heads + kv_head) *
            entry;
    const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    const int seen[2] = {view.pages(p, rows[0]), view.pages(p, rows[1])};
    RowSoftmax<T> softmax[2];

    for (int first = 0; first < pages; first += kPages) {
      __syncthreads();  // the queries are there; no warp reads the pages before any more
      load_tile<DP, C::kThreads>(mean_tile, kPages, p.head_dim, [&](int i) -> const T* {
        return first + i < pages ? entries + int64_t{first + i} * p.num_kv_heads * entry : nullptr;
      });
      if constexpr (kSpread) {
        load_tile<DP, C::kThreads>(var_tile, kPages, p.head_dim, [&](int i) -> const V* {
          return first + i < pages
                     ? reinterpret_cast<const V*>(entries + int64_t{first + i} * p.num_kv_heads * entry + p.head_dim)
                     : nullptr;
        });
      }
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      float logits[kPages / 8][4] = {};
      multiply_abt<kPages / 8>(logits, q_tile + warp * 16 * C::kStride, C::kStride, mean_tile, C::kStride, DP);
      if constexpr (kSpread) {
        float spreads[kPages / 8][4] = {};
        if constexpr (C::kWide) {
          multiply_squared_abt<kPages / 8>(spreads, q_tile + warp * 16 * C::kStride, C::kStride, var_tile,
                                           C::kVarStride, DP);
        } else {
          multiply_abt<kPages / 8>(spreads, squares + warp * 16 * C::kVarStride, C::kVarStride, var_tile, C::kVarStride,
                                   DP);
        }
#pragma unroll
        for (int n = 0; n < kPages / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) logits[n][c] += weight * sqrt_fast(spreads[n][c]);
        }
      }
#pragma unroll
      for (int n = 0; n < kPages / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int page = first + n * 8 + lane % 4 * 2 + c % 2;
          logits[n][c] = page < seen[c / 2] ? logits[n][c] * scale : -INFINITY;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        softmax[half].add_tile<kPages / 8>([&](int n, int c) { return logits[n][half * 2 + c]; }, unit,
                                           kept.weights + rows[half] * kept.units + first / unit,
                                           kept.bases + rows[half] * kept.tiles + first / kPages);
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = softmax[half].finish();
      if (lane % 4 == 0) lse[rows[half]] = total;
    }
    __syncthreads();  // all weights are written
    write_all_shares<C::kThreads, kPages>(p, tile, block_rows, kept, lse, threadIdx.x);
  }
}

template <typename T, int DP, bool kSpread>
cudaError_t launch(const CompositeBlocksParams& p, int multiprocessors, cudaStream_t stream) {
  using C = Config<T, DP>;
  const auto kernel = composite_blocks_kernel<T, DP, kSpread>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return error;
  const CompositeTiles tiles = composite_tiles(p, C::kRows / (p.block_q / p.pool_q));
  const int64_t most = int64_t{kCompositeResident} * multiprocessors;
  // At least one: slots that belong to no block are cleared in any case.
  const unsigned blocks = static_cast<unsigned>(tiles.count < 1 ? 1 : tiles.count < most ? tiles.count : most);
  kernel<<<blocks, C::kThreads, C::kSharedBytes, stream>>>(p, tiles);
  return cudaGetLastError();
}

template <typename T, int DP>
cudaError_t launch(const CompositeBlocksParams& p, int multiprocessors, cudaStream_t stream) {
  return p.form == ScoreForm::kVectorSpread ? launch<T, DP, true>(p, multiprocessors, stream)
                                            : launch<T, DP, false>(p, multiprocessors, stream);
}

}  // namespace

cudaError_t composite_blocks_cuda(const CompositeBlocksParams& params, cudaStream_t stream) {
  if (params.end_slot == params.first_slot || params.num_q_heads == 0) return cudaSuccess;
  DeviceFacts device;
  cudaError_t error = device_facts(device);
  if (error != cudaSuccess) return error;
  if (params.pools_keys) error = composite_pages_cuda(params, stream);
  if (error != cudaSuccess || params.key_blocks == 0) return error;
  if (composite_on_hopper(params, device)) return composite_blocks_hopper(params, device, stream);
  error = cudaErrorInvalidValue;
  UA_DISPATCH_CUDA_DTYPE(params.dtype, T, {
    error = params.head_dim <= 64    ? launch<T, 64>(params, device.multiprocessors, stream)
            : params.head_dim <= 128 ? launch<T, 128>(params, device.multiprocessors, stream)
                                     : launch<T, 256>(params, device.multiprocessors, stream);
  });
  return error;
}

}  // namespace unique_attn
