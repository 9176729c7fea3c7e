// What a page's score hands to its entry, on Hopper. With W the gradient of the score of each (token, page), in the row
// of the arg-max head:
//   d mean = sum W q        d spread = sum W c q^2 / root        (root = sqrt(sum_d q_d^2 var_d))
// A thread block serves 64 pages and walks the chunk's tokens 64 rows at a time, its two warpgroups in turns; products
// sum over rows. Chunks add up one after the other, so the sums do not depend on the order of thread blocks.
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

constexpr int kPages = kGradPages;
using Roles = WarpRoles<2, 40, 232>;
constexpr int kStages = 4;  // even: a stage always has the same warpgroup
constexpr int kRows = 64;

template <typename T, int D>
struct Shared {
  using Type = T;
  static constexpr int kTiles = D / kTileChannels;
  alignas(1024) char q[kStages][kTiles][kRows * kSwizzleRow];
  alignas(1024) char q_squares[kStages][kTiles][kRows * kSwizzleRow];
  alignas(128) __nv_bfloat16 weights[kStages][kRows * kPages];  // [token, page]
  alignas(128) __nv_bfloat16 slopes[kStages][kRows * kPages];
  alignas(128) uint8_t best[kStages][kRows * kPages];
  StageBarriers<kStages> ring;
  uint64_t zeroed;
};

#ifdef UA_HOPPER
// W and W c / root of a tile, transposed: pages by rows (tokens with all heads of a group), with W in the rows of the
// arg-max heads and 0 where there is no gate. kPairs: two neighbouring rows belong to one token.
template <bool kPairs, typename S>
__device__ __forceinline__ void build_operands(const HopperArgs& a, const S& shared, int stage,
                                               unsigned (&mean)[kRows / 4], unsigned (&spread)[kRows / 4], int my_page,
                                               int first_page, int first_token, int num_tokens) {
  const unsigned per_group = 65536u / a.group + 1u;
  const int offset = first_page + my_page + a.p.recent_pages;  // a candidate's own page is at least this far
#pragma unroll
  for (int pair = 0; pair < kRows / 8; ++pair) {
    const int row = pair * 8 + threadIdx.x % 4 * 2;
    float x[2][2], y[2][2];  // half of the pages, row
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (kPairs && e == 1) continue;
      const int token = (row + e) * per_group >> 16;
      const int own = token < num_tokens ? (first_token + token) >> a.page_shift : -1;
      const int head = row + e - token * a.group;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = token * kPages + my_page + half * 8;
        float w = 0.f, slope = 0.f;
        int best = -1;
        if (own >= offset + half * 8) {
          w = __bfloat162float(shared.weights[stage][at]);
          slope = __bfloat162float(shared.slopes[stage][at]);
          best = shared.best[stage][at] - head;
        }
        x[half][e] = best == 0 ? w : 0.f;
        y[half][e] = best == 0 ? w * slope : 0.f;
        if (kPairs) {
          x[half][1] = best == 1 ? w : 0.f;
          y[half][1] = best == 1 ? w * slope : 0.f;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Of every 16 rows: the first 8 for both halves of the pages, then the other 8.
      mean[pair * 2 + half] = pack2<typename S::Type>(x[half][0], x[half][1]);
      spread[pair * 2 + half] = pack2<__nv_bfloat16>(y[half][0], y[half][1]);
    }
  }
}
#endif

