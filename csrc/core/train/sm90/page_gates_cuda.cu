// Scores of a chunk of queries on the pages of a chunk of keys, plain or as log-gates, on Hopper. Queries (tokens with
// all heads of a group as rows) stay in registers, also squared; one warp copies means and variances of 64 pages at a
// time. The maximum over the group takes the way through shared memory, so that a group may have any size.
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

constexpr int kPages = kScorePages;
constexpr int kGroups = 3;  // warpgroups that multiply: as many as registers allow, against the latency of the epilogue
using Roles = WarpRoles<kGroups, 24, 160>;
constexpr int kStages = 3;
constexpr int kStride = kPages + 4;  // against bank conflicts of the accumulators' pairs

template <int D>
struct Shared {
  static constexpr int kTiles = D / kTileChannels;
  alignas(1024) char mean[kStages][kTiles][kPages * kSwizzleRow];
  alignas(1024) char var[kStages][kTiles][kPages * kSwizzleRow];
  alignas(16) float score[kGroups][64 * kStride];
  alignas(16) float root[kGroups][64 * kStride];
  float theta[kGroups][64];
  int page_end[kGroups][64];  // candidates of a token are [sink_pages, page_end)
  StageBarriers<kStages> ring;
};

#ifdef UA_HOPPER
// log2 sigmoid(x / log2(e)). Below 2^-23 a gate's distance from 1 is lost, as in any float near 1.
__device__ __forceinline__ float log2_sigmoid(float x) {
  float tail;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(1.f + exp2_fast(-fabsf(x))));
  return fminf(x, 0.f) - tail;
}

// Rows of a 64-row operand from global memory into registers.
template <typename T, int D, typename Rows>
__device__ __forceinline__ void load_operand(unsigned (&a)[D / 4], const Rows& row_pointer) {
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* source = row_pointer(row + half * 8);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int at = step * 16 + part * 8 + lane % 4 * 2;
        a[step * 4 + part * 2 + half] = source == nullptr ? 0u : *reinterpret_cast<const unsigned*>(source + at);
      }
    }
  }
}
#endif

