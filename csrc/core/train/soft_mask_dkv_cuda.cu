// dk and dv: a thread block per tile of 64 keys (whole pages), walking the query tokens that see them. Products are
// transposed, so that a warp owns 16 keys and sums over queries in registers:
//   dv = P^T grad_out;  dk = scale * dS^T q + what flows through the pages' entries
// A page's score depends on its keys through mean and spread. With ds the gradient of the score and q the arg-max
// head's query, over the S keys of the page:
//   mean         dk_j += ds q / S
//   kVectorSpread  c sqrt(sum_d q_d^2 var_d):   dk_jd += ds c q_d^2 / sqrt(v) * (k_jd - mean_d) / S
//   unique       lambda norm(q) std:          dk_jd += ds lambda norm(q) / std * (k_jd - mean_d) / S
#include "core/train/soft_mask_backward.cuh"

namespace unique_attn {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kKeys = 16 * kWarps;
static_assert(kKeys == kMaxPageSize, "a tile of keys holds whole pages");

template <typename T, int DP>
struct Config {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kRows = kWide ? (DP > 64 ? 16 : 32) : (DP > 128 ? 32 : 64);
  // Keys and values take turns in one tile, read anew for every tile of queries, where two do not fit.
  static constexpr bool kOneTile = kWide && DP > 128;
};

template <typename T, int DP>
struct Shared {
  using C = Config<T, DP>;
  T k[kKeys * tile_stride<T>(DP)];
  T v[C::kOneTile ? 8 : kKeys * tile_stride<T>(DP)];
  T q[C::kRows * tile_stride<T>(DP)];
  T grad[C::kRows * tile_stride<T>(DP)];
  PageTile<T, DP> pages;
  GateTile<C::kRows> gates;
  float lse[C::kRows], delta[C::kRows];
  float part[kWarps][4][C::kRows];  // sums of dS over the keys of a page that one warp holds
  float d_mean[kTilePages][DP];     // gradients of the pages' means
  float d_spread[kTilePages][DP];   // factor of (k - mean) / S
  float mean[kTilePages][DP];       // exact means, for the last step
  float scratch[sizeof(T) == 4 ? kWarps * 16 * C::kRows : 1];
};

template <typename T, int DP>
__global__ void __launch_bounds__(kThreads)
    soft_mask_dkv_kernel(const SoftMaskBackwardParams b, int tokens_per_tile, int first_sequence) {
  using C = Config<T, DP>;
  constexpr int kStride = tile_stride<T>(DP);
  constexpr int kTiles = C::kRows / 8;
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<T, DP>*>(shared_bytes);
  const SoftMaskForwardParams& p = b.forward;

  const Segment s = segment(p, first_sequence + blockIdx.z, blockIdx.y);
  const int first_key = blockIdx.x * kKeys;
  if (first_key >= s.length) return;
  const int page_size = p.seqs.page_size;
  const int page_shift = __ffs(page_size) - 1;
  const int first_page = first_key >> page_shift;
  const int pages_per_tile = kKeys >> page_shift;
  const auto key_row = [&](const void* x, int64_t stride_token, int64_t stride_head, int row) -> const T* {
    if (first_key + row >= s.length) return nullptr;
    return static_cast<const T*>(x) + (int64_t{s.start} + first_key + row) * stride_token + s.head * stride_head;
  };
  T* v_tile = C::kOneTile ? shared.k : shared.v;
  const auto load_keys = [&] {
    load_tile<DP, kThreads>(shared.k, kKeys, p.head_dim,
                            [&](int row) { return key_row(p.k, p.k_stride_token, p.k_stride_head, row); });
  };
  const auto load_values = [&] {
    load_tile<DP, kThreads>(v_tile, kKeys, p.head_dim,
                            [&](int row) { return key_row(p.v, p.v_stride_token, p.v_stride_head, row); });
  };
  // Where they share a tile: after all reads of the one, before any of the other.
  const auto exchange = [&](const auto& load) {
    __syncthreads();
    load();
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  };
  load_keys();
  if (!C::kOneTile) load_values();
  if (p.mode == MaskMode::kSoft) load_pages<DP, kThreads>(shared.pages, p, s, first_page);
  for (int i = threadIdx.x; i < kTilePages * DP; i += kThreads) {
    shared.d_mean[i / DP][i % DP] = 0.f;
    shared.d_spread[i / DP][i % DP] = 0.f;
  }

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int keys[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};  // rows of the accumulators
  const int pages[2] = {keys[0] >> page_shift, keys[1] >> page_shift};
  float dk[DP / 8][4] = {}, dv[DP / 8][4] = {};
  const float scale = static_cast<float>(p.scale) * kLog2e;
  float* scratch = shared.scratch + (sizeof(T) == 4 ? warp * 16 * C::kRows : 0);

  const int first_tile = first_key / tokens_per_tile;
  const int num_tiles = (s.length + tokens_per_tile - 1) / tokens_per_tile;
  for (int tile = first_tile; tile < num_tiles; ++tile) {
    const int first_token = tile * tokens_per_tile;
    const int num_tokens = min(tokens_per_tile, s.length - first_token);
    const int last_token = first_token + num_tokens - 1;
    const auto query_row = [&](const void* x, int64_t stride_token, int64_t stride_head, int row) -> const T* {
      const int token = row / s.group;
      if (token >= num_tokens) return nullptr;
      return static_cast<const T*>(x) + (int64_t{s.start} + first_token + token) * stride_token +
             (s.head * s.group + row % s.group) * stride_head;
    };
    load_tile<DP, kThreads>(shared.q, C::kRows, p.head_dim,
                            [&](int row) { return query_row(p.q, p.q_stride_token, p.q_stride_head, row); });
    load_tile<DP, kThreads>(shared.grad, C::kRows, p.head_dim, [&](int row) {
      return query_row(b.grad_out, int64_t{p.num_q_heads} * p.head_dim, p.head_dim, row);
    });
    copy_async_commit();
    for (int row = threadIdx.x; row < C::kRows; row += kThreads) {
      const int token = row / s.group;
      const int64_t at = (int64_t{s.start} + first_token + token) * p.num_q_heads + s.head * s.group + row % s.group;
      const bool valid = token < num_tokens;
      shared.lse[row] = valid ? static_cast<const float*>(p.lse)[at] * kLog2e : 0.f;
      shared.delta[row] = valid ? static_cast<const float*>(b.delta)[at] : 0.f;
    }
    copy_async_wait<0>();
    __syncthreads();

    float prob[kTiles][4] = {};
    multiply_abt<kTiles>(prob, shared.k + warp * 16 * kStride, kStride, shared.q, kStride, DP);
    const bool gated = any_gate(p, last_token, first_page, first_page + pages_per_tile);
    if (gated) {
      if (p.mode == MaskMode::kSoft && p.form == ScoreForm::kScalarSpread) {
        query_norms<DP, C::kRows, kThreads>(shared.gates, shared.q);
        __syncthreads();
      }
      compute_gates<DP, C::kRows, kThreads>(shared.gates, p, s, shared.q, shared.pages, first_token, num_tokens,
                                            first_page, pages_per_tile);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = n * 8 + lane % 4 * 2 + c % 2;
        const int token = row / s.group;
        const bool visible = token < num_tokens && first_key + keys[c / 2] <= first_token + token;
        float x = prob[n][c] * scale - shared.lse[row];
        if (gated && visible) x += shared.gates.log_gate[token * kGateStride + pages[c / 2]];
        prob[n][c] = visible ? exp2f(x) : 0.f;
      }
    }
    multiply_pb<DP / 8, kTiles>(dv, prob, shared.grad, kStride, scratch);
    float ds[kTiles][4] = {};
    if (C::kOneTile) exchange(load_values);
    multiply_abt<kTiles>(ds, v_tile + warp * 16 * kStride, kStride, shared.grad, kStride, DP);
    if (C::kOneTile) exchange(load_keys);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        ds[n][c] = prob[n][c] * (ds[n][c] - shared.delta[n * 8 + lane % 4 * 2 + c % 2]);
      }
    }

    if (gated && p.mode == MaskMode::kSoft) {
      // Sums over the keys (rows) of a page: lanes 4 apart hold neighbouring keys, the halves are 8 keys apart.
      const int pages_per_warp = max(16 >> page_shift, 1);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float low = ds[n][c], high = ds[n][c + 2];
          low += __shfl_xor_sync(kFullMask, low, 4);
          high += __shfl_xor_sync(kFullMask, high, 4);
          low += __shfl_xor_sync(kFullMask, low, 8);
          high += __shfl_xor_sync(kFullMask, high, 8);
          const int row = n * 8 + lane % 4 * 2 + c;
          if (page_size == 4) {
            if (lane / 4 % 4 == 0) {
              shared.part[warp][lane / 16][row] = low;
              shared.part[warp][2 + lane / 16][row] = high;
            }
          } else {
            low += __shfl_xor_sync(kFullMask, low, 16);
            high += __shfl_xor_sync(kFullMask, high, 16);
            if (lane / 4 == 0) {
              if (page_size == 8) {
                shared.part[warp][0][row] = low;
                shared.part[warp][1][row] = high;
              } else {
                shared.part[warp][0][row] = low + high;
              }
            }
          }
        }
      }
      __syncthreads();
      const int warps_per_page = max(page_size / 16, 1);
      score_gradients<C::kRows, kThreads>(shared.gates, s.group, num_tokens, pages_per_tile, [&](int row, int page) {
        const int first_warp = page * page_size / 16;
        float sum = 0.f;
        for (int w = 0; w < warps_per_page; ++w) sum += shared.part[first_warp + w][page % pages_per_warp][row];
        return sum;
      });
      // Each thread owns whole channels of every page, so nothing is added from two sides.
      for (int d = threadIdx.x; d < DP; d += kThreads) {
        for (int page = 0; page < pages_per_tile; ++page) {
          float mean = 0.f, spread = 0.f;
          for (int token = 0; token < num_tokens; ++token) {
            const float gradient = shared.gates.log_gate[token * kGateStride + page];
            if (gradient == 0.f) continue;
            const int row = shared.gates.best[token * kGateStride + page];
            const float x = to_float(shared.q[row * kStride + d]);
            mean += gradient * x;
            if (p.form == ScoreForm::kVectorSpread) {
              const float root = shared.gates.spread[row * kGateStride + page];
              if (root > 0.f) spread += gradient * static_cast<float>(p.spread_weight) * x * x / root;
            } else if (p.form == ScoreForm::kScalarSpread) {
              const float std = shared.pages.std[page];
              if (std > 0.f) spread += gradient * static_cast<float>(p.spread_weight) * shared.gates.q_norm[row] / std;
            }
          }
          shared.d_mean[page][d] += mean;
          shared.d_spread[page][d] += spread;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) ds[n][c] *= static_cast<float>(p.scale);
    }
    multiply_pb<DP / 8, kTiles>(dk, ds, shared.q, kStride, scratch);
    __syncthreads();  // the next round overwrites the tiles
  }

  if (p.mode == MaskMode::kSoft) {
    for (int d = threadIdx.x; d < DP; d += kThreads) {
      for (int page = 0; page < pages_per_tile; ++page) {
        float sum = 0.f;
        for (int j = 0; j < page_size; ++j) sum += to_float(shared.k[(page * page_size + j) * kStride + d]);
        shared.mean[page][d] = sum / page_size;
      }
    }
    __syncthreads();
  }
  const float per_key = 1.f / page_size;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + keys[half];
    if (key >= s.length) continue;
    const int64_t row = ((int64_t{s.start} + key) * p.num_kv_heads + s.head) * p.head_dim;
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int d = n * 8 + lane % 4 * 2 + c;
        if (d >= p.head_dim) continue;
        float gradient = dk[n][half * 2 + c];
        // An incomplete last page has no gate, and its gradients are zero.
        if (p.mode == MaskMode::kSoft) {
          const float diff = to_float(shared.k[keys[half] * kStride + d]) - shared.mean[pages[half]][d];
          gradient += (shared.d_mean[pages[half]][d] + shared.d_spread[pages[half]][d] * diff) * per_key;
        }
        static_cast<T*>(b.dk)[row + d] = from_float<T>(gradient);
        static_cast<T*>(b.dv)[row + d] = from_float<T>(dv[n][half * 2 + c]);
      }
    }
  }
}

