// Page scores of 16-bit inputs on tensor cores, for every rule but `minmax` (where a query's 0 meets no infinite bound,
// which a product does not know). A warp takes 16 pages at a time as the rows of a product, and all heads
// of a group (of as many query tokens as fit) as its columns, so that each index entry is read once. The sum over the
// channels may run in any order that both sides share: a lane reads 16 bytes, 8 neighbouring channels, and these are
// its part of two products of 16 channels. Entries go from memory straight into the operands.
//
// Squares are rounded to bf16, whose range holds them, as in training: the sum over the channels errs by less than the
// rounding of the score to its order key.
#include "dependent_launch.cuh"
#include "mma_tile.cuh"
#include "page_scores_common.cuh"

namespace unique_attn {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPages = 16;    // of a warp's tile
constexpr int kColumns = 8;   // query rows of a product
constexpr int kMaxTiles = 8;  // products side by side: query rows a thread block can hold / 8

// What a rule multiplies, and how its sums become a score.
enum class Form {
  kMean,      // u
  kUnique,    // u + c * norm * std
  kVariance,  // u + c * sqrt(v): `directional`
};

template <Form kForm>
constexpr int kOperands = kForm == Form::kVariance ? 2 : 1;  // of a query

// Operands of the query rows, as lanes need them: [tile of 8 rows, operand, k-step, lane].
template <Form kForm, int kSteps>
struct Queries {
  uint2 operand[kMaxTiles][kOperands<kForm>][kSteps][kWarp];
  float norm[kMaxTiles * kColumns];
  float scores[kWarps][kPages][kMaxTiles * kColumns + 1];
};

template <typename T>
__device__ __forceinline__ float2 unpack2(unsigned pair) {
  const T* x = reinterpret_cast<const T*>(&pair);
  return make_float2(to_float(x[0]), to_float(x[1]));
}

template <typename T>
__device__ __forceinline__ unsigned square2(unsigned pair) {
  const float2 x = unpack2<T>(pair);
  return pack2<__nv_bfloat16>(x.x * x.x, x.y * x.y);
}

// ---- Entries as operands ----
//
// A lane of a quad has kSteps * 4 channels of a page, in chunks of 8. `chunk_lane` says which; `pair(step, i)` is half i
// (of two) of what the lane gives to a k-step, two channels, for a query in the same order (`query_words`).

template <int kCount>
__device__ __forceinline__ void load_words(unsigned (&words)[kCount], const void* source) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const uint4 raw = static_cast<const uint4*>(source)[i];
      words[4 * i] = raw.x, words[4 * i + 1] = raw.y, words[4 * i + 2] = raw.z, words[4 * i + 3] = raw.w;
    }
  } else if constexpr (kCount == 2) {
    const uint2 raw = *static_cast<const uint2*>(source);
    words[0] = raw.x, words[1] = raw.y;
  } else {
    words[0] = *static_cast<const unsigned*>(source);
  }
}

// Vectors in the keys' dtype: chunk after chunk goes round the lanes, so that they read neighbouring 16 bytes.
template <typename T, Form kForm, int kSteps>
struct ExactRow {
  static constexpr int kChunks = kSteps / 2;
  unsigned mean[kChunks][4], std[kForm == Form::kVariance ? kChunks : 1][4];
  float scalar;  // `unique`

  static __device__ __forceinline__ int chunk_lane(int chunk) { return chunk % 4; }
  static __device__ __forceinline__ int chunk_of_lane(int chunk) { return chunk / 4; }
  static __device__ __forceinline__ void query_words(unsigned (&)[4]) {}

  __device__ __forceinline__ void load(const uint8_t* entry, bool visible, int head_dim) {
    const T* vectors = reinterpret_cast<const T*>(entry);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int channel = (j * 4 + static_cast<int>(threadIdx.x) % 4) * 8;
      const bool valid = visible && channel < head_dim;
#pragma unroll
      for (int i = 0; i < 4; ++i) mean[j][i] = 0u;
      if (valid) load_words(mean[j], vectors + channel);
      if constexpr (kForm == Form::kVariance) {
#pragma unroll
        for (int i = 0; i < 4; ++i) std[j][i] = 0u;
        if (valid) load_words(std[j], vectors + head_dim + channel);
      }
    }
    scalar = kForm == Form::kUnique && visible ? to_float(vectors[head_dim]) : 0.f;
  }
  __device__ __forceinline__ unsigned mean_pair(int step, int i) const { return mean[step / 2][step % 2 * 2 + i]; }
  __device__ __forceinline__ unsigned var_pair(int step, int i) const {
    return square2<T>(std[step / 2][step % 2 * 2 + i]);
  }
};

