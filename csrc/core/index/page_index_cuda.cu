// One thread block per touched page and KV head, one thread per channel. The variance takes two passes; the second one
// over a long page reads its keys from L1. In a decode step the threads write the new tokens as well.
#include "core/cuda/launch.cuh"
#include "core/cuda/vec.cuh"
#include "core/index/append_index.h"
#include "core/index/format.h"

namespace unique_attn {
namespace {

constexpr int kKeys = 8;

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

// Largest of the lanes that differ in the bits below `width`, a power of 2.
__device__ __forceinline__ float group_max(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

__device__ __forceinline__ float group_sum(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// The compressed entry from one channel per thread; all threads of the block come here. A group of channels is a half
// or a whole warp.
template <typename RuleT>
__device__ __forceinline__ void compress_entry(float mean, float std, int head_dim, uint8_t* entry) {
  constexpr bool kSpreads = RuleT::kVectors > 1;
  const int d = threadIdx.x;
  const bool active = d < head_dim;
  const int width = group_channels(head_dim);
  const unsigned ours = __ballot_sync(kFullMask, !active || (isfinite(mean) && isfinite(std)));
  const unsigned lanes = (width == kWarp ? kFullMask : (1u << width) - 1) << (d % kWarp / width * width);
  // The lowest channel of those with the largest magnitude is the outlier.
  const float size = active ? fabsf(mean) : -1.f;
  const float largest = group_max(size, width);
  const unsigned equal = __ballot_sync(kFullMask, size == largest) & lanes;
  const int first = equal != 0 ? __ffs(equal) - 1 : 0;  // none if there is a NaN
  const float outlier = __shfl_sync(kFullMask, mean, first);
  const float rest = fmaxf(group_max(d % kWarp == first ? -1.f : size, width), 0.f);
  const float shown = active ? std : 0.f;
  const float spread = RuleT::kScalar ? sqrtf(group_sum(shown * shown, width))
                       : kSpreads     ? group_max(shown, width)
                                      : 0.f;
  const bool finite = (ours & lanes) == lanes && isfinite(spread);
  const GroupScales scales = group_scales(finite, outlier, rest, spread, RuleT::kScalar);
  const GroupValues values(scales);
  if (active && d % width == 0) reinterpret_cast<GroupScales*>(entry)[d / width] = scales;

  // Neighbouring lanes put their codes together; head_dim is a multiple of 8, so a byte is written by active lanes.
  unsigned mean_codes = active ? values.mean_code(mean) & 15 : 0;
  mean_codes |= __shfl_down_sync(kFullMask, mean_codes, 1) << 4;
  if (active && d % 2 == 0) entry[means_offset(head_dim) + d / 2] = static_cast<uint8_t>(mean_codes);
  if (kSpreads) {
    unsigned std_codes = active ? values.std_code(std) : 0;
    std_codes |= __shfl_down_sync(kFullMask, std_codes, 1) << 2;
    std_codes |= __shfl_down_sync(kFullMask, std_codes, 2) << 4;
    if (active && d % 4 == 0) entry[spreads_offset(head_dim) + d / 4] = static_cast<uint8_t>(std_codes);
  }
  // The padding is written too, so that equal pages have equal bytes.
  const int used = compressed_entry_end(kSpreads, head_dim);
  if (used + d < compressed_entry_bytes(kSpreads, head_dim)) entry[used + d] = 0;
}

// Writes one channel of the new tokens in [first, end), which lie in `block`, if there is one. Its thread reads it back
// itself: there is nothing to wait for. Tokens are loaded before anything depends on the block, which is still on its
// way.
template <typename T>
__device__ __forceinline__ void append_channel(const AppendKvParams& p, int b, int head, int first, int end,
                                               int block) {
  const int position = query_position(p.table.seq_lens[b], p.num_tokens, 0);
  first = max(first, position);
  const auto source = [&](const TokenView& x, int token) {
    const int64_t row = b * x.stride_batch + (token - position) * x.stride_token + head * x.stride_head;
    return static_cast<const T*>(x.data)[row + threadIdx.x];
  };
  const auto target = [&](const PagedView& cache, int token) -> T& {
    return token_row<T>(cache, block, head, token % p.block_size)[threadIdx.x];
  };
  for (int begin = first; begin < end; begin += kKeys) {
    T k[kKeys], v[kKeys];
    bool written[kKeys];
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      written[j] = begin + j < end && !is_left_out(p, int64_t{b} * p.num_tokens + begin + j - position);
      if (begin + j < end) k[j] = source(p.k, begin + j), v[j] = source(p.v, begin + j);
    }
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      if (block >= 0 && written[j]) target(p.k_cache, begin + j) = k[j], target(p.v_cache, begin + j) = v[j];
    }
  }
}

// `append` is read with kAppend only.
template <typename T, typename RuleT, bool kCompressed, bool kAppend>
__global__ void __launch_bounds__(kMaxHeadDim)
    page_index_kernel(const PageIndexParams p, const AppendKvParams append, int pages_per_seq) {
  wait_for_previous_kernel();
  const int b = blockIdx.x / pages_per_seq;
  const int head = blockIdx.y;
  const PageRange pages = touched_pages(p, b);
  const int page = pages.first + static_cast<int>(blockIdx.x % pages_per_seq);
  if (page >= pages.end || !has_written_token(p, b, page)) return;
  const int page_size = p.table.page_size;
  const int pages_per_block = p.table.block_size / page_size;
  const int block = physical_block(p.table, b, page / pages_per_block);
  const int first = page * page_size;
  const int count = min(page_size, p.table.seq_lens[b] - first);

  const int d = threadIdx.x;
  const bool active = d < p.head_dim;
  if (kAppend && active) append_channel<T>(append, b, head, first, first + count, block);
  if (block < 0) return;
  // A page lies within one block, so its rows are stride_token apart.
  const T* keys = token_row<T>(p.k_cache, block, head, page % pages_per_block * page_size) + d;

  // Several keys at a time, so that their loads do not wait for one another; a page of so many is read once.
  float x[kKeys];
  const auto load = [&](int begin) {
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      x[j] = begin + j < count ? to_float(keys[(begin + j) * p.k_cache.stride_token]) : 0.f;
    }
  };
  ChannelStats<float> stats{0.f, 0.f, 0.f, 0.f};
  if (active) {
    float sum = 0.f;
    for (int begin = 0; begin < count; begin += kKeys) {
      load(begin);
      if (begin == 0) stats.min = stats.max = x[0];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (begin + j >= count) break;
        sum += x[j];
        // Comparisons written so that a NaN stays.
        stats.min = stats.min <= x[j] ? stats.min : (isnan(stats.min) ? stats.min : x[j]);
        stats.max = stats.max >= x[j] ? stats.max : (isnan(stats.max) ? stats.max : x[j]);
      }
    }
    stats.mean = sum / count;
    float squares = 0.f;
    for (int begin = 0; begin < count; begin += kKeys) {
      if (count > kKeys) load(begin);
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float diff = x[j] - stats.mean;
        if (begin + j < count) squares += diff * diff;
      }
    }
    stats.var = squares / count;
  }

  uint8_t* entry = p.index.data + block * p.index.stride_block + head * p.index.stride_head +
                   (page % pages_per_block) * p.index.stride_page;
  if constexpr (kCompressed) {
    compress_entry<RuleT>(stats.mean, sqrtf(stats.var), p.head_dim, entry);
    return;
  }
  T* vectors = reinterpret_cast<T*>(entry);
  if (active) {
    float vector_a = 0.f, vector_b = 0.f;
    RuleT::encode(stats, vector_a, vector_b);
    vectors[d] = from_float<T>(vector_a);
    if (RuleT::kVectors > 1) vectors[p.head_dim + d] = from_float<T>(vector_b);
  }
  if (RuleT::kScalar) {
    __shared__ float scratch[kMaxHeadDim / kWarp];
    const float sum = block_sum(active ? RuleT::term(stats) : 0.f, scratch);
    // The whole slot is written, so that equal pages have equal bytes.
    constexpr int slot = static_cast<int>(kScalarBytes / sizeof(T));
    const float scalar = stored_scalar(RuleT::total(sum), largest_number(T()));
    if (d < slot) vectors[RuleT::kVectors * p.head_dim + d] = from_float<T>(d == 0 ? scalar : 0.f);
  }
}

template <bool kAppend>
cudaError_t launch(const PageIndexParams& p, const AppendKvParams& append, cudaStream_t stream) {
  const int pages_per_seq = max_touched_pages(p);
  if (p.batch == 0 || p.num_kv_heads == 0 || pages_per_seq == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(int64_t{p.batch} * pages_per_seq), p.num_kv_heads);
  const int threads = (p.head_dim + kWarp - 1) / kWarp * kWarp;
  cudaError_t error = cudaErrorInvalidValue;
  UA_DISPATCH_CUDA_DTYPE(p.dtype, T, UA_DISPATCH_INDEX(p.index.format, p.rule, RuleT, kCompressed, {
                           error = launch_dependent(page_index_kernel<T, RuleT, kCompressed, kAppend>, grid, threads, 0,
                                                    stream, p, append, pages_per_seq);
                         }));
  return error;
}

}  // namespace

cudaError_t page_index_cuda(const PageIndexParams& params, cudaStream_t stream) {
  return launch<false>(params, {}, stream);
}

cudaError_t append_index_cuda(const AppendIndexParams& params, cudaStream_t stream) {
  return launch<true>(params.index, params.append, stream);
}

}  // namespace unique_attn
