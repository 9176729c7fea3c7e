// Flash attention with a gate per page. One thread block serves a tile of query tokens with all heads of a group as
// rows (so that a page's score can take its maximum over the group inside the block) and walks the keys in tiles:
// logits and page scores by matrix products, gates added to the logits, online softmax, weighted values. Copies of the
// next tile run under the products of this one.
#include "core/train/sm90/plan.h"
#include "core/train/soft_mask_tile.cuh"

namespace unique_attn {
namespace {

template <typename T, int DP>
struct Config {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWide || DP > 128 ? 4 : 8;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = kWide ? (DP > 128 ? 16 : 32) : (DP > 128 ? 32 : 64);
};

template <typename T, int DP>
struct Shared {
  using C = Config<T, DP>;
  T q[C::kRows * tile_stride<T>(DP)];
  T k[2][C::kKeys * tile_stride<T>(DP)];
  T v[2][C::kKeys * tile_stride<T>(DP)];
  PageTile<T, DP> pages[2];
  GateTile<C::kRows> gates;
  float scratch[sizeof(T) == 4 ? C::kWarps * 16 * C::kKeys : 1];
};

template <typename T, int DP>
__global__ void __launch_bounds__(Config<T, DP>::kWarps* kWarp)
    soft_mask_forward_kernel(const SoftMaskForwardParams p, int tokens_per_tile, int first_sequence) {
  using C = Config<T, DP>;
  constexpr int kThreads = C::kWarps * kWarp;
  constexpr int kStride = tile_stride<T>(DP);
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<T, DP>*>(shared_bytes);

  const Segment s = segment(p, first_sequence + blockIdx.z, blockIdx.y);
  // The last tiles see the most keys: start them first.
  const int first_token = (gridDim.x - 1 - blockIdx.x) * tokens_per_tile;
  if (first_token >= s.length) return;
  const int num_tokens = min(tokens_per_tile, s.length - first_token);
  const int last_token = first_token + num_tokens - 1;

  const T* q = static_cast<const T*>(p.q);
  const T* k = static_cast<const T*>(p.k) + s.head * p.k_stride_head;
  const T* v = static_cast<const T*>(p.v) + s.head * p.v_stride_head;
  load_tile<DP, kThreads>(shared.q, C::kRows, p.head_dim, [&](int row) -> const T* {
    const int token = row / s.group;
    if (token >= num_tokens) return nullptr;
    return q + (int64_t{s.start} + first_token + token) * p.q_stride_token +
           (s.head * s.group + row % s.group) * p.q_stride_head;
  });
  const auto load_keys = [&](int stage, int first_key) {
    load_tile<DP, kThreads>(shared.k[stage], C::kKeys, p.head_dim, [&](int row) -> const T* {
      return first_key + row < s.length ? k + (int64_t{s.start} + first_key + row) * p.k_stride_token : nullptr;
    });
    load_tile<DP, kThreads>(shared.v[stage], C::kKeys, p.head_dim, [&](int row) -> const T* {
      return first_key + row < s.length ? v + (int64_t{s.start} + first_key + row) * p.v_stride_token : nullptr;
    });
    if (p.mode == MaskMode::kSoft) {
      load_pages<DP, kThreads>(shared.pages[stage], p, s, first_key / p.seqs.page_size);
    }
    copy_async_commit();
  };
  load_keys(0, 0);

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const int tokens[2] = {rows[0] / s.group, rows[1] / s.group};
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
  float acc[DP / 8][4] = {};
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const int page_shift = __ffs(p.seqs.page_size) - 1;
  const int pages_per_tile = max(C::kKeys >> page_shift, 1);
  float* scratch = shared.scratch + (sizeof(T) == 4 ? warp * 16 * C::kKeys : 0);

  const int num_key_tiles = last_token / C::kKeys + 1;
  for (int tile = 0; tile < num_key_tiles; ++tile) {
    const int stage = tile % 2;
    const int first_key = tile * C::kKeys;
    const int first_page = first_key >> page_shift;
    if (tile + 1 < num_key_tiles) {
      load_keys(stage ^ 1, first_key + C::kKeys);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    if (tile == 0 && p.form == ScoreForm::kScalarSpread && p.mode == MaskMode::kSoft) {
      query_norms<DP, C::kRows, kThreads>(shared.gates, shared.q);
      __syncthreads();
    }

    float logits[C::kKeys / 8][4] = {};
    multiply_abt<C::kKeys / 8>(logits, shared.q + warp * 16 * kStride, kStride, shared.k[stage], kStride, DP);
    const bool gated = any_gate(p, first_token + num_tokens - 1, first_page, first_page + pages_per_tile);
    if (gated) {
      compute_gates<DP, C::kRows, kThreads>(shared.gates, p, s, shared.q, shared.pages[stage], first_token, num_tokens,
                                            first_page, pages_per_tile);
    }
    float m_new[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int half = c / 2;
        const int key = n * 8 + lane % 4 * 2 + c % 2;
        const bool visible = first_key + key <= first_token + tokens[half] && tokens[half] < num_tokens;
        float x = logits[n][c] * scale;
        if (gated && visible) x += shared.gates.log_gate[tokens[half] * kGateStride + (key >> page_shift)];
        logits[n][c] = visible ? x : -INFINITY;
        m_new[half] = fmaxf(m_new[half], logits[n][c]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m_new[half] = fmaxf(m_new[half], __shfl_xor_sync(kFullMask, m_new[half], 1));
      m_new[half] = fmaxf(m_new[half], __shfl_xor_sync(kFullMask, m_new[half], 2));
      const float correction = m[half] == -INFINITY ? 0.f : exp2f(m[half] - m_new[half]);
      m[half] = m_new[half];
      l[half] *= correction;
#pragma unroll
      for (int n = 0; n < DP / 8; ++n) {
        acc[n][half * 2] *= correction;
        acc[n][half * 2 + 1] *= correction;
      }
    }
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float x = logits[n][c];
        logits[n][c] = x == -INFINITY ? 0.f : exp2f(x - m[c / 2]);
        l[c / 2] += logits[n][c];
      }
    }
    multiply_pb<DP / 8, C::kKeys / 8>(acc, logits, shared.v[stage], kStride, scratch);
    __syncthreads();  // the next round overwrites this stage and the gates
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] += __shfl_xor_sync(kFullMask, l[half], 1);
    l[half] += __shfl_xor_sync(kFullMask, l[half], 2);
    if (tokens[half] >= num_tokens) continue;
    const int64_t row =
        (int64_t{s.start} + first_token + tokens[half]) * p.num_q_heads + s.head * s.group + rows[half] % s.group;
    T* out = static_cast<T*>(p.out) + row * p.head_dim;
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
      const int d = n * 8 + lane % 4 * 2;
      if (d < p.head_dim) {
        out[d] = from_float<T>(acc[n][half * 2] / l[half]);
        out[d + 1] = from_float<T>(acc[n][half * 2 + 1] / l[half]);
      }
    }
    if (lane % 4 == 0) static_cast<float*>(p.lse)[row] = (m[half] + log2f(l[half])) * kLn2;
  }
}

