// Selection of rows that fit into registers. The k-th largest score is found by bisection of its order key: every step
// counts the scores at and above three keys, so that two bits are found at a time, in a time that does not depend on
// the scores. What is above it, and the lowest pages equal to it, become bits of a bitmap, whose prefix sums are the
// places in the output. A long row, or one of few, is shared by the thread blocks of a cluster.
#include "dependent_launch.cuh"
#include "radix_select.cuh"
#include "topk_row.cuh"

namespace unique_attn {
namespace {

constexpr int kKeysPerStep = 3;
constexpr int kMaxCluster = 8;
constexpr int kMaxWarps = 32;

// 8 neighbouring scores, and how to count those at or above a score. NaN, which ranks below -inf and stands for
// what is no candidate too, compares false.
template <typename Score>
struct Scores8;

template <>
struct Scores8<__nv_bfloat16> {
  __nv_bfloat162 pairs[4];

  __device__ __forceinline__ void set(int i, float x) {
    (i % 2 == 0 ? pairs[i / 2].x : pairs[i / 2].y) = __float2bfloat16_rn(x);
  }
  __device__ __forceinline__ void load(const __nv_bfloat16* p) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = *reinterpret_cast<const __nv_bfloat162*>(&words[i]);
  }
  __device__ __forceinline__ float get(int i) const {
    return __bfloat162float(i % 2 == 0 ? pairs[i / 2].x : pairs[i / 2].y);
  }
  // Of kVectors vectors; sums of at most 64 ones are exact in bf16.
  template <int kVectors>
  __device__ static int count(const Scores8 (&x)[kVectors], float bound) {
    const __nv_bfloat162 both = __float2bfloat162_rn(bound);
    __nv_bfloat162 sums[2] = {__float2bfloat162_rn(0.f), __float2bfloat162_rn(0.f)};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i % 2] = __hadd2(sums[i % 2], __hge2(x[v].pairs[i], both));
    }
    const float2 low = __bfloat1622float2(sums[0]), high = __bfloat1622float2(sums[1]);
    return static_cast<int>(low.x + low.y + high.x + high.y);
  }
};

template <>
struct Scores8<float> {
  float values[8];

  __device__ __forceinline__ void set(int i, float x) { values[i] = x; }
  __device__ __forceinline__ void load(const float* p) {
    const float4 low = *reinterpret_cast<const float4*>(p), high = *reinterpret_cast<const float4*>(p + 4);
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }
  __device__ __forceinline__ float get(int i) const { return values[i]; }
  template <int kVectors>
  __device__ static int count(const Scores8 (&x)[kVectors], float bound) {
    int sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[v].values[i] >= bound;
    }
    return sum;
  }
};

// Order keys of -inf and +inf; every number's key lies between them.
template <typename Score>
constexpr unsigned kLowestKey = sizeof(Score) == 2 ? 0x007fu : 0x007fffffu;
template <typename Score>
constexpr unsigned kHighestKey = sizeof(Score) == 2 ? 0xff80u : 0xff800000u;

template <typename Score, int kThreads, int kVectors>
struct Shared {
  static constexpr int kWords = kThreads * kVectors / 4;  // of a bitmap
  alignas(16) unsigned above[kWords];
  alignas(16) unsigned equal[kWords];
  int warp_counts[2][kKeysPerStep][kMaxWarps];
  int block_counts[2][kKeysPerStep][kMaxCluster];
  int2 warp_sums[kMaxWarps];
  int2 block_sums[kMaxCluster];
};

// ---- Clusters (Hopper): one thread block's shared memory is written by the others. Elsewhere none are launched. ----

// All thread blocks of the cluster have started, or arrived here again; what they wrote is visible.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void store_in_block(int* mine, int block, int value) {
#if __CUDA_ARCH__ >= 900
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(mine))), "r"(block));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
#endif
}

// Sums of `counts` over all threads of the cluster. Every other call uses the same buffers.
template <int kThreads, int kCluster, int kCount, typename S>
__device__ __forceinline__ void sum_counts(int (&counts)[kCount], S& shared, int turn) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int sum = __reduce_add_sync(kFullMask, counts[i]);
    if (lane == 0) shared.warp_counts[turn][i][threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    counts[i] = __reduce_add_sync(kFullMask, lane < kWarps ? shared.warp_counts[turn][i][lane] : 0);
  }
  if constexpr (kCluster > 1) {
    if (threadIdx.x < kCluster) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        store_in_block(&shared.block_counts[turn][i][blockIdx.x % kCluster], threadIdx.x, counts[i]);
      }
    }
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      counts[i] = 0;
#pragma unroll
      for (int r = 0; r < kCluster; ++r) counts[i] += shared.block_counts[turn][i][r];
    }
  }
}

