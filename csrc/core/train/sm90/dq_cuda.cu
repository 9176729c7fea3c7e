// dq on Hopper: a thread block per 2 x 64 rows of queries, walking tiles of 64 keys as the forward pass does.
//   dS = P * (grad_out V^T - delta);  dq = scale * dS K + W mean
// W, the gradient of the score of each token and page, belongs to the row of the arg-max head. It is also written to
// the workspace in place of the log-gates, for the pages' own gradients.
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

constexpr int kKeys = kDqKeys;
using Roles = WarpRoles<2, 40, 232>;
constexpr int kStages = 3;
constexpr int kMostPages = kKeys / 4;  // of a tile
constexpr int kSumStride = kMostPages + 2;
constexpr int kWeightStride = kMostPages + 2;

template <int D>
struct Shared {
  static constexpr int kTiles = D / kTileChannels;
  alignas(1024) char q[2][kTiles][64 * kSwizzleRow];
  alignas(1024) char grad[2][kTiles][64 * kSwizzleRow];
  alignas(1024) char k[kStages][kTiles][kKeys * kSwizzleRow];
  alignas(1024) char v[kStages][kTiles][kKeys * kSwizzleRow];
  alignas(1024) char mean[kStages][kTiles][kMostPages * kSwizzleRow];
  alignas(128) __half log_gates[kStages][2][64 * kMostPages];
  alignas(128) uint8_t best[kStages][2][64 * kBestAlign];
  alignas(8) float sums[2][64 * kSumStride];           // of dS over 8 keys (or a page of 4), per row
  alignas(8) unsigned weights[2][64 * kWeightStride];  // W / scale and the arg-max head, per token and page
  uint64_t q_full;
  StageBarriers<kStages> ring;
};

#ifdef UA_HOPPER
// 1 - 2^x for x <= 0, with relative precision near 0 too.
__device__ __forceinline__ float one_minus_exp2(float x) {
  const float y = x * kLn2;
  return y > -1e-2f ? -y * (1.f + 0.5f * y) : 1.f - exp2_fast(x);
}
#endif

