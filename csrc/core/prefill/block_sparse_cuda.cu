// Flash attention over the listed blocks of keys. One thread block serves a tile of queries of one query head, since
// lists may differ between heads, and walks the tiles of its listed blocks. There is one buffer for keys and one for
// values: values are copied under the product of queries and keys, the next tile's keys under the product with the
// values. At D = 128 a multiprocessor of sm_80 so holds three thread blocks, and with two buffers of each it held one.
#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/mma.cuh"
#include "core/prefill/block_sparse.h"
#include "core/prefill/sm90/block_sparse_hopper.h"

namespace unique_attn {
namespace {

template <typename T, int DP>
struct Config {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWide && DP > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * kWarps;                        // divides a query block
  static constexpr int kKeys = kWide ? (DP > 128 ? 16 : 32) : 64;  // divides a key block
  static constexpr int kStride = tile_stride<T>(DP);
  static constexpr int kScratch = kWide ? 16 * kKeys : 0;  // floats of a warp, for multiply_pb
  static constexpr int kSharedBytes = (kRows + 2 * kKeys) * kStride * sizeof(T) + kWarps * kScratch * sizeof(float);
  static_assert(kSharedBytes <= 99 * 1024, "what a thread block of sm_86 and sm_89 can have");
  // Thread blocks that registers shall leave room for, where shared memory of sm_80 does.
  static constexpr int kResident = DP <= 64 ? 4 : DP <= 128 ? (kWide ? 2 : 3) : 1;
};

// First keys of the tiles of the listed blocks, ascending, up to `last_position`. All threads of a block walk alike.
template <int kKeys>
struct ListedTiles {
  const uint32_t* words;
  int block_k;
  int end_block;  // blocks from here on are not visible
  int last_position;
  int word = -1;
  uint32_t bits = 0;  // of the word, the blocks still to come
  int key = -kKeys;

  // -1 after the last one.
  __device__ __forceinline__ int next() {
    key += kKeys;
    if ((key & (block_k - 1)) == 0) {
      while (bits == 0) {
        if (++word * kMaskBits >= end_block) return -1;
        bits = __ldg(words + word);
      }
      const int block = word * kMaskBits + __ffs(bits) - 1;
      if (block >= end_block) return -1;
      bits &= bits - 1;
      key = block * block_k;
    }
    return key <= last_position ? key : -1;
  }
};

template <typename T>
__device__ __forceinline__ void store2(T* p, float first, float second) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(p) = make_float2(first, second);
  } else {
    *reinterpret_cast<unsigned*>(p) = pack2<T>(first, second);
  }
}

