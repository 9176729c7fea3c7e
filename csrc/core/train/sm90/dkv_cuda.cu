// dk and dv on Hopper: a thread block per 2 x 64 keys, walking the tokens that see them, 64 rows (tokens with all heads
// of a group) at a time. Products are transposed, so that P and dS are operands in registers:
//   dv = P^T grad_out;  dk = scale * dS^T q + a + b * k, where a and b are what the page's entry hands to its keys
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

using Roles = WarpRoles<2, 24, 240>;
constexpr int kStages = 3;
constexpr int kRows = 64;
constexpr int kMaxGates = kRows * kDkvKeys / 4;

template <int D>
struct Shared {
  static constexpr int kTiles = D / kTileChannels;
  alignas(1024) char k[2][kTiles][64 * kSwizzleRow];
  alignas(1024) char v[2][kTiles][64 * kSwizzleRow];
  alignas(1024) char q[kStages][kTiles][kRows * kSwizzleRow];
  alignas(1024) char grad[kStages][kTiles][kRows * kSwizzleRow];
  alignas(128) __half log_gates[kStages][kMaxGates];
  alignas(16) float2 stats[kStages][kRows];
  uint64_t keys_full;
  StageBarriers<kStages> ring;
};

#ifdef UA_HOPPER
// Log-gates of one token for the pages of a thread's two keys, which are 8 apart.
__device__ __forceinline__ float2 load_gates(const __half* of_token, const int (&pages)[2], int page_size) {
  // With pages of 8 keys they are neighbours, the first one even.
  if (page_size == 8) return __half22float2(*reinterpret_cast<const __half2*>(of_token + pages[0]));
  return make_float2(__half2float(of_token[pages[0]]), __half2float(of_token[pages[1]]));
}
#endif