// grads: [num_page_slots, H, 2, D] fp32, added to.
template <typename T, int D>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    page_gradients_hopper(const __grid_constant__ PageGradMaps maps, const __grid_constant__ HopperArgs a,
                          float* grads) {
#ifdef UA_HOPPER
  using S = Shared<T, D>;
  extern __shared__ char shared_bytes[];
  auto& shared = shared_storage<S>(shared_bytes);
  const int b = a.first_sequence + static_cast<int>(blockIdx.z);
  const int head = blockIdx.y;
  const int start = a.p.seqs.cu_seqlens[b];
  const int stop = min(a.p.seqs.cu_seqlens[b + 1], a.chunk.token_end) - start;
  const int first_page = static_cast<int>(blockIdx.x) * kPages;
  if (stop <= 0) return;
  const PageRange widest = candidate_pages(stop - 1, a.p.seqs.page_size, a.p.sink_pages, a.p.recent_pages);
  if (first_page >= widest.end) return;
  // The first token whose candidates reach the block's first page.
  const int first = max((first_page + a.p.recent_pages) << a.page_shift, a.chunk.token_begin - start);
  if (first >= stop) return;
  const int num_tiles = (stop - first + a.tokens - 1) / a.tokens;
  const int used_rows = a.tokens * a.group;
  const bool spreads = a.p.form != ScoreForm::kMean;

  const int warpgroup = enter_roles<Roles>(
      [&] {
        shared.ring.init(kWarpgroup / kWarp);  // one of the warpgroups reads a stage
        barrier_init_warps(&shared.zeroed, kWarpgroup / kWarp);
      },
      [&] {
        constexpr int kNext = sizeof(shared.q[0][0]);
        zero_unused_rows<kStages, S::kTiles, Roles::kThreads>(shared.q[0][0], kNext, used_rows, kRows);
        zero_unused_rows<kStages, S::kTiles, Roles::kThreads>(shared.q_squares[0][0], kNext, used_rows, kRows);
        fence_async_proxy();
      });

  if (Roles::copies(warpgroup)) {
    if (Roles::one_copies()) {
      const int row_bytes = used_rows * D * 2;
      const int bytes = row_bytes + a.tokens * kPages * 3 + (spreads ? row_bytes + a.tokens * kPages * 2 : 0);
      Ring<kStages> ring;
      for (int tile = 0; tile < num_tiles; ++tile) {
        const int i = ring.stage;
        const int token = start + first + tile * a.tokens;
        const int row = token - a.chunk.token_begin;
        uint64_t* full = ring.acquire(shared.ring, bytes);
        tma_load_tiles<D>(shared.q[i][0], sizeof(shared.q[0][0]), maps.q, full, head * a.group, token);
        tma_load(shared.weights[i], maps.weights, full, first_page, head, row);
        tma_load(shared.best[i], maps.best, full, first_page, head, row);
        if (spreads) {
          tma_load_tiles<D>(shared.q_squares[i][0], sizeof(shared.q[0][0]), maps.q_squares, full, head * a.group, row);
          tma_load(shared.slopes[i], maps.slopes, full, first_page, head, row);
        }
        ring.advance();
      }
    }
    return;
  }

  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int my_page = thread / kWarp * 16 + lane / 4;  // and 8 further
  constexpr int kNext = sizeof(shared.q[0][0]);
  float mean[D / 2] = {}, spread[D / 2] = {};
  unsigned mean_operand[kRows / 4] = {}, spread_operand[kRows / 4] = {};
  Ring<kStages> ring;
  pin(mean);
  pin(spread);
  if (warpgroup == 1) ring.advance();
  for (int tile = warpgroup; tile < num_tiles; tile += 2) {
    const int stage = ring.stage;
    ring.wait(shared.ring);
    ring.advance();
    ring.advance();
    const int first_token = first + tile * a.tokens;
    const int num_tokens = min(a.tokens, stop - first_token);
    // The last tile, which one warpgroup has. Not by a barrier with a number: racecheck would count it for both.
    if (num_tokens < a.tokens && has_next(a, start, stop)) {
      const int end = num_tokens * a.group;
      zero_rows<S::kTiles, kWarpgroup>(shared.q[stage][0], kNext, end, used_rows, thread);
      if (spreads) zero_rows<S::kTiles, kWarpgroup>(shared.q_squares[stage][0], kNext, end, used_rows, thread);
      fence_async_proxy();
      barrier_arrive_warp(&shared.zeroed);
      barrier_wait(&shared.zeroed, 0);
    }
    if (a.group % 2 == 0) {
      build_operands<true>(a, shared, stage, mean_operand, spread_operand, my_page, first_page, first_token,
                           num_tokens);
    } else {
      build_operands<false>(a, shared, stage, mean_operand, spread_operand, my_page, first_page, first_token,
                            num_tokens);
    }
    pin(mean_operand);
    pin(spread_operand);
    // Fence and commit in the block of their products, or the compiler puts in another fence.
    if (spreads) {
      wgmma_fence();
      product_ab<T, kRows / 16>(mean, mean_operand, shared.q[stage][0], kNext);
      product_ab<__nv_bfloat16, kRows / 16>(spread, spread_operand, shared.q_squares[stage][0], kNext);
      wgmma_commit();
    } else {
      wgmma_fence();
      product_ab<T, kRows / 16>(mean, mean_operand, shared.q[stage][0], kNext);
      wgmma_commit();
    }
    wgmma_wait<0>();
    pin(mean);
    pin(spread);
    pin(mean_operand);
    pin(spread_operand);
    shared.ring.release(stage);
  }

  // Both warpgroups' sums, added in the same order every time.
  float* partial = reinterpret_cast<float*>(shared.q[0][0]);
  named_barrier(1, 2 * kWarpgroup);  // all stages are read
  if (warpgroup == 1) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      partial[i * kWarpgroup + thread] = mean[i];
      partial[(D / 2 + i) * kWarpgroup + thread] = spread[i];
    }
  }
  named_barrier(1, 2 * kWarpgroup);
  if (warpgroup == 1) return;