// Compressed entries (index_format.h) of 64, 128 or 256 channels: a lane has neighbouring channels, one or two whole
// groups. Codes become bf16 numbers without a loss: a step has 4 significant bits, a code 3. Of an outlier 8 of 11 bits
// are kept, as of a mean in a bf16 index.
template <Form kForm, int kSteps>
struct CompressedRow {
  static constexpr int kHeadDim = kSteps * 16;
  static constexpr int kChunks = kSteps / 2;
  static constexpr int kGroups = kSteps > 8 ? kSteps / 8 : 1;   // of a lane
  unsigned means[kChunks];                                      // 8 codes of 4 bits
  unsigned spreads[kForm == Form::kVariance ? kSteps / 4 : 1];  // 16 codes of 2 bits
  unsigned scales[kGroups];
  __nv_bfloat162 step[kGroups];
  unsigned outlier[kGroups];       // twice
  unsigned variances[kGroups][2];  // of the 4 codes
  float scalar;

  static __device__ __forceinline__ int chunk_lane(int chunk) { return chunk / kChunks; }
  static __device__ __forceinline__ int chunk_of_lane(int chunk) { return chunk % kChunks; }
  // Channels 4 apart lie in one word: their codes come out of a word of codes together.
  static __device__ __forceinline__ void query_words(unsigned (&w)[4]) {
    const unsigned x[4] = {w[0], w[1], w[2], w[3]};
    w[0] = __byte_perm(x[0], x[2], 0x5410);
    w[1] = __byte_perm(x[0], x[2], 0x7632);
    w[2] = __byte_perm(x[1], x[3], 0x5410);
    w[3] = __byte_perm(x[1], x[3], 0x7632);
  }

  __device__ __forceinline__ void load(const uint8_t* entry, bool visible, int) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (unsigned& word : means) word = 0u;
#pragma unroll
    for (unsigned& word : spreads) word = 0u;
#pragma unroll
    for (unsigned& word : scales) word = 0u;
    if (visible) {
      load_words(scales, entry + lane * kGroups * sizeof(GroupScales));
      load_words(means, entry + means_offset(kHeadDim) + lane * kHeadDim / 8);
      if constexpr (kForm == Form::kVariance) {
        load_words(spreads, entry + spreads_offset(kHeadDim) + lane * kHeadDim / 16);
      }
    }
  }
  // After the loads of all rows are under way.
  __device__ __forceinline__ void decode() {
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const GroupValues values(GroupScales{static_cast<uint16_t>(scales[g]), static_cast<uint8_t>(scales[g] >> 16),
                                           static_cast<uint8_t>(scales[g] >> 24)});
      step[g] = __float2bfloat162_rn(values.step);
      outlier[g] = pack2<__nv_bfloat16>(values.outlier, values.outlier);
      if constexpr (kForm == Form::kVariance) {
        const auto square = [&](int code) { return values.std(code) * values.std(code); };
        variances[g][0] = pack2<__nv_bfloat16>(square(0), square(1));
        variances[g][1] = pack2<__nv_bfloat16>(square(2), square(3));
      }
      sum += values.spread * values.spread;
    }
    if constexpr (kForm == Form::kUnique) {
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
    }
    scalar = sqrtf(sum);
  }
  __device__ __forceinline__ unsigned mean_pair(int k, int i) const {
    const int group = k / 2 * kGroups / kChunks;
    // 4 bits in the last places of bf16's 128 are 128 + bits; with the sign bit turned that is 136 + code.
    const unsigned bits = ((means[k / 2] >> (k % 2 * 2 + i) * 4 & 0x000f000fu) ^ 0x00080008u) | 0x43004300u;
    const __nv_bfloat162 code = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&bits), __float2bfloat162_rn(136.f));
    const __nv_bfloat162 value = __hmul2(code, step[group]);
    const unsigned is_outlier = __heq2_mask(code, __float2bfloat162_rn(static_cast<float>(kOutlierCode)));
    return (outlier[group] & is_outlier) | (*reinterpret_cast<const unsigned*>(&value) & ~is_outlier);
  }
  __device__ __forceinline__ unsigned var_pair(int k, int i) const {
    const int group = k / 2 * kGroups / kChunks;
    // Codes of channels 4 apart, a byte each; bytes 2 code and 2 code + 1 of the table for both.
    const unsigned codes = spreads[k / 4] >> (k / 2 % 2 * 16 + (k % 2 * 2 + i) * 2) & 0x0303u;
    return __byte_perm(variances[group][0], variances[group][1], codes * 0x22u + 0x1010u);
  }
};

