// Each index entry is read once for all heads of its group (and for as many query tokens as fit in shared memory).
// Eight lanes share a page: each holds its channels of the entry in registers and meets every query with them; the
// partial sums are added by shuffles.
#include "core/select/page_scores_common.cuh"

namespace unique_attn {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;                             // lanes per page
constexpr int kPagesPerStep = kThreads / kLanes;      // pages a block scores at once
constexpr size_t kQueryBytes = 48 * 1024;             // shared memory for the queries
constexpr int kMaxChunks = kMaxHeadDim / 8 / kLanes;  // 8-channel chunks per lane

__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// Chunk c of query row r in shared memory: its two float4 halves lie apart, so that the lanes of a page read
// neighbouring 16-byte words (no bank conflicts).
__device__ __forceinline__ int half_offset(int row, int half, int chunk, int num_chunks) {
  return ((row * 2 + half) * num_chunks + chunk) * 4;
}

// A chunk of 8 channels of an entry's vectors, kept raw until used, so that many loads can be in flight at once.
template <typename T, typename RuleT, bool kCompressed>
struct EntryChunk {
  Vec8<T> raw_a, raw_b;
  __device__ __forceinline__ void zero() {
    raw_a.zero();
    raw_b.zero();
  }
  __device__ __forceinline__ void load(const uint8_t* entry, int head_dim, int chunk) {
    const T* vectors = reinterpret_cast<const T*>(entry);
    raw_a.load(vectors + chunk * 8);
    if (RuleT::kVectors > 1) raw_b.load(vectors + head_dim + chunk * 8);
  }
  __device__ __forceinline__ void unpack(float (&a)[8], float (&b)[8]) const {
    raw_a.unpack(a);
    if (RuleT::kVectors > 1) raw_b.unpack(b);
  }
  static __device__ __forceinline__ float scalar(const uint8_t* entry, int head_dim) {
    return to_float(reinterpret_cast<const T*>(entry)[RuleT::kVectors * head_dim]);
  }
};

template <typename T, typename RuleT>
struct EntryChunk<T, RuleT, true> {
  GroupScales scales;
  uint32_t mean_codes;
  uint32_t std_codes;
  __device__ __forceinline__ void zero() {
    scales = {0, 0, 0};
    mean_codes = std_codes = 0;
  }
  __device__ __forceinline__ void load(const uint8_t* entry, int head_dim, int chunk) {
    scales = reinterpret_cast<const GroupScales*>(entry)[chunk * 8 / group_channels(head_dim)];
    mean_codes = reinterpret_cast<const uint32_t*>(entry + means_offset(head_dim))[chunk];
    if (RuleT::kVectors > 1) std_codes = reinterpret_cast<const uint16_t*>(entry + spreads_offset(head_dim))[chunk];
  }
  __device__ __forceinline__ void unpack(float (&a)[8], float (&b)[8]) const {
    const GroupValues values(scales);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      a[i] = values.mean(static_cast<int>((mean_codes >> 4 * i & 15) ^ 8) - 8);
      if (RuleT::kVectors > 1) b[i] = values.std(std_codes >> 2 * i & 3);
    }
  }
  static __device__ __forceinline__ float scalar(const uint8_t* entry, int head_dim) {
    float squares = 0.f;
    for (int group = 0; group < num_groups(head_dim); ++group) {
      const float spread = decode_float8(reinterpret_cast<const GroupScales*>(entry)[group].spread);
      squares += spread * spread;
    }
    return sqrtf(squares);
  }
};

