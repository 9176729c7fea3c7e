// dq: a thread block per tile of query tokens, walking the keys as the forward pass does.
//   dS = P * (grad_out V^T - delta);  dq = scale * dS K + W mean
// where W holds, for each token and page, the gradient of the page's score in the row of the arg-max head. The query
// factor of the spread is a constant, so the spread gives dq nothing.
#include "core/train/soft_mask_backward.cuh"

namespace unique_attn {
namespace {

template <typename T, int DP>
struct Config {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWide && DP > 128 ? 2 : 4;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = kWide ? (DP > 128 ? 16 : 32) : (DP > 128 ? 32 : 64);
};

template <typename T, int DP>
struct Shared {
  using C = Config<T, DP>;
  T q[C::kRows * tile_stride<T>(DP)];
  T grad[C::kRows * tile_stride<T>(DP)];
  T k[C::kKeys * tile_stride<T>(DP)];
  T v[C::kKeys * tile_stride<T>(DP)];
  PageTile<T, DP> pages;
  GateTile<C::kRows> gates;
  float scratch[sizeof(T) == 4 ? C::kWarps * 16 * C::kKeys : 1];
};

template <typename T, int DP>
__global__ void __launch_bounds__(Config<T, DP>::kWarps* kWarp)
    soft_mask_dq_kernel(const SoftMaskBackwardParams b, int tokens_per_tile, int first_sequence) {
  using C = Config<T, DP>;
  constexpr int kThreads = C::kWarps * kWarp;
  constexpr int kStride = tile_stride<T>(DP);
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<T, DP>*>(shared_bytes);
  const SoftMaskForwardParams& p = b.forward;

  const Segment s = segment(p, first_sequence + blockIdx.z, blockIdx.y);
  const int first_token = (gridDim.x - 1 - blockIdx.x) * tokens_per_tile;
  if (first_token >= s.length) return;
  const int num_tokens = min(tokens_per_tile, s.length - first_token);
  const int last_token = first_token + num_tokens - 1;

  // Row `row` of a [N, Hq, D] tensor's tile.
  const auto query_row = [&](const T* x, int64_t stride_token, int64_t stride_head, int row) -> const T* {
    const int token = row / s.group;
    if (token >= num_tokens) return nullptr;
    return x + (int64_t{s.start} + first_token + token) * stride_token +
           (s.head * s.group + row % s.group) * stride_head;
  };
  load_tile<DP, kThreads>(shared.q, C::kRows, p.head_dim, [&](int row) {
    return query_row(static_cast<const T*>(p.q), p.q_stride_token, p.q_stride_head, row);
  });
  load_tile<DP, kThreads>(shared.grad, C::kRows, p.head_dim, [&](int row) {
    return query_row(static_cast<const T*>(b.grad_out), int64_t{p.num_q_heads} * p.head_dim, p.head_dim, row);
  });
  const T* k = static_cast<const T*>(p.k) + s.head * p.k_stride_head;
  const T* v = static_cast<const T*>(p.v) + s.head * p.v_stride_head;

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const int tokens[2] = {rows[0] / s.group, rows[1] / s.group};
  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row =
        (int64_t{s.start} + first_token + tokens[half]) * p.num_q_heads + s.head * s.group + rows[half] % s.group;
    const bool valid = tokens[half] < num_tokens;
    lse[half] = valid ? static_cast<const float*>(p.lse)[row] * kLog2e : 0.f;
    delta[half] = valid ? static_cast<const float*>(b.delta)[row] : 0.f;
  }
  float acc[DP / 8][4] = {};
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const int page_shift = __ffs(p.seqs.page_size) - 1;
  const int pages_per_tile = max(C::kKeys >> page_shift, 1);
  float* scratch = shared.scratch + (sizeof(T) == 4 ? warp * 16 * C::kKeys : 0);