// Exclusive prefix sums of x over the threads of the cluster, in the order of thread blocks and threads.
template <int kThreads, int kCluster, typename S>
__device__ __forceinline__ int2 prefix_sums(int2 x, S& shared) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int2 inclusive = x;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int a = __shfl_up_sync(kFullMask, inclusive.x, offset);
    const int b = __shfl_up_sync(kFullMask, inclusive.y, offset);
    if (lane >= offset) inclusive.x += a, inclusive.y += b;
  }
  if (lane == kWarp - 1) shared.warp_sums[warp] = inclusive;
  __syncthreads();
  int2 before = make_int2(inclusive.x - x.x, inclusive.y - x.y);
  int2 all = make_int2(0, 0);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int2 sum = shared.warp_sums[w];
    if (w < warp) before.x += sum.x, before.y += sum.y;
    all.x += sum.x, all.y += sum.y;
  }
  if constexpr (kCluster > 1) {
    const int rank = blockIdx.x % kCluster;
    if (threadIdx.x < kCluster) {
      store_in_block(&shared.block_sums[rank].x, threadIdx.x, all.x);
      store_in_block(&shared.block_sums[rank].y, threadIdx.x, all.y);
    }
    cluster_barrier();
    for (int r = 0; r < rank; ++r) {
      before.x += shared.block_sums[r].x;
      before.y += shared.block_sums[r].y;
    }
  }
  return before;
}

template <typename Score, int kThreads, int kVectors, int kCluster>
__global__ void __launch_bounds__(kThreads) topk_bisect_kernel(const TopkPagesParams p, int64_t num_scores) {
  using S = Shared<Score, kThreads, kVectors>;
  __shared__ S shared;
  wait_for_previous_kernel();
  const int64_t row_index = blockIdx.x / kCluster;
  const int rank = blockIdx.x % kCluster;  // of the thread block in its cluster
  const int head_rows = p.num_query_tokens * p.num_kv_heads;
  const int b = static_cast<int>(row_index / head_rows);
  const int t = static_cast<int>(row_index % head_rows) / p.num_kv_heads;
  const RowOutput output{p, b, p.pages + row_index * p.k};
  const RowPlan row = plan_row(p, b, t);
  const int candidates = max(row.end - row.first, 0);
  if (rank == 0) output.emit_forced(row, threadIdx.x, kThreads);
  const int wanted = row.k - row.sinks - row.recents;
  if (candidates <= row.k || wanted == 0) return;  // the same for all blocks of the cluster
  if constexpr (kCluster > 1) cluster_barrier();

  // The free candidates are one stretch [low_page, high_page), longer than `wanted`. Vectors begin on 16 bytes, before
  // the row's first score if that does not.
  const int low_page = row.first + row.sinks;
  const int high_page = row.end - row.recents;
  const int64_t begin = row_index * p.num_pages;
  const int shift = static_cast<int>(begin % 8);
  const Score* aligned = static_cast<const Score*>(p.scores) + (begin - shift);
  Scores8<Score> x[kVectors];
  const int block_first = rank * kVectors * kThreads * 8 - shift;  // page of the block's first score
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int page = block_first + (v * kThreads + static_cast<int>(threadIdx.x)) * 8;
    if (page + 8 <= low_page || page >= high_page) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[v].set(i, NAN);
      continue;
    }
    const int64_t at = page + shift;
    if (begin - shift + at + 8 <= num_scores) {
      x[v].load(aligned + at);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[v].set(i, begin - shift + at + i < num_scores ? to_float(aligned[at + i]) : NAN);
      }
    }
    if (page < low_page || page + 8 > high_page) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (page + i < low_page || page + i >= high_page) x[v].set(i, NAN);
      }
    }
  }

  // The largest key at or above which there are `wanted` scores lies in [low, high].
  unsigned low = kLowestKey<Score>, high = kHighestKey<Score>;
  int num_above = 0;  // scores above `high`
  int turn = 0;
  int numbers[1] = {Scores8<Score>::count(x, -INFINITY)};
  sum_counts<kThreads, kCluster>(numbers, shared, turn);
  turn ^= 1;
  const bool enough = numbers[0] >= wanted;  // else NaN fills up
  while (enough && low < high) {
    unsigned keys[kKeysPerStep];
    int counts[kKeysPerStep];
#pragma unroll
    for (int i = 0; i < kKeysPerStep; ++i) {
      const unsigned step = static_cast<unsigned>((uint64_t{high - low} * (i + 1) + kKeysPerStep) / (kKeysPerStep + 1));
      keys[i] = low + step;
      counts[i] = Scores8<Score>::count(x, key_score<Score>(keys[i]));
    }
    sum_counts<kThreads, kCluster>(counts, shared, turn);
    turn ^= 1;
#pragma unroll
    for (int i = kKeysPerStep - 1; i >= 0; --i) {
      if (counts[i] < wanted) {
        high = keys[i] - 1;
        num_above = counts[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kKeysPerStep; ++i) {
      if (counts[i] >= wanted) low = keys[i];
    }
  }
  const float kth = enough ? key_score<Score>(low) : NAN;
  const int ties = wanted - (enough ? num_above : numbers[0]);  // of the scores equal to the k-th

  uint8_t* above_bytes = reinterpret_cast<uint8_t*>(shared.above);
  uint8_t* equal_bytes = reinterpret_cast<uint8_t*>(shared.equal);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int vector = v * kThreads + static_cast<int>(threadIdx.x);
    const int page = block_first + vector * 8;
    unsigned above = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float score = x[v].get(i);
      const bool inside = page + i >= low_page && page + i < high_page;
      above |= unsigned{enough ? score > kth : score == score} << i;
      equal |= unsigned{enough ? score == kth : inside && score != score} << i;
    }
    above_bytes[vector] = static_cast<uint8_t>(above);
    equal_bytes[vector] = static_cast<uint8_t>(equal);
  }
  __syncthreads();

  constexpr int kWordsPerThread = (kVectors + 3) / 4;
  const int first_word = threadIdx.x * kWordsPerThread;
  int2 mine = make_int2(0, 0);