template <typename T, int D, ScoreOutput kOutput>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    page_gates_hopper(const __grid_constant__ ScoreMaps maps, const __grid_constant__ HopperArgs a,
                      const ScoreOutputs out) {
#ifdef UA_HOPPER
  constexpr bool kBackward = kOutput == ScoreOutput::kGatesForBackward;
  constexpr bool kScores = kOutput == ScoreOutput::kScores;
  using S = Shared<D>;
  extern __shared__ char shared_bytes[];
  auto& shared = shared_storage<S>(shared_bytes);
  const int b = a.first_sequence + static_cast<int>(blockIdx.z);
  const int head = blockIdx.y;
  const QueryTile t = query_tile(a, b, gridDim.x - 1 - blockIdx.x, kGroups * a.tokens);
  if (t.first >= t.end) return;
  // Every page that the attention kernels read: up to the last token's, or the chunk's last. Their tiles of tokens are
  // others, so that a token may share one with tokens behind this tile.
  const int last_token = min(t.first + (kGroups + 2) * a.tokens, t.end) - 1;
  const int first_page = first_chunk_page(a, t.start);
  const int num_pages = min((last_token >> a.page_shift) + 1 - first_page, a.chunk.width);
  if (num_pages <= 0) return;
  const int num_tiles = (num_pages + kPages - 1) / kPages;
  const bool spreads = a.p.form == ScoreForm::kVectorSpread;  // by a product; a scalar spread is norm(q) * std
  const bool normed = a.p.form == ScoreForm::kScalarSpread;
  const int warpgroup = enter_roles<Roles>([&] { shared.ring.init(Roles::kReaders); });

  if (Roles::copies(warpgroup)) {
    if (Roles::one_copies()) {
      Ring<kStages> ring;
      const int slot = page_slot(t.start, b, a.p.seqs.page_size, first_page);
      for (int tile = 0; tile < num_tiles; ++tile) {
        uint64_t* full = ring.acquire(shared.ring, static_cast<int>(sizeof(shared.mean[0])) * (spreads ? 2 : 1));
        tma_load_tiles<D>(shared.mean[ring.stage][0], sizeof(shared.mean[0][0]), maps.mean, full, head,
                          slot + tile * kPages);
        if (spreads) {
          tma_load_tiles<D>(shared.var[ring.stage][0], sizeof(shared.var[0][0]), maps.var, full, head,
                            slot + tile * kPages);
        }
        ring.advance();
      }
    }
    return;
  }

  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int first = t.first + warpgroup * a.tokens;
  const int num_tokens = max(min(a.tokens, t.end - first), 0);
  unsigned q[D / 4], q_squares[D / 4];
  load_operand<T, D>(q, [&](int row) -> const T* {
    const int token = row / a.group;
    if (token >= num_tokens) return nullptr;
    return static_cast<const T*>(a.p.q) + (int64_t{t.start} + first + token) * a.p.q_stride_token +
           (head * a.group + row % a.group) * a.p.q_stride_head;
  });
#pragma unroll
  for (int i = 0; i < D / 4; ++i) q_squares[i] = square2<T>(q[i]);
  float norms[2] = {0.f, 0.f};  // of this thread's two rows
  if (normed) {
#pragma unroll
    for (int i = 0; i < D / 4; ++i) {
      const float2 x = unpack2<T>(q[i]);
      norms[i % 2] = fmaf(x.x, x.x, fmaf(x.y, x.y, norms[i % 2]));
    }
#pragma unroll
    for (float& norm : norms) {
      norm += __shfl_xor_sync(kFullMask, norm, 1);
      norm += __shfl_xor_sync(kFullMask, norm, 2);
      norm = sqrtf(norm);
    }
  }
  const int first_slot = page_slot(t.start, b, a.p.seqs.page_size, first_page);
  const int num_slots = num_page_slots(a.p.seqs.total_tokens, a.p.seqs.batch, a.p.seqs.page_size);
  const auto std_of = [&](int page) {
    const int slot = min(first_slot + page, num_slots - 1);
    const uint8_t* entry = a.p.index.data + slot * a.p.index.stride_block + head * a.p.index.stride_head;
    return to_float(reinterpret_cast<const T*>(entry)[D]);
  };
  float* score = shared.score[warpgroup];
  float* root = shared.root[warpgroup];
  for (int i = thread; i < num_tokens; i += kWarpgroup) {
    const int64_t n = int64_t{t.start} + first + i;
    if (!kScores) shared.theta[warpgroup][i] = static_cast<const float*>(a.p.theta)[n * a.p.num_kv_heads + head];
    shared.page_end[warpgroup][i] =
        candidate_pages(first + i, a.p.seqs.page_size, a.p.sink_pages, a.p.recent_pages).end;
  }
  named_barrier(1 + warpgroup, kWarpgroup);
  const float per_tau = kScores ? 0.f : kLog2e / *a.p.tau;
  const float weight = static_cast<float>(a.p.spread_weight);
  const int64_t row0 = ((int64_t{t.start} + first - a.chunk.token_begin) * a.p.num_kv_heads + head) * a.chunk.width;
  const int64_t row_stride = int64_t{a.p.num_kv_heads} * a.chunk.width;

  // A token's rows lie in one warp if the group divides 16; else warps need each other's rows.
  const int warp = thread / kWarp;
  const bool within_warp = 16 % a.group == 0;
  const int token_begin = within_warp ? warp * (16 / a.group) : warp;
  const int token_end = min(within_warp ? token_begin + 16 / a.group : a.tokens, num_tokens);
  const int token_step = within_warp ? 1 : kWarpgroup / kWarp;
  const auto share = [&] {
    if (within_warp) {
      __syncwarp();
    } else {
      named_barrier(1 + warpgroup, kWarpgroup);
    }
  };

  const auto finish_tile = [&](auto known_group, int page) {
    constexpr int kGroup = decltype(known_group)::value;
    const int group = kGroup > 0 ? kGroup : a.group;
    [[maybe_unused]] const int first_of_lane = first_page + page;
#pragma unroll 4
    for (int token = token_begin; token < token_end; token += token_step) {
      const float* rows = score + token * group * kStride + lane * 2;
      float2 top = *reinterpret_cast<const float2*>(rows);
      int best[2] = {0, 0};
#pragma unroll
      for (int g = 1; g < group; ++g) {
        const float2 other = *reinterpret_cast<const float2*>(rows + g * kStride);
        // NaN wins, and the lowest head on ties.
        if (!(other.x <= top.x) && top.x == top.x) top.x = other.x, best[0] = g;
        if (!(other.y <= top.y) && top.y == top.y) top.y = other.y, best[1] = g;
      }
      const int64_t at = row0 + int64_t{token} * row_stride + page;
      if constexpr (kScores) {
        *reinterpret_cast<__nv_bfloat162*>(out.scores + at) = __floats2bfloat162_rn(top.x, top.y);
      } else {
        const float theta = shared.theta[warpgroup][token];
        // No gate where there is no boundary, whatever the score is.
        const int page_end = theta == -INFINITY ? 0 : shared.page_end[warpgroup][token];
        float2 gates = make_float2(log2_sigmoid((top.x - theta) * per_tau), log2_sigmoid((top.y - theta) * per_tau));
        if (first_of_lane < a.p.sink_pages || first_of_lane >= page_end) gates.x = 0.f;
        if (first_of_lane + 1 < a.p.sink_pages || first_of_lane + 1 >= page_end) gates.y = 0.f;
        *reinterpret_cast<__half2*>(out.log_gates + at) = __floats2half2_rn(gates.x, gates.y);
      }
      if constexpr (kBackward) {
        *reinterpret_cast<uchar2*>(out.best + at) = make_uchar2(best[0], best[1]);
        const float* roots = root + token * group * kStride + lane * 2;
        const float of[2] = {roots[best[0] * kStride], roots[best[1] * kStride + 1]};
        *reinterpret_cast<__nv_bfloat162*>(out.slopes + at) = __floats2bfloat162_rn(
            of[0] > 0.f ? __fdividef(weight, of[0]) : 0.f, of[1] > 0.f ? __fdividef(weight, of[1]) : 0.f);
      }
    }
  };

  Ring<kStages> ring;
  for (int tile = 0; tile < num_tiles; ++tile) {
    float u[kPages / 2], v[kPages / 2];
    ring.wait(shared.ring);
    // Fence and commit in the block of their products, or the compiler puts in another fence.
    if (spreads) {
      wgmma_fence();
      product_abt<T, D>(u, q, shared.mean[ring.stage][0], sizeof(shared.mean[0][0]));
      product_abt<__nv_bfloat16, D>(v, q_squares, shared.var[ring.stage][0], sizeof(shared.var[0][0]));
      wgmma_commit();
    } else {
      wgmma_fence();
      product_abt<T, D>(u, q, shared.mean[ring.stage][0], sizeof(shared.mean[0][0]));
      wgmma_commit();
    }
    wgmma_wait<0>();
    pin(u);
    pin(v);
    shared.ring.release(ring.stage);
    ring.advance();
    share();  // the scores of the tile before are used up
#pragma unroll
    for (int i = 0; i < kPages / 2; i += 2) {
      const int at = (warp * 16 + lane / 4 + i / 2 % 2 * 8) * kStride + i / 4 * 8 + lane % 4 * 2;
      float2 spread = make_float2(0.f, 0.f);
      if (spreads) spread = make_float2(sqrt_fast(v[i]), sqrt_fast(v[i + 1]));
      if (normed) {
        const int page = tile * kPages + i / 4 * 8 + lane % 4 * 2;
        spread = make_float2(norms[i / 2 % 2] * std_of(page), norms[i / 2 % 2] * std_of(page + 1));
      }
      *reinterpret_cast<float2*>(score + at) =
          make_float2(fmaf(weight, spread.x, u[i]), fmaf(weight, spread.y, u[i + 1]));
      if (kBackward) *reinterpret_cast<float2*>(root + at) = spread;
    }
    share();
    const int page = tile * kPages + lane * 2;  // this lane's two pages
    if (page >= a.chunk.width) continue;
    // Loops of known length for the usual groups.
    switch (a.group) {
      case 1:
        finish_tile(std::integral_constant<int, 1>{}, page);
        break;
      case 2:
        finish_tile(std::integral_constant<int, 2>{}, page);
        break;
      case 4:
        finish_tile(std::integral_constant<int, 4>{}, page);
        break;
      case 8:
        finish_tile(std::integral_constant<int, 8>{}, page);
        break;
      default:
        finish_tile(std::integral_constant<int, 0>{}, page);
    }
  }
#endif
}

template <typename T, int D, ScoreOutput kOutput>
cudaError_t launch(const HopperArgs& a, const ScoreMaps& maps, const ScoreOutputs& out, cudaStream_t stream) {
  return launch_roles<Roles, Shared<D>>(page_gates_hopper<T, D, kOutput>, a, query_tiles(a, kGroups * a.tokens), stream,
                                        maps, out);
}

}  // namespace

cudaError_t launch_page_gates(const HopperArgs& args, const ScoreMaps& maps, const ScoreOutputs& out, ScoreOutput which,
                              cudaStream_t stream) {
  UA_DISPATCH_HOPPER(args.p, T, D, {
    switch (which) {
      case ScoreOutput::kScores:
        return launch<T, D, ScoreOutput::kScores>(args, maps, out, stream);
      case ScoreOutput::kGates:
        return launch<T, D, ScoreOutput::kGates>(args, maps, out, stream);
      case ScoreOutput::kGatesForBackward:
        return launch<T, D, ScoreOutput::kGatesForBackward>(args, maps, out, stream);
    }
  });
  return cudaErrorInvalidValue;
}

}  // namespace unique_attn
