// Sparse attention of 16-bit inputs on tensor cores: one thread block per (sequence, query token, KV head, split of the
// selected pages). All heads of the group are the rows of one product, so that each key and value is read once, and
// copies of the next tokens run under the products of these. Two warps take 16 tokens of a tile each, with an online
// softmax of their own; they are merged at the end, the splits by combine_splits.
#include "dependent_launch.cuh"
#include "mma_tile.cuh"
#include "sparse_decode_common.cuh"

namespace unique_attn {
namespace {

constexpr int kWarps = 2;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTile = 16 * kWarps;  // tokens
constexpr int kRows = 16;           // query heads, padded
constexpr int kRoundPages = 128;    // pages whose places are looked up at once

// Where a selected page lies.
struct PagePlace {
  int64_t k, v;  // offset of its first token in the caches, in elements
  int first;     // position of its first token, INT_MAX if there is no page
};

template <typename T, int DP>
struct Shared {
  static constexpr int kStride = tile_stride<T>(DP);
  T q[kRows * kStride];
  T k[2][kTile * kStride];
  T v[2][kTile * kStride];
  PagePlace pages[kRoundPages];
  float m[kWarps][kRows], l[kWarps][kRows];
};

template <typename T, int DP>
__global__ void __launch_bounds__(kThreads) sparse_decode_mma_kernel(const SparseDecodeParams p, int pages_per_split) {
  wait_for_previous_kernel();
  using S = Shared<T, DP>;
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<S*>(shared_bytes);
  const int t = blockIdx.x % p.num_query_tokens;
  const int b = blockIdx.x / p.num_query_tokens;
  const int head = blockIdx.y;
  const int split = blockIdx.z;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int page_size = p.table.page_size;
  const int page_shift = __ffs(page_size) - 1;
  const int position = query_position(p.table.seq_lens[b], p.num_query_tokens, t);
  const int first_token = first_visible_token(position, p.window);
  const int32_t* pages = p.pages + (int64_t{blockIdx.x} * p.num_kv_heads + head) * p.k;
  const int page_begin = split * pages_per_split;
  const int page_end = position < 0 ? page_begin : min(page_begin + pages_per_split, p.k);

  constexpr int kChunks = DP / 8;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int channel = i % kChunks * 8;
    const bool valid = row < group && channel < p.head_dim;
    const T* source = static_cast<const T*>(p.q.data) + b * p.q.stride_batch + t * p.q.stride_token +
                      (head * group + (valid ? row : 0)) * p.q.stride_head + (valid ? channel : 0);
    copy_async16(shared.q + row * S::kStride + channel, source, valid);
  }

  copy_async_commit();

  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
  float acc[DP / 8][4] = {};
  bool any_visible = false;
  const float scale = static_cast<float>(p.scale) * kLog2e;

  for (int round = page_begin; round < page_end; round += kRoundPages) {
    const int num_pages = min(kRoundPages, page_end - round);
    for (int i = threadIdx.x; i < num_pages; i += kThreads) {
      const int page = pages[round + i];
      PagePlace place{0, 0, INT_MAX};
      if (page >= 0 && page * page_size <= position) {
        place.first = page * page_size;
        place.k = token_row<T>(p.k_cache, p.table, b, head, place.first);
        place.v = token_row<T>(p.v_cache, p.table, b, head, place.first);
      }
      shared.pages[i] = place;
    }
    __syncthreads();
    const int num_tokens = num_pages << page_shift;
    const int num_tiles = (num_tokens + kTile - 1) / kTile;
    // Position of a token of the round, or INT_MAX: later than any query.
    const auto position_of = [&](int token) {
      if (token >= num_tokens) return INT_MAX;
      const int first = shared.pages[token >> page_shift].first;
      return first == INT_MAX ? INT_MAX : first + (token & (page_size - 1));
    };
    // What may not be seen is not read: zeros stand in for it, and its weight is zero.
    const auto load = [&](int stage, int tile) {
      for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const int channel = i % kChunks * 8;
        const int token = tile * kTile + row;
        const int at = position_of(token);
        const bool valid = at <= position && at >= first_token && channel < p.head_dim;
        const PagePlace& place = shared.pages[valid ? token >> page_shift : 0];
        const int in_page = token & (page_size - 1);
        copy_async16(
            shared.k[stage] + row * S::kStride + channel,
            static_cast<const T*>(p.k_cache.data) + (valid ? place.k + in_page * p.k_cache.stride_token + channel : 0),
            valid);
        copy_async16(
            shared.v[stage] + row * S::kStride + channel,
            static_cast<const T*>(p.v_cache.data) + (valid ? place.v + in_page * p.v_cache.stride_token + channel : 0),
            valid);
      }
      copy_async_commit();
    };