template <typename T, int DP>
cudaError_t launch(const SoftMaskForwardParams& p, cudaStream_t stream) {
  using C = Config<T, DP>;
  const int tokens_per_tile = C::kRows / (p.num_q_heads / p.num_kv_heads);
  const int tiles = (p.seqs.max_seqlen + tokens_per_tile - 1) / tokens_per_tile;
  const auto kernel = soft_mask_forward_kernel<T, DP>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<T, DP>));
  if (error != cudaSuccess) return error;
  return launch_sequences(p.seqs.batch, [&](int first, unsigned count) {
    const dim3 grid(tiles, p.num_kv_heads, count);
    kernel<<<grid, C::kWarps * kWarp, sizeof(Shared<T, DP>), stream>>>(p, tokens_per_tile, first);
  });
}

}  // namespace

cudaError_t soft_mask_forward_cuda(const SoftMaskForwardParams& params, cudaStream_t stream) {
  if (params.seqs.total_tokens == 0 || params.num_kv_heads == 0) return cudaSuccess;
  DeviceFacts device;
  cudaError_t error = device_facts(device);
  if (error != cudaSuccess) return error;
  const HopperPlan plan = plan_soft_mask(params, false, device);
  if (plan.use) return soft_mask_forward_hopper(params, plan, stream);
  error = cudaErrorInvalidValue;
  UA_DISPATCH_CUDA_DTYPE(params.dtype, T, {
    error = params.head_dim <= 64    ? launch<T, 64>(params, stream)
            : params.head_dim <= 128 ? launch<T, 128>(params, stream)
                                     : launch<T, 256>(params, stream);
  });
  return error;
}

}  // namespace unique_attn
