// Sparse attention of fp32 inputs: one thread block per (sequence, query token, KV head, tile of query heads, split of
// the selected pages). LPT lanes share a token, 8 channels each; every group of LPT lanes runs its own online softmax
// over the tokens it meets, so nothing is exchanged inside the loop but the sums of one dot product. All query heads of
// the tile share each K and V read. The groups are merged at the end, the splits by combine_splits.
#include "core/decode/sparse_decode_common.cuh"
#include "core/decode/split_plan.h"

namespace unique_attn {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 2;  // tokens per group in flight

template <typename T, int LPT, int GT>
__global__ void __launch_bounds__(kThreads) sparse_decode_kernel(const SparseDecodeParams p, int pages_per_split) {
  constexpr int kGroups = kWarp / LPT;  // tokens a warp meets at once
  const int t = blockIdx.x % p.num_query_tokens;
  const int b = blockIdx.x / p.num_query_tokens;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int tiles = (group + GT - 1) / GT;
  const int head = blockIdx.y / tiles;
  const int head_in_group = blockIdx.y % tiles * GT;
  const int num_heads = min(GT, group - head_in_group);
  const int split = blockIdx.z;

  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int channel = lane % LPT * 8;
  const bool has_channels = channel < p.head_dim;
  const int q_head = head * group + head_in_group;

  float q[GT][8];
#pragma unroll
  for (int g = 0; g < GT; ++g) {
    Vec8<T> raw;
    raw.zero();
    if (has_channels && g < num_heads) {
      raw.load(static_cast<const T*>(p.q.data) + b * p.q.stride_batch + t * p.q.stride_token +
               (q_head + g) * p.q.stride_head + channel);
    }
    raw.unpack(q[g]);
#pragma unroll
    for (int j = 0; j < 8; ++j) q[g][j] *= static_cast<float>(p.scale) * kLog2e;
  }

  const int page_size = p.table.page_size;
  const int page_shift = __ffs(page_size) - 1;
  const int position = query_position(p.table.seq_lens[b], p.num_query_tokens, t);
  const TokenRange seen = visible_tokens(p.table, position, p.window);
  const int seen_pages = (seen.end + page_size - 1) >> page_shift;
  const int32_t* pages = p.pages + (int64_t{blockIdx.x} * p.num_kv_heads + head) * p.k;
  const int page_begin = split * pages_per_split;
  const int tokens = seen.end == 0 ? 0 : max(min(pages_per_split, p.k - page_begin), 0) << page_shift;

  bool any_visible = false;
  float m[GT], l[GT], acc[GT][8];
#pragma unroll
  for (int g = 0; g < GT; ++g) {
    m[g] = -INFINITY;
    l[g] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) acc[g][j] = 0.f;
  }

  for (int base = warp * kGroups; base < tokens; base += kWarps * kGroups * kUnroll) {
    Vec8<T> k_raw[kUnroll], v_raw[kUnroll];
    bool visible[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int token = base + i * kWarps * kGroups + lane / LPT;
      const int page = token < tokens ? pages[page_begin + (token >> page_shift)] : -1;
      const int at = is_index(page, seen_pages) ? page * page_size + (token & (page_size - 1)) : -1;
      const bool inside = at >= seen.first && at < seen.end;
      const int block = inside ? physical_block(p.table, b, at / p.table.block_size) : -1;
      visible[i] = block >= 0;
      any_visible = any_visible || visible[i];
      // What may not be seen is not read: zeros stand in for it, and its weight is zero.
      k_raw[i].zero();
      v_raw[i].zero();
      if (visible[i] && has_channels) {
        k_raw[i].load(token_row<T>(p.k_cache, block, head, at % p.table.block_size) + channel);
        v_raw[i].load(token_row<T>(p.v_cache, block, head, at % p.table.block_size) + channel);
      }
    }
    float s[kUnroll][GT];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      float key[8];
      k_raw[i].unpack(key);
#pragma unroll
      for (int g = 0; g < GT; ++g) {
        float dot = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) dot += q[g][j] * key[j];
#pragma unroll
        for (int offset = LPT / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(kFullMask, dot, offset);
        s[i][g] = visible[i] ? dot : -INFINITY;
      }
    }
#pragma unroll
    for (int g = 0; g < GT; ++g) {
      float m_new = m[g];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) m_new = fmaxf(m_new, s[i][g]);
      const float correction = softmax_weight(m[g], m_new);
      m[g] = m_new;
      l[g] *= correction;
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[g][j] *= correction;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      float value[8];
      v_raw[i].unpack(value);
#pragma unroll
      for (int g = 0; g < GT; ++g) {
        const float w = softmax_weight(s[i][g], m[g]);
        l[g] += w;
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[g][j] += w * value[j];
      }
    }
  }

  // Merge the groups of the warp: lanes LPT apart hold the same channels.