template <typename T, typename Row, Form kForm, int kSteps>
__device__ __forceinline__ void load_queries(Queries<kForm, kSteps>& shared, const PageScoresParams& p, int b, int head,
                                             int token_begin, int num_rows, int group) {
  const int num_tiles = (num_rows + kColumns - 1) / kColumns;
  for (int row = threadIdx.x; row < kMaxTiles * kColumns; row += kThreads) shared.norm[row] = 0.f;
  __syncthreads();
  constexpr int kChunks = kSteps * 2;  // of 8 channels
  for (int i = threadIdx.x; i < num_tiles * kColumns * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (row < num_rows && chunk * 8 < p.head_dim) {
      raw = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.q.data) + b * p.q.stride_batch +
                                            (token_begin + row / group) * p.q.stride_token +
                                            (head * group + row % group) * p.q.stride_head + chunk * 8);
    }
    unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    Row::query_words(words);
    const int tile = row / kColumns;
    const int lane = row % kColumns * 4 + Row::chunk_lane(chunk);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int step = Row::chunk_of_lane(chunk) * 2 + half;
      const unsigned a = words[half * 2], c = words[half * 2 + 1];
      shared.operand[tile][0][step][lane] = make_uint2(a, c);
      if constexpr (kForm == Form::kVariance) {
        shared.operand[tile][1][step][lane] = make_uint2(square2<T>(a), square2<T>(c));
      }
    }
  }
  if constexpr (kForm == Form::kUnique) {
    for (int row = threadIdx.x / kWarp; row < num_rows; row += kWarps) {
      const T* q = static_cast<const T*>(p.q.data) + b * p.q.stride_batch +
                   (token_begin + row / group) * p.q.stride_token + (head * group + row % group) * p.q.stride_head;
      float sum = 0.f;
      for (int d = threadIdx.x % kWarp; d < p.head_dim; d += kWarp) sum += to_float(q[d]) * to_float(q[d]);
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
      if (threadIdx.x % kWarp == 0) shared.norm[row] = sqrtf(sum);
    }
  }
  __syncthreads();
}

template <typename T, typename Row, Form kForm, int kSteps>
__global__ void __launch_bounds__(kThreads)
    page_scores_mma_kernel(const PageScoresParams p, int tokens_per_tile, int num_token_tiles, int pages_per_block) {
  wait_for_previous_kernel();
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Queries<kForm, kSteps>*>(shared_bytes);
  constexpr bool kDecodes = !std::is_same_v<Row, ExactRow<T, kForm, kSteps>>;
  const ScoreTile tile = score_tile(p, tokens_per_tile, num_token_tiles, pages_per_block);
  const bool nothing = max(tile.first_page, tile.page_begin) >= min(tile.last.end, tile.page_end);
  if (nothing && !p.fill_outside) return;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int num_rows = tile.num_tokens * group;
  const int num_tiles = (num_rows + kColumns - 1) / kColumns;
  if (!nothing) load_queries<T, Row>(shared, p, tile.b, tile.head, tile.token_begin, num_rows, group);

  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int table_pages = p.table.block_size / p.table.page_size;
  const int32_t* table = p.table.blocks + tile.b * p.table.stride_seq;
  const float c = static_cast<float>(p.spread);
  const auto is_visible = [&](int page) {
    return page < tile.page_end && page >= tile.first_page && page < tile.last.end;
  };

  for (int base = tile.page_begin + warp * kPages; base < tile.page_end; base += kWarps * kPages) {
    const bool any = max(base, tile.first_page) < min(base + kPages, min(tile.last.end, tile.page_end));
    if (!any && !p.fill_outside) continue;
    if (any) {
      // Rows lane / 4 and lane / 4 + 8 of the tile; zeros for what no token sees.
      Row rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int page = base + lane / 4 + half * 8;
        const bool visible = is_visible(page);
        const uint8_t* entry = p.index.data + tile.head * p.index.stride_head;
        if (visible) {
          entry += table[page / table_pages] * p.index.stride_block + page % table_pages * p.index.stride_page;
        }
        rows[half].load(entry, visible, p.head_dim);
      }
      if constexpr (kDecodes) {
        rows[0].decode();
        rows[1].decode();
      }
      unsigned mean[kSteps][4], var[kForm == Form::kVariance ? kSteps : 1][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mean[step][i] = rows[i % 2].mean_pair(step, i / 2);
          if constexpr (kForm == Form::kVariance) var[step][i] = rows[i % 2].var_pair(step, i / 2);
        }
      }
      for (int n = 0; n < num_tiles; ++n) {
        float u[4] = {}, v[4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint2 q = shared.operand[n][0][step][lane];
          mma16816<T>(u, mean[step], q.x, q.y);
          if constexpr (kForm == Form::kVariance) {
            const uint2 q_squares = shared.operand[n][1][step][lane];
            mma16816<__nv_bfloat16>(v, var[step], q_squares.x, q_squares.y);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = n * kColumns + lane % 4 * 2 + i % 2;
          float score = u[i];
          if constexpr (kForm == Form::kVariance) score = fmaf(c, sqrtf(v[i]), score);
          if constexpr (kForm == Form::kUnique) score = fmaf(c * shared.norm[row], rows[i / 2].scalar, score);
          shared.scores[warp][lane / 4 + i / 2 * 8][row] = score;
        }
      }
    }
    __syncwarp();
    for (int i = lane; i < tile.num_tokens * kPages; i += kWarp) {
      const int token = i / kPages;
      const int page = base + i % kPages;
      if (page >= tile.page_end) continue;
      float best = -INFINITY;
      bool any_nan = false;
      if (any) {
        const float* scores = shared.scores[warp][i % kPages] + token * group;
        for (int g = 0; g < group; ++g) {
          any_nan = any_nan || isnan(scores[g]);
          best = fmaxf(best, scores[g]);
        }
      }
      store_score<__nv_bfloat16>(p, tile, token, page, any_nan ? NAN : best);
    }
    __syncwarp();
  }
}

