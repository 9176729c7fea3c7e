// Attention of one query token and KV head over a list of pages, by one thread block on tensor cores: what sparse_decode
// and the step of small batches share. All heads of the group share each key and value read.
//
// What bounds it is how many bytes are in flight, so each warp works alone: it takes every Warps-th 16 tokens of the
// list and owns a ring of units in shared memory, one unit the keys or the values of 16 tokens, refilled by its own
// copies as soon as it is used. Nothing in the loop waits for another warp. The places of the pages are looked up
// before it, all at once. Warps have an online softmax each and are merged at the end.
//
// Tokens are the rows of the products and query heads their 8 or 16 columns: S^T = K q^T, then O^T += V^T P^T. A group
// of at most 8 heads then wastes half of what it would as rows, and q stays in registers.
#pragma once

#include <climits>

#include "core/cuda/math.cuh"
#include "core/cuda/mma.cuh"
#include "core/decode/sparse_decode.h"

namespace unique_attn {

constexpr int kTokens = 16;  // of a unit
constexpr int kQuad = 4;     // tokens of the smallest page: these many lie in one page, whatever its size
constexpr int kNever = INT_MAX - kMaxPageSize;  // a position later than any query's, with room to add to it

// Quads whose places are looked up at once: the tokens of a round.
template <int Warps>
constexpr int kRoundQuads = Warps * kWarp > 128 ? Warps * kWarp : 128;

template <typename T, int DP, int Warps, int Ring>
struct AttendShared {
  T ring[Warps][Ring][kTokens * DP];
  // Of each quad of a round: its keys and values, and the place of its first token among those that the query sees.
  alignas(16) const T* from[2][kRoundQuads<Warps>];
  alignas(16) int seen[kRoundQuads<Warps>];
};

// A warp's result, over its ring: rows are padded so that the lanes that hold different heads meet different banks.
template <int DP, int Rows>
struct WarpResult {
  float acc[Rows][DP + 4];
  float m[Rows], l[Rows];
};

// Where 8 channels of a token lie in a unit. The exclusive or spreads the same channels of 8 tokens, which ldmatrix
// reads at once, over all banks.
template <int DP>
__device__ __forceinline__ int unit_offset(int token, int channels) {
  return token * DP + ((channels ^ (token & 7)) * 8);
}

// Transposes an 8 x 8 matrix of 16-bit elements: lane l holds elements 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ unsigned transpose_matrix(unsigned x) {
  unsigned y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// The maximum over lanes that hold the same query heads: those of equal l % 4.
__device__ __forceinline__ float max_over_tokens(float x) {
#pragma unroll
  for (int lanes = 4; lanes < kWarp; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, lanes));
  return x;
}

