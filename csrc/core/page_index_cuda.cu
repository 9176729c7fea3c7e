// One thread block per touched page and KV head, one thread per channel. A page's keys are read twice (two-pass
// variance); the second read comes from L1.
#include "device_utils.cuh"
#include "page_index.h"

namespace unique_attn {
namespace {

// Sum over the block; every thread gets it. `scratch` holds one float per warp.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.f;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += scratch[w];
  return sum;
}

template <typename T, typename RuleT>
__global__ void __launch_bounds__(kMaxHeadDim) page_index_kernel(const PageIndexParams p, int pages_per_seq) {
  const int b = blockIdx.x / pages_per_seq;
  const int head = blockIdx.y;
  const int seq_len = p.table.seq_lens[b];
  const int start = p.start_lens != nullptr ? p.start_lens[b] : max(seq_len - p.max_new_tokens, 0);
  if (start >= seq_len) return;
  const int page_size = p.table.page_size;
  const int page = start / page_size + static_cast<int>(blockIdx.x % pages_per_seq);
  const int first = page * page_size;
  if (first >= seq_len) return;
  const int count = min(page_size, seq_len - first);

  const int d = threadIdx.x;
  const bool active = d < p.head_dim;
  // A page lies within one block, so its rows are stride_token apart.
  const T* keys = static_cast<const T*>(p.k_cache.data) + token_row<T>(p.k_cache, p.table, b, head, first) + d;

  ChannelStats<float> stats{0.f, 0.f, 0.f, 0.f};
  if (active) {
    stats.min = stats.max = to_float(keys[0]);
    float sum = 0.f;
    for (int j = 0; j < count; ++j) {
      const float x = to_float(keys[j * p.k_cache.stride_token]);
      sum += x;
      // Comparisons written so that a NaN stays.
      stats.min = stats.min <= x ? stats.min : (isnan(stats.min) ? stats.min : x);
      stats.max = stats.max >= x ? stats.max : (isnan(stats.max) ? stats.max : x);
    }
    stats.mean = sum / count;
    float squares = 0.f;
    for (int j = 0; j < count; ++j) {
      const float diff = to_float(keys[j * p.k_cache.stride_token]) - stats.mean;
      squares += diff * diff;
    }
    stats.var = squares / count;
  }

  const int pages_per_block = p.table.block_size / page_size;
  const int block = p.table.blocks[b * p.table.stride_seq + page / pages_per_block];
  uint8_t* entry = p.index.data + block * p.index.stride_block + head * p.index.stride_head +
                   (page % pages_per_block) * p.index.stride_page;
  T* vectors = reinterpret_cast<T*>(entry);
  if (active) {
    float vector_a = 0.f, vector_b = 0.f;
    RuleT::encode(stats, vector_a, vector_b);
    vectors[d] = from_float<T>(vector_a);
    if (RuleT::kVectors > 1) vectors[p.head_dim + d] = from_float<T>(vector_b);
  }
  if (RuleT::kScalar) {
    __shared__ float scratch[kMaxHeadDim / kWarp];
    const float total_var = block_sum(stats.var, scratch);
    // The whole slot is written, so that equal pages have equal bytes.
    constexpr int slot = static_cast<int>(kScalarBytes / sizeof(T));
    if (d < slot) vectors[RuleT::kVectors * p.head_dim + d] = from_float<T>(d == 0 ? sqrtf(total_var) : 0.f);
  }
}

}  // namespace

cudaError_t page_index_cuda(const PageIndexParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.num_kv_heads == 0 || params.max_new_tokens == 0) return cudaSuccess;
  // max_new_tokens tokens touch at most this many pages, wherever they start.
  const int page_size = params.table.page_size;
  const int touched = (params.max_new_tokens + page_size - 2) / page_size + 1;
  const int capacity = params.table.max_blocks * (params.table.block_size / page_size);
  const int pages_per_seq = touched < capacity ? touched : capacity;
  if (pages_per_seq == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(int64_t{params.batch} * pages_per_seq), params.num_kv_heads);
  const int threads = (params.head_dim + kWarp - 1) / kWarp * kWarp;
  UA_DISPATCH_CUDA_DTYPE(
      params.dtype, T,
      UA_DISPATCH_RULE(params.rule, RuleT,
                       page_index_kernel<T, RuleT><<<grid, threads, 0, stream>>>(params, pages_per_seq)));
  return cudaGetLastError();
}

}  // namespace unique_attn
