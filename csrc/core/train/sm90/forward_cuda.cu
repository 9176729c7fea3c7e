// Flash attention with a bias per (query, page), on Hopper. A thread block serves 2 x 64 rows (tokens with all heads of
// a group): one warp copies tiles of 128 keys, two warpgroups multiply. Of every tile the softmax runs under the
// product of the tile before with its values.
#include "core/cuda/sm90/softmax.cuh"
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

constexpr int kKeys = kForwardKeys;
using Roles = WarpRoles<2, 24, 240>;
constexpr int kKeyStages = 3;  // a stage's gates are read after its product
constexpr int kValueStages = 2;
constexpr int kMaxGates = 64 * kKeys / 4;  // tokens x pages of 4 keys

template <int D>
struct Shared {
  static constexpr int kTiles = D / kTileChannels;
  alignas(1024) char q[2][kTiles][64 * kSwizzleRow];
  alignas(1024) char k[kKeyStages][kTiles][kKeys * kSwizzleRow];
  alignas(1024) char v[kValueStages][kTiles][kKeys * kSwizzleRow];
  alignas(128) __half log_gates[kKeyStages][2][kMaxGates];
  uint64_t q_full;
  StageBarriers<kKeyStages> keys;
  StageBarriers<kValueStages> values;
};

template <typename T, int D, bool kGated>
__global__ void __launch_bounds__(Roles::kThreads, 1)
    soft_mask_forward_hopper(const __grid_constant__ ForwardMaps maps, const __grid_constant__ HopperArgs a) {
#ifdef UA_HOPPER
  using S = Shared<D>;
  extern __shared__ char shared_bytes[];
  auto& shared = shared_storage<S>(shared_bytes);
  const int b = a.first_sequence + static_cast<int>(blockIdx.z);
  const int head = blockIdx.y;
  // The last tiles see the most keys: start them first.
  const QueryTile t = query_tile(a, b, gridDim.x - 1 - blockIdx.x, 2 * a.tokens);
  if (t.first >= t.end) return;
  const int last_token = min(t.first + 2 * a.tokens, t.end) - 1;
  const int num_tiles = last_token / kKeys + 1;
  const int warpgroup = enter_roles<Roles>([&] {
    barrier_init(&shared.q_full, 1);
    shared.keys.init(Roles::kReaders);
    shared.values.init(Roles::kReaders);
  });

  if (Roles::copies(warpgroup)) {
    if (Roles::one_copies()) {
      const int rows = a.group * a.tokens;
      barrier_expect(&shared.q_full, 2 * rows * D * static_cast<int>(sizeof(T)));
      for (int w = 0; w < 2; ++w) {
        tma_load_tiles<D>(shared.q[w][0], sizeof(shared.q[0][0]), maps.q, &shared.q_full, head * a.group,
                          t.start + t.first + w * a.tokens);
      }
      const int box = gate_box(kKeys, a.p.seqs.page_size);
      const int gate_bytes = kGated ? 2 * box * a.tokens * static_cast<int>(sizeof(__half)) : 0;
      Ring<kKeyStages> keys;
      Ring<kValueStages> values;
      for (int tile = num_tiles - 1; tile >= 0; --tile) {
        const int first_key = t.start + tile * kKeys;
        uint64_t* full = keys.acquire(shared.keys, static_cast<int>(sizeof(shared.k[0])) + gate_bytes);
        tma_load_tiles<D>(shared.k[keys.stage][0], sizeof(shared.k[0][0]), maps.k, full, head, first_key);
        if constexpr (kGated) {
          for (int w = 0; w < 2; ++w) {
            tma_load(shared.log_gates[keys.stage][w], maps.log_gates, full,
                     (tile * kKeys >> a.page_shift) & -kGateAlign, head,
                     t.start + t.first + w * a.tokens - a.chunk.token_begin);
          }
        }
        keys.advance();
        full = values.acquire(shared.values, sizeof(shared.v[0]));
        tma_load_tiles<D>(shared.v[values.stage][0], sizeof(shared.v[0][0]), maps.v, full, head, first_key);
        values.advance();
      }
    }
    return;
  }

  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int rows[2] = {thread / kWarp * 16 + lane / 4, thread / kWarp * 16 + lane / 4 + 8};
  // Rows past the tile's tokens compute like its last token and are not stored.
  const int tokens[2] = {min(rows[0] / a.group, a.tokens - 1), min(rows[1] / a.group, a.tokens - 1)};
  const int first = t.first + warpgroup * a.tokens;  // position of the warpgroup's first token
  const int column = lane % 4 * 2;
  const float scale = static_cast<float>(a.p.scale) * kLog2e;
  const int box = gate_box(kKeys, a.p.seqs.page_size);
  const char* q = shared.q[warpgroup][0];
  constexpr int kQNext = sizeof(shared.q[0][0]);
  constexpr int kKeyNext = sizeof(shared.k[0][0]);

  float s[kKeys / 2];
  float out[D / 2] = {};
  unsigned probabilities[kKeys / 4] = {};
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
  Ring<kKeyStages> keys;
  Ring<kValueStages> values;
  int previous = 0;  // stage of the values that the product in flight reads

  const Turns<2> turns(warpgroup);  // barrier 1 is that of finish_zero_rows
  barrier_wait(&shared.q_full, 0);
  keys.wait(shared.keys);
  wgmma_fence();
  product_abt<T, D>(s, q, kQNext, shared.k[0][0], kKeyNext);
  wgmma_commit();
  wgmma_wait<0>();
  pin(s);
  // The tile that comes first may be the sequence's last. Of keys past the end no logit is used.
  const int tail = t.length - (num_tiles - 1) * kKeys;
  if (tail < kKeys && has_next(a, t.start, t.length)) {
    values.wait(shared.values);
    zero_rows<S::kTiles, 2 * kWarpgroup>(shared.v[0][0], sizeof(shared.v[0][0]), tail, kKeys, threadIdx.x);
    finish_zero_rows<2 * kWarpgroup>(1);
  }
  for (int tile = num_tiles - 1; tile >= 0; --tile) {
    const int first_key = tile * kKeys;
    if (kGated) {
      const __half* gates = shared.log_gates[keys.stage][warpgroup] + ((first_key >> a.page_shift) & (kGateAlign - 1));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float gate[kKeys / 8];
        load_row_gates(gate, gates + tokens[half] * box, a.page_shift, column);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          s[4 * n + 2 * half] = fmaf(s[4 * n + 2 * half], scale, gate[n]);
          s[4 * n + 2 * half + 1] = fmaf(s[4 * n + 2 * half + 1], scale, gate[n]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] *= scale;
    }
    shared.keys.release(keys.stage);
    keys.advance();
    if (first_key + kKeys - 1 > first) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        const int key = first_key + i / 4 * 8 + column + i % 2;
        if (key > first + tokens[i / 2 % 2]) s[i] = -INFINITY;
      }
    }
    float correction[2];
    online_softmax(s, m, l, correction);
    wgmma_wait<0>();
    keep_operand(probabilities, a.tokens == 0, &shared.q_full);
    if (tile < num_tiles - 1) shared.values.release(previous);
    pin(out);
    pin(probabilities);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= correction[i / 2 % 2];
    pack_operand<T>(probabilities, s);
    pin(out);
    pin(probabilities);
    turns.wait();
    if (tile > 0) {
      keys.wait(shared.keys);
      wgmma_fence();
      product_abt<T, D>(s, q, kQNext, shared.k[keys.stage][0], kKeyNext);
      wgmma_commit();
    }
    values.wait(shared.values);
    wgmma_fence();
    product_ab<T, kKeys / 16>(out, probabilities, shared.v[values.stage][0], kKeyNext);
    wgmma_commit();
    turns.pass();
    previous = values.stage;
    values.advance();
    wgmma_wait<1>();
    if (tile > 0) pin(s);
  }
  wgmma_wait<0>();
  pin(out);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] += __shfl_xor_sync(kFullMask, l[half], 1);
    l[half] += __shfl_xor_sync(kFullMask, l[half], 2);
    const int token = first + tokens[half];
    if (rows[half] >= a.group * a.tokens || token >= t.end) continue;
    const int64_t row = (int64_t{t.start} + token) * a.p.num_q_heads + head * a.group + rows[half] % a.group;
    T* o = static_cast<T*>(a.p.out) + row * D + column;
    const float factor = 1.f / l[half];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<unsigned*>(o + n * 8) =
          pack2<T>(out[4 * n + 2 * half] * factor, out[4 * n + 2 * half + 1] * factor);
    }
    if (lane % 4 == 0) static_cast<float*>(a.p.lse)[row] = (m[half] + log2f(l[half])) * kLn2;
  }
#endif
}

template <typename T, int D, bool kGated>
cudaError_t launch(const HopperArgs& a, const ForwardMaps& maps, cudaStream_t stream) {
  return launch_roles<Roles, Shared<D>>(soft_mask_forward_hopper<T, D, kGated>, a, query_tiles(a, 2 * a.tokens), stream,
                                        maps);
}

}  // namespace

cudaError_t launch_forward(const HopperArgs& args, const ForwardMaps& maps, cudaStream_t stream) {
  UA_DISPATCH_HOPPER(args.p, T, D,
                     return args.p.mode == MaskMode::kDense ? launch<T, D, false>(args, maps, stream)
                                                            : launch<T, D, true>(args, maps, stream));
}

}  // namespace unique_attn