// `pages`: num_pages of them, in any memory; negative ones are skipped. At the end store(head of the group, channel, sum of
// weights times values, maximum of the logits in powers of 2, sum of weights, no token was visible) for each channel of
// each head, by the threads of one warp per head.
template <typename T, int DP, int NT, int Warps, int Ring, typename Store>
__device__ __forceinline__ void attend_pages(const SparseDecodeParams& p, AttendShared<T, DP, Warps, Ring>& shared,
                                             int b, int t, int head, const int32_t* pages, int num_pages,
                                             const Store& store) {
  constexpr int kThreads = Warps * kWarp;
  constexpr int kQuads = kRoundQuads<Warps>;
  constexpr int kRoundTokens = kQuads * kQuad;
  static_assert(kRoundTokens % kTokens == 0 && kRoundTokens % kMaxPageSize == 0);
  constexpr int kQuadsPerThread = kQuads / kThreads;
  static_assert(kQuads % kThreads == 0);
  constexpr int kRing = Ring;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int page_size = p.table.page_size;
  const int page_shift = __ffs(page_size) - 1;
  const int num_tokens = num_pages << page_shift;
  // The pages of this thread's quads of a round, before anything that waits for memory: they lead to everything else.
  int page[kQuadsPerThread];
  const auto load_pages = [&](int round) {
#pragma unroll
    for (int i = 0; i < kQuadsPerThread; ++i) {
      const int token = round + (i * kThreads + threadIdx.x) * kQuad;
      page[i] = token < num_tokens ? pages[token >> page_shift] : -1;
    }
  };
  load_pages(0);
  const int position = query_position(p.table.seq_lens[b], p.num_query_tokens, t);
  const TokenRange tokens = visible_tokens(p.table, position, p.window);
  const int end_token = min(tokens.end, kNever);
  const int end_page = (end_token + page_size - 1) >> page_shift;
  // A token is visible if its place after the first one is, as an unsigned number, less than this.
  const unsigned num_visible = end_token - tokens.first;

  // q as the second operand of the products, zeros beyond head_dim. Columns beyond the group repeat its last head;
  // their results are not used.
  unsigned q[DP / 16][NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const T* row = static_cast<const T*>(p.q.data) + b * p.q.stride_batch + t * p.q.stride_token +
                   (head * group + min(n * 8 + lane / 4, group - 1)) * p.q.stride_head + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < DP / 8; ++k) {
      q[k / 2][n][k % 2] = k * 8 < p.head_dim ? *reinterpret_cast<const unsigned*>(row + k * 8) : 0u;
    }
  }

  // Heads 2 (lane % 4) and the next of every 8; tokens or channels lane / 4 and lane / 4 + 8 of every 16.
  float m[NT][2], l[NT][2], acc[DP / 16][NT][4] = {};
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    m[n][0] = m[n][1] = -INFINITY;
    l[n][0] = l[n][1] = 0.f;
  }
  bool any_visible = false;
  // A copy instruction of a warp takes whole tokens, 8 channels by each lane.
  constexpr int kCopyTokens = kWarp / (DP / 8);
  static_assert(kCopyTokens <= kQuad && kCopyTokens * DP == kWarp * 8);
  const int lane_token = lane / (DP / 8);
  const int lane_channels = lane % (DP / 8);
  const unsigned num_copied = lane_channels * 8 < p.head_dim ? num_visible : 0;
  const float scale = static_cast<float>(p.scale) * kLog2e;

  for (int round = 0; round < num_tokens; round += kRoundTokens) {
    if (round != 0) __syncthreads();  // a slower warp may still look up its last tokens
    int at[kQuadsPerThread], block[kQuadsPerThread], in_block[kQuadsPerThread];
#pragma unroll
    for (int i = 0; i < kQuadsPerThread; ++i) {
      const int in_page = (i * kThreads + threadIdx.x) * kQuad & (page_size - 1);
      at[i] = is_index(page[i], end_page) ? page[i] * page_size + in_page : kNever;
      const int logical = static_cast<unsigned>(at[i]) / p.table.block_size;
      in_block[i] = at[i] - logical * p.table.block_size;
      block[i] = at[i] < end_token ? p.table.blocks[b * p.table.stride_seq + logical] : 0;
    }
    load_pages(round + kRoundTokens);
#pragma unroll
    for (int i = 0; i < kQuadsPerThread; ++i) {
      const int quad = i * kThreads + threadIdx.x;
      if (!is_index(block[i], p.table.num_blocks)) at[i] = kNever, block[i] = 0;
#pragma unroll
      for (int values = 0; values < 2; ++values) {
        const PagedView& cache = values ? p.v_cache : p.k_cache;
        shared.from[values][quad] = static_cast<const T*>(cache.data) + block[i] * cache.stride_block +
                                    head * cache.stride_head + in_block[i] * cache.stride_token;
      }
      shared.seen[quad] = at[i] - tokens.first;
    }
    __syncthreads();
    const int num_sixteens = end_token == 0 ? 0 : (min(kRoundTokens, num_tokens - round) + kTokens - 1) / kTokens;
    const int num_units = (num_sixteens - warp + Warps - 1) / Warps * 2;
    const auto first_quad = [&](int unit) { return (warp + unit / 2 * Warps) * (kTokens / kQuad); };

    // Keys (even) or values (odd) into a place of the ring. What may not be seen is not read: zeros stand in for it,
    // and its weight is zero.
    const auto copy = [&](int unit, int place) {
      const int values = unit % 2;
      const int64_t stride = (values ? p.v_cache : p.k_cache).stride_token;
      const int64_t from_lane = lane_token * stride + lane_channels * 8;
      T* to = shared.ring[warp][place] + lane_token * DP;
      // All look-ups come first: one after a copy would wait for it to be issued, and the next copy for the look-up.
      const T* from[kTokens / kQuad];
      int seen[kTokens / kQuad];
#pragma unroll
      for (int i = 0; i < kTokens / kQuad; ++i) {
        from[i] = shared.from[values][first_quad(unit) + i];
        seen[i] = shared.seen[first_quad(unit) + i] + lane_token;
      }
#pragma unroll
      for (int i = 0; i < kTokens; i += kCopyTokens) {
        const bool valid = static_cast<unsigned>(seen[i / kQuad] + i % kQuad) < num_copied;
        // unit_offset of token i + lane_token, in which no bit of the two meets.
        copy_async16(to + i * DP + ((lane_channels ^ lane_token ^ (i & 7)) * 8),
                     from[i / kQuad] + (from_lane + i % kQuad * stride), valid);
      }
    };
    // Each use of a unit commits one group, empty or not, so that "all but the last kRing - 1" is always the next unit.
    int place = 0;
    const auto begin = [&] {
      copy_async_wait<kRing - 1>();
      __syncwarp();  // the other lanes' copies
    };
    const auto refill = [&](int unit) {
      __syncwarp();  // all lanes have read
      if (unit + kRing < num_units) copy(unit + kRing, place);
      copy_async_commit();
      place = place + 1 == kRing ? 0 : place + 1;
    };

    for (int unit = 0; unit < kRing; ++unit) {
      if (unit < num_units) copy(unit, unit);
      copy_async_commit();
    }
    for (int unit = 0; unit < num_units; unit += 2) {
      bool visible[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place_seen = shared.seen[first_quad(unit) + half * 2 + lane / 16] + lane / 4 % 4;
        visible[half] = static_cast<unsigned>(place_seen) < num_visible;
        any_visible = any_visible || visible[half];
      }

      begin();
      float s[2][NT][4] = {};  // two sums: a chain of products waits for its predecessors
      const T* keys = shared.ring[warp][place];
#pragma unroll
      for (int k = 0; k < DP / 16; ++k) {
        unsigned a[4];
        load_matrix4(a, keys + unit_offset<DP>(lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < NT; ++n) mma16816<T>(s[k % 2][n], a, q[k][n][0], q[k][n][1]);
      }
      refill(unit);

      unsigned weights[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = visible[i / 2] ? (s[0][n][i] + s[1][n][i]) * scale : -INFINITY;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float top = fmaxf(m[n][c], max_over_tokens(fmaxf(x[c], x[c + 2])));
          const float correction = softmax_weight(m[n][c], top);
          m[n][c] = top;
          x[c] = softmax_weight(x[c], top);
          x[c + 2] = softmax_weight(x[c + 2], top);
          l[n][c] = l[n][c] * correction + (x[c] + x[c + 2]);
#pragma unroll
          for (int d = 0; d < DP / 16; ++d) {
            acc[d][n][c] *= correction;
            acc[d][n][c + 2] *= correction;
          }
        }
        weights[n][0] = transpose_matrix(pack2<T>(x[0], x[1]));
        weights[n][1] = transpose_matrix(pack2<T>(x[2], x[3]));
      }

      begin();
      const T* values = shared.ring[warp][place];
#pragma unroll
      for (int d = 0; d < DP / 16; ++d) {
        unsigned a[4];
        load_matrix4_transposed(a, values + unit_offset<DP>(lane / 16 * 8 + lane % 8, d * 2 + lane / 8 % 2));
#pragma unroll
        for (int n = 0; n < NT; ++n) mma16816<T>(acc[d][n], a, weights[n][0], weights[n][1]);
      }
      refill(unit + 1);
    }
  }

  // Merge the warps. Each leaves its result where its ring was: all its copies were waited for and used.
  __syncwarp();
  static_assert(sizeof(WarpResult<DP, NT * 8>) <= sizeof(shared.ring[0]), "the ring holds the result");
  auto& result = *reinterpret_cast<WarpResult<DP, NT * 8>*>(shared.ring[warp]);
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) l[n][c] += __shfl_xor_sync(kFullMask, l[n][c], lanes);
      const int row = n * 8 + lane % 4 * 2 + c;
      if (row >= group) continue;
      if (lane < 4) {
        result.m[row] = m[n][c];
        result.l[row] = l[n][c];
      }