template <typename T, int D, MaskMode kMode>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    soft_mask_dq_hopper(const __grid_constant__ DqMaps maps, const __grid_constant__ HopperArgs a, const float2* stats,
                        __nv_bfloat16* weights, T* dq) {
#ifdef UA_HOPPER
  using S = Shared<D>;
  extern __shared__ char shared_bytes[];
  auto& shared = shared_storage<S>(shared_bytes);
  constexpr bool kGated = kMode != MaskMode::kDense;
  constexpr bool kSoft = kMode == MaskMode::kSoft;
  const int b = a.first_sequence + static_cast<int>(blockIdx.z);
  const int head = blockIdx.y;
  const QueryTile t = query_tile(a, b, gridDim.x - 1 - blockIdx.x, 2 * a.tokens);
  if (t.first >= t.end) return;
  const int last_token = min(t.first + 2 * a.tokens, t.end) - 1;
  const int num_tiles = last_token / kKeys + 1;
  const int box = gate_box(kKeys, a.p.seqs.page_size);
  const int num_pages = mean_box(a.p.seqs.page_size);  // of a tile

  const int warpgroup = enter_roles<Roles>(
      [&] {
        barrier_init(&shared.q_full, 1);
        shared.ring.init(Roles::kReaders);
      },
      [&] {
        if (!kSoft) return;
        zero_unused_rows<kStages, S::kTiles, Roles::kThreads>(shared.mean[0][0], sizeof(shared.mean[0][0]), num_pages,
                                                              kMostPages);
        fence_async_proxy();
      });

  if (Roles::copies(warpgroup)) {
    if (Roles::one_copies()) {
      const int rows = a.group * a.tokens;
      barrier_expect(&shared.q_full, 4 * rows * D * static_cast<int>(sizeof(T)));
      for (int w = 0; w < 2; ++w) {
        const int token = t.start + t.first + w * a.tokens;
        tma_load_tiles<D>(shared.q[w][0], sizeof(shared.q[0][0]), maps.q, &shared.q_full, head * a.group, token);
        tma_load_tiles<D>(shared.grad[w][0], sizeof(shared.q[0][0]), maps.grad, &shared.q_full, head * a.group, token);
      }
      int bytes = 2 * static_cast<int>(sizeof(shared.k[0]));
      if (kGated) bytes += 2 * box * a.tokens * static_cast<int>(sizeof(__half));
      if (kSoft) bytes += 2 * kBestAlign * a.tokens + S::kTiles * num_pages * kSwizzleRow;
      const int slot = page_slot(t.start, b, a.p.seqs.page_size, 0);
      Ring<kStages> ring;
      for (int tile = num_tiles - 1; tile >= 0; --tile) {
        const int i = ring.stage;
        const int page = tile * kKeys >> a.page_shift;
        uint64_t* full = ring.acquire(shared.ring, bytes);
        tma_load_tiles<D>(shared.k[i][0], sizeof(shared.k[0][0]), maps.k, full, head, t.start + tile * kKeys);
        tma_load_tiles<D>(shared.v[i][0], sizeof(shared.v[0][0]), maps.v, full, head, t.start + tile * kKeys);
        for (int w = 0; w < 2 && kGated; ++w) {
          const int row = t.start + t.first + w * a.tokens - a.chunk.token_begin;
          tma_load(shared.log_gates[i][w], maps.log_gates, full, page & -kGateAlign, head, row);
          if (kSoft) tma_load(shared.best[i][w], maps.best, full, page & -kBestAlign, head, row);
        }
        if (kSoft) {
          tma_load_tiles<D>(shared.mean[i][0], sizeof(shared.mean[0][0]), maps.mean, full, head, slot + page);
        }
        ring.advance();
      }
    }
    return;
  }

  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int quad = lane % 4;
  const int rows[2] = {thread / kWarp * 16 + lane / 4, thread / kWarp * 16 + lane / 4 + 8};
  const int tokens[2] = {min(rows[0] / a.group, a.tokens - 1), min(rows[1] / a.group, a.tokens - 1)};
  const int first = t.first + warpgroup * a.tokens;
  const int num_tokens = max(min(a.tokens, t.end - first), 0);
  const int page_size = a.p.seqs.page_size;
  const float scale = static_cast<float>(a.p.scale) * kLog2e;
  const float per_scale = 1.f / static_cast<float>(a.p.scale);
  const float per_tau = kSoft ? 1.f / *a.p.tau : 0.f;
  const char* q = shared.q[warpgroup][0];
  const char* grad = shared.grad[warpgroup][0];
  constexpr int kQNext = sizeof(shared.q[0][0]);
  constexpr int kKeyNext = sizeof(shared.k[0][0]);
  constexpr int kMeanNext = sizeof(shared.mean[0][0]);
  float lse[2], delta[2];
  int64_t stat_rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    stat_rows[half] =
        (int64_t{t.start} + first + tokens[half]) * a.p.num_q_heads + head * a.group + rows[half] % a.group;
    const bool valid = first + tokens[half] < t.end;
    const float2 stat = valid ? stats[stat_rows[half]] : make_float2(INFINITY, 0.f);
    lse[half] = stat.x;
    delta[half] = stat.y;
  }

  // A token's rows lie in one warp if the group divides 16; else warps need each other's rows.
  const bool within_warp = 16 % a.group == 0;
  const int token_begin = within_warp ? thread / kWarp * (16 / a.group) : 0;
  const int tile_shift = __ffs(num_pages) - 1;
  const int parts = max(page_size / 8, 1);  // sums per page and row
  const int64_t weights_row =
      ((int64_t{t.start} + first - a.chunk.token_begin) * a.p.num_kv_heads + head) * a.chunk.width;
  const int item_begin = within_warp ? lane : thread;
  const int items = (within_warp ? 16 / a.group : a.tokens) * num_pages;
  const int item_step = within_warp ? kWarp : kWarpgroup;
  const auto share = [&] {
    if (within_warp) {
      __syncwarp();
    } else {
      named_barrier(1 + warpgroup, kWarpgroup);
    }
  };

  float s[kKeys / 2], dp[kKeys / 2];
  float out[D / 2] = {};
  unsigned operand[kKeys / 4] = {};
  unsigned page_operand[4] = {};
  Ring<kStages> ring;
  int previous = 0;

  barrier_wait(&shared.q_full, 0);
  ring.wait(shared.ring);
  // The tile that comes first may be the sequence's last. Slots past a sequence's pages hold anything.
  const int tail = t.length - (num_tiles - 1) * kKeys;
  if (tail < kKeys && (kSoft || has_next(a, t.start, t.length))) {
    zero_rows<S::kTiles, 2 * kWarpgroup>(shared.k[0][0], sizeof(shared.k[0][0]), tail, kKeys, threadIdx.x);
    zero_rows<S::kTiles, 2 * kWarpgroup>(shared.v[0][0], sizeof(shared.v[0][0]), tail, kKeys, threadIdx.x);
    if (kSoft) {  // of incomplete pages too, which have no gate
      zero_rows<S::kTiles, 2 * kWarpgroup>(shared.mean[0][0], sizeof(shared.mean[0][0]), tail >> a.page_shift,
                                           num_pages, threadIdx.x);
    }
    finish_zero_rows<2 * kWarpgroup>(3);
  }
  wgmma_fence();
  product_abt<T, D>(s, q, kQNext, shared.k[0][0], kKeyNext);
  product_abt<T, D>(dp, grad, kQNext, shared.v[0][0], kKeyNext);
  wgmma_commit();
  wgmma_wait<0>();
  pin(s);
  pin(dp);
  for (int tile = num_tiles - 1; tile >= 0; --tile) {
    const int first_key = tile * kKeys;
    const int stage = ring.stage;
    const int first_page = first_key >> a.page_shift;
    const __half* gates = shared.log_gates[stage][warpgroup] + (first_page & (kGateAlign - 1));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float gate[kKeys / 8] = {};
      if (kGated) load_row_gates(gate, gates + tokens[half] * box, a.page_shift, quad * 2);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int i = 4 * n + 2 * half + c;
          s[i] = exp2_fast(fmaf(s[i], scale, gate[n] - lse[half]));
        }
      }
    }
    if (first_key + kKeys - 1 > first) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if (first_key + i / 4 * 8 + quad * 2 + i % 2 > first + tokens[i / 2 % 2]) s[i] = 0.f;
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) dp[i] = s[i] * (dp[i] - delta[i / 2 % 2]);

    // The warpgroup's last token has the most candidates.
    const PageRange range = candidate_pages(first + num_tokens - 1, page_size, a.p.sink_pages, a.p.recent_pages);
    const bool differentiable = kSoft && first_page < range.end && first_page + num_pages > range.first;
    if (differentiable) {
      float* sums = shared.sums[warpgroup];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Each lane of a quad has a part of every sum: halve the sums twice while adding the partner's parts.
        float part[kKeys / 8];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) part[n] = dp[4 * n + 2 * half] + dp[4 * n + 2 * half + 1];
        float* row = sums + rows[half] * kSumStride;
        if (page_size == 4) {
#pragma unroll
          for (int n = 0; n < kKeys / 16; ++n) {
            const float give = quad % 2 == 0 ? part[n + kKeys / 16] : part[n];
            const float keep = quad % 2 == 0 ? part[n] : part[n + kKeys / 16];
            const float sum = keep + __shfl_xor_sync(kFullMask, give, 1);
            row[2 * (n + quad % 2 * (kKeys / 16)) + quad / 2] = sum;
          }
        } else {
          float half_sums[kKeys / 16];
#pragma unroll
          for (int n = 0; n < kKeys / 16; ++n) {
            const float give = quad / 2 == 0 ? part[n + kKeys / 16] : part[n];
            const float keep = quad / 2 == 0 ? part[n] : part[n + kKeys / 16];
            half_sums[n] = keep + __shfl_xor_sync(kFullMask, give, 2);
          }
          float sum[kKeys / 32];
#pragma unroll
          for (int n = 0; n < kKeys / 32; ++n) {
            const float give = quad % 2 == 0 ? half_sums[n + kKeys / 32] : half_sums[n];
            const float keep = quad % 2 == 0 ? half_sums[n] : half_sums[n + kKeys / 32];
            sum[n] = keep + __shfl_xor_sync(kFullMask, give, 1);
          }
          *reinterpret_cast<float2*>(row + quad * 2) = make_float2(sum[0], sum[1]);
        }
      }
    }
    wgmma_wait<0>();
    keep_operand(operand, a.tokens == 0, &shared.q_full);
    keep_operand(page_operand, a.tokens == 0, &shared.q_full);
    if (tile < num_tiles - 1) shared.ring.release(previous);
    pin(out);
    pin(operand);
    pack_operand<T>(operand, dp);
    pin(operand);
    ring.advance();
    if (tile > 0) {
      ring.wait(shared.ring);
      wgmma_fence();
      product_abt<T, D>(s, q, kQNext, shared.k[ring.stage][0], kKeyNext);
      product_abt<T, D>(dp, grad, kQNext, shared.v[ring.stage][0], kKeyNext);
      wgmma_commit();
    }
    wgmma_fence();
    product_ab<T, kKeys / 16>(out, operand, shared.k[stage][0], kKeyNext);
    wgmma_commit();
    if (differentiable) {
      const float* sums = shared.sums[warpgroup];
      unsigned* w = shared.weights[warpgroup];
      const uint8_t* best = shared.best[stage][warpgroup] + (first_page & (kBestAlign - 1));
      share();
      for (int i = item_begin; i < items; i += item_step) {
        const int token = token_begin + (i >> tile_shift);
        const int page = i & (num_pages - 1);
        const float* of_rows = sums + token * a.group * kSumStride + page * parts;
        float sum = 0.f;
        if (parts == 1) {
#pragma unroll 4
          for (int g = 0; g < a.group; ++g) sum += of_rows[g * kSumStride];
        } else {
          for (int g = 0; g < a.group; ++g) {
            for (int part = 0; part < parts; ++part) sum += of_rows[g * kSumStride + part];
          }
        }
        const float gradient =
            token < num_tokens ? sum * one_minus_exp2(__half2float(gates[token * box + page])) * per_tau : 0.f;
        // Gradient and head in one word.
        w[token * kWeightStride + page] =
            pack2<T>(0.f, gradient * per_scale) | static_cast<unsigned>(best[token * kBestAlign + page]);
        if (token < num_tokens && first_page + page < a.chunk.width) {
          weights[weights_row + int64_t{token} * a.p.num_kv_heads * a.chunk.width + first_page + page] =
              __float2bfloat16_rn(gradient);
        }
      }
      share();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned g = rows[half] - tokens[half] * a.group;  // no head's number in rows past the tokens
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          page_operand[part * 2 + half] = 0u;
          if (part * 8 >= num_pages) continue;
          const uint2 pair = *reinterpret_cast<const uint2*>(w + tokens[half] * kWeightStride + part * 8 + quad * 2);
          const unsigned low = (pair.x & 0xffu) == g && part * 8 + quad * 2 < num_pages ? pair.x >> 16 : 0u;
          const unsigned high =
              (pair.y & 0xffu) == g && part * 8 + quad * 2 + 1 < num_pages ? pair.y & 0xffff0000u : 0u;
          page_operand[part * 2 + half] = low | high;
        }
      }
      pin(page_operand);
      wgmma_fence();
      product_ab<T, 1>(out, page_operand, shared.mean[stage][0], kMeanNext);
      wgmma_commit();
      wgmma_wait<2>();
    } else {
      wgmma_wait<1>();
    }
    if (tile > 0) {
      pin(s);
      pin(dp);
    }
    previous = stage;
  }
  wgmma_wait<0>();
  pin(out);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (rows[half] >= a.group * a.tokens || first + tokens[half] >= t.end) continue;
    T* target = dq + stat_rows[half] * D + quad * 2;
    const float factor = static_cast<float>(a.p.scale);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<unsigned*>(target + n * 8) =
          pack2<T>(out[4 * n + 2 * half] * factor, out[4 * n + 2 * half + 1] * factor);
    }
  }
#endif
}

template <typename T, int D, MaskMode kMode>
cudaError_t launch(const HopperArgs& a, const DqMaps& maps, const float2* stats, __nv_bfloat16* weights, void* dq,
                   cudaStream_t stream) {
  return launch_roles<Roles, Shared<D>>(soft_mask_dq_hopper<T, D, kMode>, a, query_tiles(a, 2 * a.tokens), stream, maps,
                                        stats, weights, static_cast<T*>(dq));
}

}  // namespace

cudaError_t launch_dq(const HopperArgs& args, const DqMaps& maps, const float2* stats, __nv_bfloat16* weights, void* dq,
                      cudaStream_t stream) {
  UA_DISPATCH_HOPPER(args.p, T, D, {
    switch (args.p.mode) {
      case MaskMode::kDense:
        return launch<T, D, MaskMode::kDense>(args, maps, stats, weights, dq, stream);
      case MaskMode::kSoft:
        return launch<T, D, MaskMode::kSoft>(args, maps, stats, weights, dq, stream);
      case MaskMode::kHard:
        return launch<T, D, MaskMode::kHard>(args, maps, stats, weights, dq, stream);
    }
  });
  return cudaErrorInvalidValue;
}

}  // namespace unique_attn