  const int num_key_tiles = last_token / C::kKeys + 1;
  for (int tile = 0; tile < num_key_tiles; ++tile) {
    const int first_key = tile * C::kKeys;
    const int first_page = first_key >> page_shift;
    const auto key_row = [&](const T* x, int64_t stride, int row) -> const T* {
      return first_key + row < s.length ? x + (int64_t{s.start} + first_key + row) * stride : nullptr;
    };
    load_tile<DP, kThreads>(shared.k, C::kKeys, p.head_dim, [&](int row) { return key_row(k, p.k_stride_token, row); });
    load_tile<DP, kThreads>(shared.v, C::kKeys, p.head_dim, [&](int row) { return key_row(v, p.v_stride_token, row); });
    const bool gated = any_gate(p, last_token, first_page, first_page + pages_per_tile);
    const bool differentiable = gated && p.mode == MaskMode::kSoft;
    if (differentiable) load_pages<DP, kThreads>(shared.pages, p, s, first_page);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (tile == 0 && p.form == ScoreForm::kScalarSpread && p.mode == MaskMode::kSoft) {
      query_norms<DP, C::kRows, kThreads>(shared.gates, shared.q);
      __syncthreads();
    }

    float prob[C::kKeys / 8][4] = {};
    multiply_abt<C::kKeys / 8>(prob, shared.q + warp * 16 * kStride, kStride, shared.k, kStride, DP);
    if (gated) {
      compute_gates<DP, C::kRows, kThreads>(shared.gates, p, s, shared.q, shared.pages, first_token, num_tokens,
                                            first_page, pages_per_tile);
    }
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int half = c / 2;
        const int key = n * 8 + lane % 4 * 2 + c % 2;
        const bool visible = first_key + key <= first_token + tokens[half] && tokens[half] < num_tokens;
        float x = prob[n][c] * scale - lse[half];
        if (gated && visible) x += shared.gates.log_gate[tokens[half] * kGateStride + (key >> page_shift)];
        prob[n][c] = visible ? exp2f(x) : 0.f;
      }
    }
    float dp[C::kKeys / 8][4] = {};
    multiply_abt<C::kKeys / 8>(dp, shared.grad + warp * 16 * kStride, kStride, shared.v, kStride, DP);
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) dp[n][c] = prob[n][c] * (dp[n][c] - delta[c / 2]);
    }

    if (differentiable) {
      // Sums of dS over the keys of each page, per row, into gates.score.
      __syncthreads();  // all have read the gates and scores
      for (int i = threadIdx.x; i < C::kRows * kGateStride; i += kThreads) shared.gates.score[i] = 0.f;
      __syncthreads();
      // Of every 8 columns a quad of lanes holds two each; columns 4 apart are in different pages if a page has 4 keys.
      const int keys_per_group = min(p.seqs.page_size, 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float run = 0.f;
#pragma unroll
        for (int n = 0; n < C::kKeys / 8; ++n) {
          float sum = dp[n][half * 2] + dp[n][half * 2 + 1];
          sum += __shfl_xor_sync(kFullMask, sum, 1);
          if (keys_per_group == 8) sum += __shfl_xor_sync(kFullMask, sum, 2);
          if (keys_per_group == 4) {
            if (lane % 2 == 0) shared.gates.score[rows[half] * kGateStride + n * 2 + lane % 4 / 2] = sum;
          } else {
            run += sum;
            const bool page_ends = (n + 1) * 8 % p.seqs.page_size == 0 || n + 1 == C::kKeys / 8;
            if (page_ends) {
              if (lane % 4 == 0) shared.gates.score[rows[half] * kGateStride + (n * 8 >> page_shift)] = run;
              run = 0.f;
            }
          }
        }
      }
      __syncthreads();
      score_gradients<C::kRows, kThreads>(shared.gates, s.group, num_tokens, pages_per_tile, [&](int row, int page) {
        return shared.gates.score[row * kGateStride + page];
      });
      // W in accumulator layout: the row of the arg-max head has the gradient, the others zero.
      float w[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int half = c / 2;
          const int page = n * 8 + lane % 4 * 2 + c % 2;
          const int at = tokens[half] * kGateStride + page;
          const bool mine = page < pages_per_tile && tokens[half] < num_tokens && shared.gates.best[at] == rows[half];
          w[n][c] = mine ? shared.gates.log_gate[at] : 0.f;
        }
      }
      multiply_pb<DP / 8, 2>(acc, w, shared.pages.mean, kStride, scratch);
    }
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) dp[n][c] *= static_cast<float>(p.scale);
    }
    multiply_pb<DP / 8, C::kKeys / 8>(acc, dp, shared.k, kStride, scratch);
    __syncthreads();  // the next round overwrites the tiles
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (tokens[half] >= num_tokens) continue;
    const int64_t row =
        (int64_t{s.start} + first_token + tokens[half]) * p.num_q_heads + s.head * s.group + rows[half] % s.group;
    T* dq = static_cast<T*>(b.dq) + row * p.head_dim;
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
      const int d = n * 8 + lane % 4 * 2;
      if (d < p.head_dim) {
        dq[d] = from_float<T>(acc[n][half * 2]);
        dq[d + 1] = from_float<T>(acc[n][half * 2 + 1]);
      }
    }
  }
}

template <typename T, int DP>
cudaError_t launch(const SoftMaskBackwardParams& b, cudaStream_t stream) {
  using C = Config<T, DP>;
  const SoftMaskForwardParams& p = b.forward;
  const int tokens_per_tile = C::kRows / (p.num_q_heads / p.num_kv_heads);
  const int tiles = (p.seqs.max_seqlen + tokens_per_tile - 1) / tokens_per_tile;
  const auto kernel = soft_mask_dq_kernel<T, DP>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<T, DP>));
  if (error != cudaSuccess) return error;
  return launch_sequences(p.seqs.batch, [&](int first, unsigned count) {
    const dim3 grid(tiles, p.num_kv_heads, count);
    kernel<<<grid, C::kWarps * kWarp, sizeof(Shared<T, DP>), stream>>>(b, tokens_per_tile, first);
  });
}

}  // namespace

cudaError_t soft_mask_dq_cuda(const SoftMaskBackwardParams& params, cudaStream_t stream) {
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