#pragma unroll
  for (int i = 0; i < D / 2; ++i) {
    mean[i] += partial[i * kWarpgroup + thread];
    spread[i] += partial[(D / 2 + i) * kWarpgroup + thread];
  }

  const int num_pages = (a.p.seqs.cu_seqlens[b + 1] - start) >> a.page_shift;  // complete ones
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int page = first_page + my_page + half * 8;
    if (page >= num_pages) continue;
    const int slot = page_slot(start, b, a.p.seqs.page_size, page);
    float* target = grads + (int64_t{slot} * a.p.num_kv_heads + head) * 2 * D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float2* of_mean = reinterpret_cast<float2*>(target + n * 8);
      float2* of_spread = reinterpret_cast<float2*>(target + D + n * 8);
      const float2 old_mean = *of_mean, old_spread = *of_spread;
      *of_mean = make_float2(old_mean.x + mean[4 * n + 2 * half], old_mean.y + mean[4 * n + 2 * half + 1]);
      *of_spread = make_float2(old_spread.x + spread[4 * n + 2 * half], old_spread.y + spread[4 * n + 2 * half + 1]);
    }
  }
#endif
}

constexpr int kFinishThreads = 256;

// (d mean, d spread) of a page become (a, b) of dk = a + b * k, for its keys: dk_j += (d mean + d spread (k_j - mean))
// / S with the mean of the keys themselves. One warp per page and KV head.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_page_gradients_kernel(const HopperArgs a, float* grads) {
  const int b = a.first_sequence + static_cast<int>(blockIdx.z);
  const int start = a.p.seqs.cu_seqlens[b];
  const int num_pages = (a.p.seqs.cu_seqlens[b + 1] - start) >> a.page_shift;
  const int warp = (static_cast<int>(blockIdx.x) * kFinishThreads + static_cast<int>(threadIdx.x)) / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int head = warp % a.p.num_kv_heads;
  const int page = warp / a.p.num_kv_heads;
  if (page >= num_pages) return;
  const int page_size = a.p.seqs.page_size;
  const int head_dim = a.p.head_dim;
  const T* k = static_cast<const T*>(a.p.k) + (int64_t{start} + int64_t{page} * page_size) * a.p.k_stride_token +
               head * a.p.k_stride_head;
  const int slot = page_slot(start, b, page_size, page);
  float* of_mean = grads + (int64_t{slot} * a.p.num_kv_heads + head) * 2 * head_dim;
  float* of_spread = of_mean + head_dim;
  float sum = 0.f;
  if (a.p.form == ScoreForm::kScalarSpread) {
    // One std for all channels: d spread = W weight norm(q) / std = sum_d W weight q_d^2 / root.
    for (int d = lane; d < head_dim; d += kWarp) sum += of_spread[d];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
  }
  for (int d = lane; d < head_dim; d += kWarp) {
    float mean = 0.f;
    for (int j = 0; j < page_size; ++j) mean += to_float(k[j * a.p.k_stride_token + d]);
    mean /= page_size;
    const float spread = a.p.form == ScoreForm::kScalarSpread ? sum : of_spread[d];
    of_mean[d] = (of_mean[d] - spread * mean) / page_size;
    of_spread[d] = spread / page_size;
  }
}

template <typename T, int D>
cudaError_t launch(const HopperArgs& a, const PageGradMaps& maps, float* grads, cudaStream_t stream) {
  return launch_roles<Roles, Shared<T, D>>(
      page_gradients_hopper<T, D>, a, tiles_of(a, a.p.seqs.max_seqlen, kPages << a.page_shift), stream, maps, grads);
}

}  // namespace

cudaError_t launch_page_gradients(const HopperArgs& args, const PageGradMaps& maps, float* page_grads,
                                  cudaStream_t stream) {
  UA_DISPATCH_HOPPER(args.p, T, D, return launch<T, D>(args, maps, page_grads, stream));
}

cudaError_t launch_finish_page_gradients(const HopperArgs& args, float* page_grads, cudaStream_t stream) {
  const SoftMaskForwardParams& p = args.p;
  const int64_t count = int64_t{p.seqs.max_seqlen >> args.page_shift} * p.num_kv_heads * kWarp;
  if (count == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((count + kFinishThreads - 1) / kFinishThreads);
  const auto kernel =
      p.dtype == DType::kBFloat16 ? finish_page_gradients_kernel<__nv_bfloat16> : finish_page_gradients_kernel<__half>;
  return launch_sequences(p.seqs.batch, [&](int first, unsigned sequences) {
    kernel<<<dim3(blocks, 1, sequences), kFinishThreads, 0, stream>>>(args.from_sequence(first), page_grads);
  });
}

}  // namespace unique_attn