template <typename T, int D, bool kGated>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    soft_mask_dkv_hopper(const __grid_constant__ DkvMaps maps, const __grid_constant__ HopperArgs a,
                         const float2* stats, const float* page_grads, T* dk, T* dv) {
#ifdef UA_HOPPER
  using S = Shared<D>;
  extern __shared__ char shared_bytes[];
  auto& shared = shared_storage<S>(shared_bytes);
  const int b = a.first_sequence + static_cast<int>(blockIdx.z);
  const int head = blockIdx.y;
  const int start = a.p.seqs.cu_seqlens[b];
  const int length = a.p.seqs.cu_seqlens[b + 1] - start;
  const int first_tile = first_key_tile(a.chunk, start, kDkvKeys);
  const int first_key = (first_tile + static_cast<int>(blockIdx.x)) * kDkvKeys;
  if (first_key >= length || start + first_key >= a.chunk.key_end) return;
  // No token before the first key sees any of them.
  const int num_tiles = (length - first_key + a.tokens - 1) / a.tokens;
  const int box = gate_box(kDkvKeys, a.p.seqs.page_size);
  const int used_rows = a.tokens * a.group;

  const int warpgroup = enter_roles<Roles>(
      [&] {
        barrier_init(&shared.keys_full, 1);
        shared.ring.init(Roles::kReaders, 1 + kWarp);
      },
      [&] {
        constexpr int kNext = sizeof(shared.q[0][0]);
        zero_unused_rows<kStages, S::kTiles, Roles::kThreads>(shared.q[0][0], kNext, used_rows, kRows);
        zero_unused_rows<kStages, S::kTiles, Roles::kThreads>(shared.grad[0][0], kNext, used_rows, kRows);
        for (int i = threadIdx.x; i < kStages * kMaxGates / 2 && used_rows < kRows; i += Roles::kThreads) {
          reinterpret_cast<unsigned*>(shared.log_gates)[i] = 0u;
        }
        fence_async_proxy();
      });

  if (Roles::copies(warpgroup)) {
    const int lane = threadIdx.x - 2 * kWarpgroup;
    if (lane >= kWarp) return;
    if (lane == 0) {
      barrier_expect(&shared.keys_full, 2 * static_cast<int>(sizeof(shared.k)));
      for (int w = 0; w < 2; ++w) {
        const int key = start + first_key + w * 64;
        tma_load_tiles<D>(shared.k[w][0], sizeof(shared.k[0][0]), maps.k, &shared.keys_full, head, key);
        tma_load_tiles<D>(shared.v[w][0], sizeof(shared.v[0][0]), maps.v, &shared.keys_full, head, key);
      }
    }
    int bytes = 2 * used_rows * D * static_cast<int>(sizeof(T));
    if (kGated) bytes += box * a.tokens * static_cast<int>(sizeof(__half));
    const int page = static_cast<int>(blockIdx.x) * kDkvKeys >> a.page_shift;
    Ring<kStages> ring;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int i = ring.stage;
      const int token = start + first_key + tile * a.tokens;
      float2 row_stats[kRows / kWarp];  // read while the buffer is still in use; rows of no token have probability 0
#pragma unroll
      for (int r = 0; r < kRows / kWarp; ++r) {
        const int row = r * kWarp + lane;
        const int n = token + row / a.group;
        row_stats[r] = row < used_rows && n < start + length
                           ? stats[int64_t{n} * a.p.num_q_heads + head * a.group + row % a.group]
                           : make_float2(INFINITY, 0.f);
      }
      ring.wait_free(shared.ring);
      uint64_t* full = &shared.ring.full[i];
      if (lane == 0) {
        barrier_expect(full, bytes);
        tma_load_tiles<D>(shared.q[i][0], sizeof(shared.q[0][0]), maps.q, full, head * a.group, token);
        tma_load_tiles<D>(shared.grad[i][0], sizeof(shared.q[0][0]), maps.grad, full, head * a.group, token);
        if (kGated) tma_load(shared.log_gates[i], maps.log_gates, full, page & -kGateAlign, head, token);
      }
#pragma unroll
      for (int r = 0; r < kRows / kWarp; ++r) shared.stats[i][r * kWarp + lane] = row_stats[r];
      barrier_arrive(full);
      ring.advance();
    }
    return;
  }

  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int my_keys = warpgroup * 64 + thread / kWarp * 16 + lane / 4;  // and 8 further, from first_key on
  const int pages[2] = {my_keys >> a.page_shift, (my_keys + 8) >> a.page_shift};
  const int gate_offset = (static_cast<int>(blockIdx.x) * kDkvKeys >> a.page_shift) & (kGateAlign - 1);
  const int page_size = a.p.seqs.page_size;
  const bool odd_group = a.group % 2 != 0;  // else rows 2 i and 2 i + 1 are of one token
  const int column = lane % 4 * 2;
  const float scale = static_cast<float>(a.p.scale) * kLog2e;
  const unsigned per_group = 65536u / a.group + 1u;  // row / group = row * per_group >> 16 for 64 rows
  const char* k = shared.k[warpgroup][0];
  const char* v = shared.v[warpgroup][0];
  constexpr int kNext = sizeof(shared.k[0][0]);

  // Two phases per tile, each one wait: while one warpgroup computes, the other multiplies.
  float x[kRows / 2];  // logits, then dP
  float k_grad[D / 2] = {}, v_grad[D / 2] = {};
  unsigned p_operand[kRows / 4] = {}, ds_operand[kRows / 4] = {};
  Ring<kStages> ring;

  barrier_wait(&shared.keys_full, 0);
  ring.wait(shared.ring);
  pin(k_grad);
  pin(v_grad);
  wgmma_fence();
  product_abt<T, D>(x, k, kNext, shared.q[0][0], kNext);
  wgmma_commit();
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = ring.stage;
    const int first_token = first_key + tile * a.tokens;
    const __half* gates = shared.log_gates[stage] + gate_offset;
    const float2* row_stats = shared.stats[stage];
    ring.advance();
    wgmma_wait<0>();
    pin(x);
    pin(k_grad);
    pin(ds_operand);
    // The product before read the stage before for the last time.
    if (tile > 0) shared.ring.release(stage == 0 ? kStages - 1 : stage - 1);
    // The sequence's last tile. Of the product with its queries that is done, rows past the end are not used.
    const bool ends = first_token + a.tokens > length;
    if (ends && has_next(a, start, length)) {
      const int first = (length - first_token) * a.group;
      zero_rows<S::kTiles, 2 * kWarpgroup>(shared.q[stage][0], kNext, first, used_rows, threadIdx.x);
      zero_rows<S::kTiles, 2 * kWarpgroup>(shared.grad[stage][0], kNext, first, used_rows, threadIdx.x);
      finish_zero_rows<2 * kWarpgroup>(1);
    }
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const float4 stat = *reinterpret_cast<const float4*>(row_stats + n * 8 + column);  // of two rows
      float2 low = make_float2(-stat.x, -stat.x), high = make_float2(-stat.z, -stat.z);
      if (kGated) {
        const __half* of_row = gates + ((n * 8 + column) * per_group >> 16) * box;
        const float2 gate = load_gates(of_row, pages, page_size);
        low.x += gate.x;
        low.y += gate.y;
        if (odd_group) {
          const float2 other = load_gates(gates + ((n * 8 + column + 1) * per_group >> 16) * box, pages, page_size);
          high.x += other.x;
          high.y += other.y;
        } else {
          high.x += gate.x;
          high.y += gate.y;
        }
      }
      x[4 * n] = exp2_fast(fmaf(x[4 * n], scale, low.x));
      x[4 * n + 1] = exp2_fast(fmaf(x[4 * n + 1], scale, high.x));
      x[4 * n + 2] = exp2_fast(fmaf(x[4 * n + 2], scale, low.y));
      x[4 * n + 3] = exp2_fast(fmaf(x[4 * n + 3], scale, high.y));
    }
    if (first_token < first_key + warpgroup * 64 + 63 || ends) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        const int position = first_token + ((i / 4 * 8 + column + i % 2) * per_group >> 16);
        if (position >= length || first_key + my_keys + i / 2 % 2 * 8 > position) x[i] = 0.f;
      }
    }
    pack_operand<T>(p_operand, x);
    pin(p_operand);
    wgmma_fence();
    product_abt<T, D>(x, v, kNext, shared.grad[stage][0], kNext);
    product_ab<T, kRows / 16>(v_grad, p_operand, shared.grad[stage][0], kNext);
    wgmma_commit();
    wgmma_wait<0>();
    pin(x);
    pin(v_grad);
    pin(p_operand);
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const float2 p = unpack2<T>(p_operand[i]);
      const int row = i / 2 * 8 + column;
      x[2 * i] = p.x * (x[2 * i] - row_stats[row].y);
      x[2 * i + 1] = p.y * (x[2 * i + 1] - row_stats[row + 1].y);
    }
    pack_operand<T>(ds_operand, x);
    pin(ds_operand);
    if (tile + 1 < num_tiles) {
      ring.wait(shared.ring);
      wgmma_fence();
      product_ab<T, kRows / 16>(k_grad, ds_operand, shared.q[stage][0], kNext);
      product_abt<T, D>(x, k, kNext, shared.q[ring.stage][0], kNext);
      wgmma_commit();
    } else {
      wgmma_fence();
      product_ab<T, kRows / 16>(k_grad, ds_operand, shared.q[stage][0], kNext);
      wgmma_commit();
    }
  }
  wgmma_wait<0>();
  pin(x);
  pin(k_grad);
  pin(v_grad);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + my_keys + half * 8;
    if (key >= length) continue;
    const int64_t row = ((int64_t{start} + key) * a.p.num_kv_heads + head) * D + column;
    const float factor = static_cast<float>(a.p.scale);
    const T* my_key =
        static_cast<const T*>(a.p.k) + (int64_t{start} + key) * a.p.k_stride_token + head * a.p.k_stride_head + column;
    const int slot = page_slot(start, b, a.p.seqs.page_size, key >> a.page_shift);
    const float* grads =
        page_grads == nullptr ? nullptr : page_grads + (int64_t{slot} * a.p.num_kv_heads + head) * 2 * D + column;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float gx = k_grad[4 * n + 2 * half] * factor, gy = k_grad[4 * n + 2 * half + 1] * factor;
      if (kGated && grads != nullptr) {
        const float2 offset = *reinterpret_cast<const float2*>(grads + n * 8);
        const float2 slope = *reinterpret_cast<const float2*>(grads + D + n * 8);
        gx += fmaf(slope.x, to_float(my_key[n * 8]), offset.x);
        gy += fmaf(slope.y, to_float(my_key[n * 8 + 1]), offset.y);
      }
      *reinterpret_cast<unsigned*>(dk + row + n * 8) = pack2<T>(gx, gy);
      *reinterpret_cast<unsigned*>(dv + row + n * 8) = pack2<T>(v_grad[4 * n + 2 * half], v_grad[4 * n + 2 * half + 1]);
    }
  }
#endif
}

template <typename T, int D, bool kGated>
cudaError_t launch(const HopperArgs& a, const DkvMaps& maps, const float2* stats, const float* page_grads, void* dk,
                   void* dv, cudaStream_t stream) {
  const int tiles = tiles_of(a, a.chunk.key_end - a.chunk.key_begin, kDkvKeys);
  return launch_roles<Roles, Shared<D>>(soft_mask_dkv_hopper<T, D, kGated>, a, tiles, stream, maps, stats, page_grads,
                                        static_cast<T*>(dk), static_cast<T*>(dv));
}

}  // namespace

cudaError_t launch_dkv(const HopperArgs& args, const DkvMaps& maps, const float2* stats, const float* page_grads,
                       void* dk, void* dv, cudaStream_t stream) {
  UA_DISPATCH_HOPPER(args.p, T, D,
                     return args.p.mode == MaskMode::kDense
                                ? launch<T, D, false>(args, maps, stats, page_grads, dk, dv, stream)
                                : launch<T, D, true>(args, maps, stats, page_grads, dk, dv, stream));
}

}  // namespace unique_attn