// CPL: chunks per lane.
template <typename T, typename RuleT, bool kCompressed, int CPL>
__global__ void __launch_bounds__(kThreads) page_scores_kernel(const PageScoresParams p, const ScoreGrid grid) {
  extern __shared__ __align__(16) float shared[];
  using Score = ScoreOf<T>;
  const ScoreTile tile = score_tile<kPagesPerStep>(p, grid);
  const int num_tokens = tile.num_tokens;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int num_chunks = p.head_dim / 8;
  const bool nothing = max(tile.seen.first, tile.page_begin) >= min(tile.seen.end, tile.page_end);
  if (nothing && !p.fill_outside) return;

  float* q_norms = shared + num_tokens * group * p.head_dim;
  if (!nothing) {
    for (int i = threadIdx.x; i < num_tokens * group * num_chunks; i += kThreads) {
      const int chunk = i % num_chunks;
      const int row = i / num_chunks;
      const T* source = static_cast<const T*>(p.q.data) + tile.b * p.q.stride_batch +
                        (tile.token_begin + row / group) * p.q.stride_token +
                        (tile.head * group + row % group) * p.q.stride_head + chunk * 8;
      Vec8<T> raw;
      raw.load(source);
      float x[8];
      raw.unpack(x);
      *reinterpret_cast<float4*>(shared + half_offset(row, 0, chunk, num_chunks)) = make_float4(x[0], x[1], x[2], x[3]);
      *reinterpret_cast<float4*>(shared + half_offset(row, 1, chunk, num_chunks)) = make_float4(x[4], x[5], x[6], x[7]);
    }
    __syncthreads();
    if (RuleT::kScalar) {
      for (int row = threadIdx.x / kWarp; row < num_tokens * group; row += kThreads / kWarp) {
        float sum = 0.f;
        for (int d = threadIdx.x % kWarp; d < p.head_dim; d += kWarp) {
          const float x = shared[row * p.head_dim + d];
          sum += x * x;
        }
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
        if (threadIdx.x % kWarp == 0) q_norms[row] = sqrtf(sum);
      }
      __syncthreads();
    }
  }

  const int lane = threadIdx.x % kLanes;
  const int pages_per_block = p.table.block_size / p.table.page_size;
  const int32_t* table = p.table.blocks + tile.b * p.table.stride_seq;
  // Every lane of a warp stays in the loop, for the shuffles.
  for (int base = tile.page_begin; base < tile.page_end; base += kPagesPerStep) {
    const int page = base + static_cast<int>(threadIdx.x) / kLanes;
    const bool in_row = page < tile.page_end;
    const bool visible = in_row && page >= tile.seen.first && page < tile.seen.end;
    if (__all_sync(kFullMask, !visible) && !p.fill_outside) continue;

    EntryChunk<T, RuleT, kCompressed> raw[CPL];
    float scalar = 0.f;
#pragma unroll
    for (int i = 0; i < CPL; ++i) raw[i].zero();
    const int block = visible ? table[page / pages_per_block] : -1;
    const bool exists = is_index(block, p.table.num_blocks);
    if (exists) {
      const uint8_t* entry = p.index.data + block * p.index.stride_block + tile.head * p.index.stride_head +
                             (page % pages_per_block) * p.index.stride_page;
#pragma unroll
      for (int i = 0; i < CPL; ++i) {
        const int chunk = lane + i * kLanes;
        if (chunk < num_chunks) raw[i].load(entry, p.head_dim, chunk);
      }
      if (RuleT::kScalar) scalar = EntryChunk<T, RuleT, kCompressed>::scalar(entry, p.head_dim);
    }
    float a[CPL][8], c[CPL][8];
#pragma unroll
    for (int i = 0; i < CPL; ++i) raw[i].unpack(a[i], c[i]);

    for (int t = 0; t < num_tokens; ++t) {
      float best = -INFINITY;
      bool any_nan = !exists;
      for (int g = 0; g < group; ++g) {
        const int row = t * group + g;
        float u = 0.f, v = 0.f;
#pragma unroll
        for (int i = 0; i < CPL; ++i) {
          const int chunk = lane + i * kLanes;
          if (chunk < num_chunks) {
            const float4 lo = *reinterpret_cast<const float4*>(shared + half_offset(row, 0, chunk, num_chunks));
            const float4 hi = *reinterpret_cast<const float4*>(shared + half_offset(row, 1, chunk, num_chunks));
            const float x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) RuleT::accumulate(x[j], a[i][j], RuleT::kVectors > 1 ? c[i][j] : 0.f, u, v);
          }
        }
        u = lane_sum(u);
        if (RuleT::kSums > 1) v = lane_sum(v);
        const float score =
            RuleT::finish(u, v, scalar, RuleT::kScalar ? q_norms[row] : 0.f, static_cast<float>(p.spread_weight));
        any_nan = any_nan || isnan(score);
        best = fmaxf(best, score);
      }
      if (lane == 0 && in_row) store_score<Score>(p, tile, t, page, any_nan ? NAN : best);
    }
  }
}

template <typename T, typename RuleT, bool kCompressed, int CPL>
cudaError_t launch(const PageScoresParams& p, const DeviceFacts& device, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  const size_t bytes_per_token = size_t(group) * (p.head_dim + 1) * sizeof(float);
  const int fitting = static_cast<int>(kQueryBytes / bytes_per_token);
  const int tokens = fitting < 1 ? 1 : (fitting < p.num_query_tokens ? fitting : p.num_query_tokens);
  const auto kernel = page_scores_kernel<T, RuleT, kCompressed, CPL>;
  static ResidentBlocks resident;
  const ScoreGrid grid = plan_score_grid(p, tokens, kPagesPerStep,
                                         resident.get(device, kernel, kThreads, kQueryBytes) * device.multiprocessors);
  kernel<<<score_blocks(p, grid), kThreads, tokens * bytes_per_token, stream>>>(p, grid);
  return cudaGetLastError();
}

}  // namespace

cudaError_t page_scores_cuda(const PageScoresParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.num_kv_heads == 0 || params.row_pages == 0) return cudaSuccess;
  DeviceFacts device;
  cudaError_t error = device_facts(device);
  if (error != cudaSuccess) return error;
  if (page_scores_on_mma(params)) return page_scores_mma_cuda(params, device, stream);
  const int chunks_per_lane = (params.head_dim / 8 + kLanes - 1) / kLanes;
  static_assert(kMaxChunks == 4, "the launch below covers 1 to 4 chunks per lane");
  UA_DISPATCH_CUDA_DTYPE(params.dtype, T, UA_DISPATCH_INDEX(params.index.format, params.rule, RuleT, kCompressed, {
                           error = chunks_per_lane == 1   ? launch<T, RuleT, kCompressed, 1>(params, device, stream)
                                   : chunks_per_lane == 2 ? launch<T, RuleT, kCompressed, 2>(params, device, stream)
                                                          : launch<T, RuleT, kCompressed, 4>(params, device, stream);
                         }));
  return error;
}

}  // namespace unique_attn