template <typename T, int DP, bool kPaged>
__global__ void __launch_bounds__(Config<T, DP>::kThreads, Config<T, DP>::kResident)
    block_sparse_attention_kernel(const BlockSparseParams p, int first_sequence) {
  using C = Config<T, DP>;
  constexpr int kKeys = C::kKeys;
  extern __shared__ __align__(16) char shared_bytes[];
  T* const q_tile = reinterpret_cast<T*>(shared_bytes);
  T* const k_tile = q_tile + C::kRows * C::kStride;
  T* const v_tile = k_tile + kKeys * C::kStride;

  const int b = first_sequence + blockIdx.z;
  const int first_query = p.cu_seqlens_q[b];
  const int num_queries = p.cu_seqlens_q[b + 1] - first_query;
  // The last tiles see the most keys: start them first.
  const int first_row = (gridDim.x - 1 - blockIdx.x) * C::kRows;
  if (first_row >= num_queries) return;
  const int num_rows = min(C::kRows, num_queries - first_row);
  const int start = p.cu_seqlens_k[b];
  const int first_position = p.cu_seqlens_k[b + 1] - start - num_queries + first_row;
  const int last_position = first_position + num_rows - 1;

  const int head = blockIdx.y;
  const int kv_head = head / (p.num_q_heads / p.num_kv_heads);
  const int64_t first_token = int64_t{first_query} + first_row;
  const T* q = static_cast<const T*>(p.q) + first_token * p.q_stride_token + head * p.q_stride_head;
  const HeadKeys<T, kPaged> k(p.k, p.table, start, b, kv_head);
  const HeadKeys<T, kPaged> v(p.v, p.table, start, b, kv_head);
  // Keys that no row sees are zeros: a weight of 0 times the NaN of another sequence would be NaN.
  const auto load_keys = [&](T* tile, const HeadKeys<T, kPaged>& keys, int first_key) {
    load_tile<DP, C::kThreads>(tile, kKeys, p.head_dim, [&](int row) -> const T* {
      return first_key + row <= last_position ? keys.row(first_key + row) : nullptr;
    });
    copy_async_commit();
  };

  const int64_t slot = block_slot(first_query, b, p.block_q, first_row / p.block_q);
  const uint32_t* words = p.mask + (slot * p.num_mask_heads + mask_head(p, head)) * p.mask_words;
  ListedTiles<kKeys> tiles{words, p.block_k, visible_blocks(p, last_position), last_position};
  int first_key = tiles.next();
  if (first_key >= 0) {
    load_tile<DP, C::kThreads>(q_tile, C::kRows, p.head_dim, [&](int row) -> const T* {
      return row < num_rows ? q + row * p.q_stride_token : nullptr;
    });
    load_keys(k_tile, k, first_key);
  }

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  float* scratch = reinterpret_cast<float*>(v_tile + kKeys * C::kStride) + warp * C::kScratch;
  const float scale = static_cast<float>(p.scale) * kLog2e;
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
  float acc[DP / 8][4] = {};

  while (first_key >= 0) {
    copy_async_wait<0>();
    __syncthreads();  // the keys are there, and no warp reads the values of the tile before any more
    load_keys(v_tile, v, first_key);
    const int next_key = tiles.next();
    float logits[kKeys / 8][4] = {};
    multiply_abt<kKeys / 8>(logits, q_tile + warp * 16 * C::kStride, C::kStride, k_tile, C::kStride, DP);
    copy_async_wait<0>();
    __syncthreads();  // the values are there, and no warp reads the keys any more
    if (next_key >= 0) load_keys(k_tile, k, next_key);

#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) logits[n][c] *= scale;
    }
    if (first_key + kKeys - 1 > first_position) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = first_key + n * 8 + lane % 4 * 2 + c % 2;
          if (key > first_position + rows[c / 2]) logits[n][c] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = m[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        largest = fmaxf(largest, fmaxf(logits[n][half * 2], logits[n][half * 2 + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
      const float base = largest == -INFINITY ? 0.f : largest;  // nothing seen yet: weights of 0, not NaN
      const float correction = exp2_fast(m[half] - base);
      m[half] = largest;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int c = half * 2; c < half * 2 + 2; ++c) {
          logits[n][c] = exp2_fast(logits[n][c] - base);
          sum += logits[n][c];
        }
      }
      l[half] = l[half] * correction + sum;
#pragma unroll
      for (int n = 0; n < DP / 8; ++n) {
        acc[n][half * 2] *= correction;
        acc[n][half * 2 + 1] *= correction;
      }
    }
    multiply_pb<DP / 8, kKeys / 8>(acc, logits, v_tile, C::kStride, scratch);
    first_key = next_key;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] += __shfl_xor_sync(kFullMask, l[half], 1);
    l[half] += __shfl_xor_sync(kFullMask, l[half], 2);
    if (rows[half] >= num_rows) continue;
    const int64_t row = (first_token + rows[half]) * p.num_q_heads + head;
    T* out = static_cast<T*>(p.out) + row * p.head_dim;
    const bool empty = l[half] == 0.f;  // not for NaN; else l is at least 1, the weight of the largest logit
    const float inverse = 1.f / l[half];
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
      const int d = n * 8 + lane % 4 * 2;
      if (d >= p.head_dim) break;
      store2(out + d, empty ? 0.f : acc[n][half * 2] * inverse, empty ? 0.f : acc[n][half * 2 + 1] * inverse);
    }
    if (lane % 4 == 0) static_cast<float*>(p.lse)[row] = (m[half] + log2f(l[half])) * kLn2;
  }
}

template <typename T, int DP>
cudaError_t launch(const BlockSparseParams& p, cudaStream_t stream) {
  using C = Config<T, DP>;
  const auto kernel =
      is_paged(p.table) ? block_sparse_attention_kernel<T, DP, true> : block_sparse_attention_kernel<T, DP, false>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return error;
  const unsigned tiles = (static_cast<unsigned>(p.max_queries) + C::kRows - 1) / C::kRows;
  return launch_sequences(p.batch, [&](int first, unsigned count) {
    const dim3 grid(tiles, p.num_q_heads, count);
    kernel<<<grid, C::kThreads, C::kSharedBytes, stream>>>(p, first);
  });
}

}  // namespace

cudaError_t block_sparse_attention_cuda(const BlockSparseParams& params, cudaStream_t stream) {
  if (params.total_queries == 0 || params.max_queries == 0 || params.num_q_heads == 0) return cudaSuccess;
  DeviceFacts device;
  cudaError_t error = device_facts(device);
  if (error != cudaSuccess) return error;
  if (block_sparse_on_hopper(params, device)) return block_sparse_attention_hopper(params, device, stream);
  error = cudaErrorInvalidValue;
  UA_DISPATCH_CUDA_DTYPE(params.dtype, T, {
    error = params.head_dim <= 64    ? launch<T, 64>(params, stream)
            : params.head_dim <= 128 ? launch<T, 128>(params, stream)
                                     : launch<T, 256>(params, stream);
  });
  return error;
}

}  // namespace unique_attn