#pragma unroll
  for (int w = 0; w < kWordsPerThread; ++w) {
    if (first_word + w < S::kWords) {
      mine.x += __popc(shared.above[first_word + w]);
      mine.y += __popc(shared.equal[first_word + w]);
    }
  }
  int2 before = prefix_sums<kThreads, kCluster>(mine, shared);
  for (int w = 0; w < kWordsPerThread && first_word + w < S::kWords; ++w) {
    const unsigned above = shared.above[first_word + w];
    unsigned left = above | (before.y < ties ? shared.equal[first_word + w] : 0u);
    while (left != 0u) {
      const int bit = __ffs(left) - 1;
      left &= left - 1u;
      const int page = block_first + (first_word + w) * 32 + bit;
      if (above >> bit & 1u) {
        output.emit(row.sinks + before.x + min(before.y, ties), page);
        ++before.x;
      } else {
        if (before.y < ties) output.emit(row.sinks + before.x + before.y, page);
        ++before.y;
      }
    }
  }
}

template <typename Score, int kThreads, int kVectors, int kCluster>
cudaError_t launch(const TopkPagesParams& p, int64_t rows, cudaStream_t stream) {
  return launch_dependent(topk_bisect_kernel<Score, kThreads, kVectors, kCluster>,
                          dim3(static_cast<unsigned>(rows * kCluster)), dim3(kThreads), 0, stream, kCluster, p,
                          rows * int64_t{p.num_pages});
}

// A thread block holds kThreads * kVectors * 8 scores: those of the row and, where rows do not begin on 16 bytes, up to
// 7 of the row before.
template <typename Score>
cudaError_t launch(const TopkPagesParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t{p.batch} * p.num_query_tokens * p.num_kv_heads;
  const int64_t scores = int64_t{p.num_pages} + (p.num_pages % 8 == 0 ? 0 : 7);
  int device = 0, multiprocessors = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
#ifdef UNIQUE_ATTN_SM90A
  const bool clusters = major == 9;
#else
  const bool clusters = false;  // not built for it
#endif
  // A few rows are spread over the device; for many rows a thread block each is enough parallel work.
  const bool few = clusters && rows * kMaxCluster <= multiprocessors;
  if (few && scores > 8192) {
    if (scores <= 8 * 2048) return launch<Score, 256, 1, 8>(p, rows, stream);
    if (scores <= 8 * 4096) return launch<Score, 512, 1, 8>(p, rows, stream);
    if (scores <= 8 * 16384) return launch<Score, 1024, 2, 8>(p, rows, stream);
  }
  if (scores <= 1024) return launch<Score, 128, 1, 1>(p, rows, stream);
  if (scores <= 2048) return launch<Score, 256, 1, 1>(p, rows, stream);
  if (scores <= 4096) return launch<Score, 256, 2, 1>(p, rows, stream);
  if (scores <= 8192) return launch<Score, 512, 2, 1>(p, rows, stream);
  if (scores <= 16384) return launch<Score, 1024, 2, 1>(p, rows, stream);
  if constexpr (sizeof(Score) == 2) {
    if (scores <= 32768) return launch<Score, 1024, 4, 1>(p, rows, stream);
    if (scores <= 65536) return launch<Score, 512, 16, 1>(p, rows, stream);
    if (clusters && scores <= 2 * 65536) return launch<Score, 512, 16, 2>(p, rows, stream);
    if (clusters && scores <= 8 * 65536) return launch<Score, 512, 16, 8>(p, rows, stream);
  } else {
    if (scores <= 32768) return launch<Score, 512, 8, 1>(p, rows, stream);
    if (clusters && scores <= 2 * 32768) return launch<Score, 512, 8, 2>(p, rows, stream);
    if (clusters && scores <= 8 * 32768) return launch<Score, 512, 8, 8>(p, rows, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace

cudaError_t topk_bisect_cuda(const TopkPagesParams& params, cudaStream_t stream) {
  return params.dtype == DType::kFloat32 ? launch<float>(params, stream) : launch<__nv_bfloat16>(params, stream);
}

}  // namespace unique_attn