#pragma unroll
      for (int d = 0; d < DP / 16; ++d) {
        result.acc[row][d * 16 + lane / 4] = acc[d][n][c];
        result.acc[row][d * 16 + lane / 4 + 8] = acc[d][n][c + 2];
      }
    }
  }
  // A row without a visible token is 0; one whose logits are all -inf is 0 / 0 = NaN, as in any softmax.
  const bool empty = __syncthreads_or(any_visible) == 0;
  const auto result_of = [&](int w) -> const WarpResult<DP, NT * 8>& {
    return *reinterpret_cast<const WarpResult<DP, NT * 8>*>(shared.ring[w]);
  };
  for (int row = warp; row < group; row += Warps) {
    float m_all = -INFINITY, l_all = 0.f, weight[Warps];
#pragma unroll
    for (int w = 0; w < Warps; ++w) m_all = fmaxf(m_all, result_of(w).m[row]);
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      weight[w] = softmax_weight(result_of(w).m[row], m_all);
      l_all += result_of(w).l[row] * weight[w];
    }
    for (int d = lane; d < p.head_dim; d += kWarp) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < Warps; ++w) sum += result_of(w).acc[row][d] * weight[w];
      store(row, d, sum, m_all, l_all, empty);
    }
  }
}

}  // namespace unique_attn