template <typename T, typename Row, Form kForm, int kSteps>
cudaError_t launch(const PageScoresParams& p, int num_sms, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  const int fitting = kMaxTiles * kColumns / group;
  const int tokens = fitting < p.num_query_tokens ? fitting : p.num_query_tokens;
  const int num_token_tiles = (p.num_query_tokens + tokens - 1) / tokens;
  const int chunk = plan_score_chunk(p.batch * num_token_tiles, p.num_kv_heads, p.num_pages, kWarps * kPages, num_sms);
  const auto kernel = page_scores_mma_kernel<T, Row, kForm, kSteps>;
  constexpr int kBytes = sizeof(Queries<kForm, kSteps>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(p.batch * num_token_tiles, (p.num_pages + chunk - 1) / chunk, p.num_kv_heads);
  return launch_dependent(kernel, grid, kThreads, kBytes, stream, p, tokens, num_token_tiles, chunk);
}

template <typename T, Form kForm, int kSteps>
cudaError_t launch_format(const PageScoresParams& p, int num_sms, cudaStream_t stream) {
  if (p.index.format == IndexFormat::kExact) {
    return launch<T, ExactRow<T, kForm, kSteps>, kForm, kSteps>(p, num_sms, stream);
  }
  return launch<__nv_bfloat16, CompressedRow<kForm, kSteps>, kForm, kSteps>(p, num_sms, stream);
}

template <typename T, Form kForm>
cudaError_t launch_depth(const PageScoresParams& p, int num_sms, cudaStream_t stream) {
  return p.head_dim <= 64    ? launch_format<T, kForm, 4>(p, num_sms, stream)
         : p.head_dim <= 128 ? launch_format<T, kForm, 8>(p, num_sms, stream)
                             : launch_format<T, kForm, 16>(p, num_sms, stream);
}

template <typename T>
cudaError_t launch_form(const PageScoresParams& p, int num_sms, cudaStream_t stream) {
  switch (p.rule) {
    case Rule::kMean:
      return launch_depth<T, Form::kMean>(p, num_sms, stream);
    case Rule::kUnique:
      return launch_depth<T, Form::kUnique>(p, num_sms, stream);
    case Rule::kDirectional:
      return launch_depth<T, Form::kVariance>(p, num_sms, stream);
    case Rule::kMinMax:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool page_scores_on_mma(const PageScoresParams& p) {
  if (p.rule == Rule::kMinMax || p.dtype == DType::kFloat32) return false;
  if (p.index.format == IndexFormat::kExact) return true;
  return p.dtype == DType::kBFloat16 && (p.head_dim == 64 || p.head_dim == 128 || p.head_dim == 256);
}

cudaError_t page_scores_mma_cuda(const PageScoresParams& params, int num_sms, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16 ? launch_form<__nv_bfloat16>(params, num_sms, stream)
                                          : launch_form<__half>(params, num_sms, stream);
}

}  // namespace unique_attn