template <typename T, int DP>
cudaError_t launch(const SoftMaskBackwardParams& b, cudaStream_t stream) {
  using C = Config<T, DP>;
  const SoftMaskForwardParams& p = b.forward;
  const int tokens_per_tile = C::kRows / (p.num_q_heads / p.num_kv_heads);
  const int tiles = (p.seqs.max_seqlen + kKeys - 1) / kKeys;
  const auto kernel = soft_mask_dkv_kernel<T, DP>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<T, DP>));
  if (error != cudaSuccess) return error;
  return launch_sequences(p.seqs.batch, [&](int first, unsigned count) {
    const dim3 grid(tiles, p.num_kv_heads, count);
    kernel<<<grid, kThreads, sizeof(Shared<T, DP>), stream>>>(b, tokens_per_tile, first);
  });
}

}  // namespace

cudaError_t soft_mask_dkv_cuda(const SoftMaskBackwardParams& params, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  const int head_dim = params.forward.head_dim;
  UA_DISPATCH_CUDA_DTYPE(params.forward.dtype, T, {
    error = head_dim <= 64    ? launch<T, 64>(params, stream)
            : head_dim <= 128 ? launch<T, 128>(params, stream)
                              : launch<T, 256>(params, stream);
  });
  return error;
}

}  // namespace unique_attn