    load(0, 0);
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int stage = tile % 2;
      if (tile + 1 < num_tiles) {
        load(stage ^ 1, tile + 1);
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncthreads();
      float s[2][4] = {};
      multiply_abt<2>(s, shared.q, S::kStride, shared.k[stage] + warp * 16 * S::kStride, S::kStride, DP);
      float top[2] = {m[0], m[1]};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = position_of(tile * kTile + warp * 16 + n * 8 + lane % 4 * 2 + c);
          const bool visible = at <= position && at >= first_token;
          any_visible = any_visible || visible;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s[n][half * 2 + c];
            x = visible ? x * scale : -INFINITY;
            top[half] = fmaxf(top[half], x);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[half] = fmaxf(top[half], __shfl_xor_sync(kFullMask, top[half], 1));
        top[half] = fmaxf(top[half], __shfl_xor_sync(kFullMask, top[half], 2));
        const float correction = softmax_weight(m[half], top[half]);
        m[half] = top[half];
        l[half] *= correction;
#pragma unroll
        for (int n = 0; n < DP / 8; ++n) {
          acc[n][half * 2] *= correction;
          acc[n][half * 2 + 1] *= correction;
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = s[n][half * 2 + c];
            x = softmax_weight(x, m[half]);
            l[half] += x;
          }
        }
      }
      multiply_pb<DP / 8, 2>(acc, s, shared.v[stage] + warp * 16 * S::kStride, S::kStride, nullptr);
      __syncthreads();  // the next copies overwrite this stage
    }
  }

  // Merge the warps; their accumulators take the place of the tiles. (Without a tile q's copies may still be running.)
  copy_async_wait<0>();
  __syncthreads();
  float* shared_acc = reinterpret_cast<float*>(shared.k);
  static_assert(sizeof(float) * kWarps * kRows * DP <= sizeof(shared.k) + sizeof(shared.v), "the tiles hold the sums");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    l[half] += __shfl_xor_sync(kFullMask, l[half], 1);
    l[half] += __shfl_xor_sync(kFullMask, l[half], 2);
    if (row >= group) continue;
    if (lane % 4 == 0) {
      shared.m[warp][row] = m[half];
      shared.l[warp][row] = l[half];
    }
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
      *reinterpret_cast<float2*>(shared_acc + (warp * kRows + row) * DP + n * 8 + lane % 4 * 2) =
          make_float2(acc[n][half * 2], acc[n][half * 2 + 1]);
    }
  }
  // A row without a visible token is 0; one whose logits are all -inf is 0 / 0 = NaN, as in any softmax.
  const bool empty = __syncthreads_or(any_visible) == 0;
  for (int i = threadIdx.x; i < group * p.head_dim; i += kThreads) {
    const int row = i / p.head_dim;
    const int d = i % p.head_dim;
    const float m_all = fmaxf(shared.m[0][row], shared.m[1][row]);
    float l_all = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = softmax_weight(shared.m[w][row], m_all);
      l_all += shared.l[w][row] * weight;
      sum += shared_acc[(w * kRows + row) * DP + d] * weight;
    }
    store_split<T>(p, int64_t{blockIdx.x} * p.num_q_heads + head * group + row, split, d, empty ? 0.f : sum / l_all,
                   (m_all + log2f(l_all)) * kLn2);
  }
}

template <typename T, int DP>
cudaError_t launch(const SparseDecodeParams& p, cudaStream_t stream) {
  const int pages_per_split = (p.k + p.num_splits - 1) / p.num_splits;
  const auto kernel = sparse_decode_mma_kernel<T, DP>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<T, DP>));
  if (error != cudaSuccess) return error;
  const dim3 grid(p.batch * p.num_query_tokens, p.num_kv_heads, p.num_splits);
  return launch_dependent(kernel, grid, kThreads, sizeof(Shared<T, DP>), stream, p, pages_per_split);
}

template <typename T>
cudaError_t launch(const SparseDecodeParams& p, cudaStream_t stream) {
  return p.head_dim <= 64    ? launch<T, 64>(p, stream)
         : p.head_dim <= 128 ? launch<T, 128>(p, stream)
                             : launch<T, 256>(p, stream);
}

}  // namespace

cudaError_t sparse_decode_mma_cuda(const SparseDecodeParams& params, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace unique_attn