#pragma unroll
  for (int offset = LPT; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int g = 0; g < GT; ++g) {
      const float other_m = __shfl_xor_sync(kFullMask, m[g], offset);
      const float m_new = fmaxf(m[g], other_m);
      const float mine = softmax_weight(m[g], m_new);
      const float other = softmax_weight(other_m, m_new);
      l[g] = l[g] * mine + __shfl_xor_sync(kFullMask, l[g], offset) * other;
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[g][j] = acc[g][j] * mine + __shfl_xor_sync(kFullMask, acc[g][j], offset) * other;
      m[g] = m_new;
    }
  }

  // Merge the warps through shared memory, one thread per channel.
  __shared__ float shared_m[kWarps][GT], shared_l[kWarps][GT];
  __shared__ float shared_acc[kWarps][GT][LPT * 8];
  if (lane < LPT) {
#pragma unroll
    for (int g = 0; g < GT; ++g) {
      if (lane == 0) {
        shared_m[warp][g] = m[g];
        shared_l[warp][g] = l[g];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) shared_acc[warp][g][channel + j] = acc[g][j];
    }
  }
  // A row without a visible token is 0; one whose logits are all -inf is 0 / 0 = NaN, as in any softmax.
  const bool empty = __syncthreads_or(any_visible) == 0;
  for (int i = threadIdx.x; i < num_heads * p.head_dim; i += kThreads) {
    const int g = i / p.head_dim;
    const int d = i % p.head_dim;
    float m_all = shared_m[0][g];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) m_all = fmaxf(m_all, shared_m[w][g]);
    float l_all = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float scale = softmax_weight(shared_m[w][g], m_all);
      l_all += shared_l[w][g] * scale;
      sum += shared_acc[w][g][d] * scale;
    }
    const float out = empty ? 0.f : sum / l_all;
    const float lse = (m_all + log2f(l_all)) * kLn2;  // -inf where nothing has weight
    store_split<T>(p, int64_t{blockIdx.x} * p.num_q_heads + q_head + g, split, d, out, lse);
  }
}

template <typename T, int LPT, int GT>
void launch_tile(const SparseDecodeParams& p, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  const int pages_per_split = (p.k + p.num_splits - 1) / p.num_splits;
  const dim3 grid(p.batch * p.num_query_tokens, p.num_kv_heads * ((group + GT - 1) / GT), p.num_splits);
  sparse_decode_kernel<T, LPT, GT><<<grid, kThreads, 0, stream>>>(p, pages_per_split);
}

template <typename T, int LPT>
void launch_lanes(const SparseDecodeParams& p, cudaStream_t stream) {
  switch (decode_head_tile(p.num_q_heads / p.num_kv_heads)) {
    case 1:
      return launch_tile<T, LPT, 1>(p, stream);
    case 2:
      return launch_tile<T, LPT, 2>(p, stream);
    case 4:
      return launch_tile<T, LPT, 4>(p, stream);
    default:
      return launch_tile<T, LPT, 8>(p, stream);
  }
}

}  // namespace

cudaError_t sparse_decode_fma_cuda(const SparseDecodeParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) {
    launch_lanes<float, 8>(p, stream);
  } else if (p.head_dim <= 128) {
    launch_lanes<float, 16>(p, stream);
  } else {
    launch_lanes<float, 32>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace unique_attn
