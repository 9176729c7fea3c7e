// Page scores of 16-bit inputs on tensor cores, for every rule but `minmax` (where a query's 0 meets no infinite bound,
// which a product does not know). A warp takes 16 pages at a time as the rows of a product, and all heads
// of a group (of as many query tokens as fit) as its columns, so that each index entry is read once. The sum over the
// channels may run in any order that both sides share: a lane reads 16 bytes, 8 neighbouring channels, and these are
// its part of two products of 16 channels. Entries go from memory straight into the operands.
//
// Squares are rounded to bf16, whose range holds them, as in training: the sum over the channels errs by less than the
// rounding of the score to its order key.
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

template <typename T, Form kForm, int kSteps>
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
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    const int tile = row / kColumns;
    const int lane = row % kColumns * 4 + chunk % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int step = chunk / 4 * 2 + half;
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

template <typename T, Form kForm, int kSteps>
__global__ void __launch_bounds__(kThreads)
    page_scores_mma_kernel(const PageScoresParams p, int tokens_per_tile, int num_token_tiles, int pages_per_block) {
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Queries<kForm, kSteps>*>(shared_bytes);
  constexpr int kBlocks = kSteps / 2;  // of 32 channels, 8 per lane of a quad
  constexpr bool kTwoVectors = kForm == Form::kVariance;
  const ScoreTile tile = score_tile(p, tokens_per_tile, num_token_tiles, pages_per_block);
  const bool nothing = max(tile.first_page, tile.page_begin) >= min(tile.last.end, tile.page_end);
  if (nothing && !p.fill_outside) return;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int num_rows = tile.num_tokens * group;
  const int num_tiles = (num_rows + kColumns - 1) / kColumns;
  if (!nothing) load_queries<T>(shared, p, tile.b, tile.head, tile.token_begin, num_rows, group);

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
      uint4 a[kBlocks][2], b[kTwoVectors ? kBlocks : 1][2];
      float std[2] = {0.f, 0.f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int page = base + lane / 4 + half * 8;
        const bool visible = is_visible(page);
        const uint8_t* entry = p.index.data + tile.head * p.index.stride_head;
        if (visible) {
          entry += table[page / table_pages] * p.index.stride_block + page % table_pages * p.index.stride_page;
        }
        const T* vectors = reinterpret_cast<const T*>(entry);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const int channel = (j * 4 + lane % 4) * 8;
          const bool valid = visible && channel < p.head_dim;
          a[j][half] = valid ? *reinterpret_cast<const uint4*>(vectors + channel) : make_uint4(0, 0, 0, 0);
          if constexpr (kTwoVectors) {
            b[j][half] =
                valid ? *reinterpret_cast<const uint4*>(vectors + p.head_dim + channel) : make_uint4(0, 0, 0, 0);
          }
        }
        if (kForm == Form::kUnique && visible) std[half] = to_float(vectors[p.head_dim]);
      }
      // Operands of a k-step: words 0 and 1 of both rows, then words 2 and 3.
      unsigned squares[kTwoVectors ? kSteps : 1][4];
      if constexpr (kTwoVectors) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint4& raw = b[step / 2][i % 2];
            const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
            const unsigned word = words[step % 2 * 2 + i / 2];
            squares[step][i] = square2<T>(word);
          }
        }
      }
      for (int n = 0; n < num_tiles; ++n) {
        float u[4] = {}, v[4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          unsigned first[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint4& raw = a[step / 2][i % 2];
            const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
            first[i] = words[step % 2 * 2 + i / 2];
          }
          const uint2 q = shared.operand[n][0][step][lane];
          mma16816<T>(u, first, q.x, q.y);
          if constexpr (kForm == Form::kVariance) {
            const uint2 q_squares = shared.operand[n][1][step][lane];
            mma16816<__nv_bfloat16>(v, squares[step], q_squares.x, q_squares.y);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = n * kColumns + lane % 4 * 2 + i % 2;
          float score = u[i];
          if constexpr (kForm == Form::kVariance) score = fmaf(c, sqrtf(v[i]), score);
          if constexpr (kForm == Form::kUnique) score = fmaf(c * shared.norm[row], std[i / 2], score);
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

template <typename T, Form kForm, int kSteps>
cudaError_t launch(const PageScoresParams& p, int num_sms, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  const int fitting = kMaxTiles * kColumns / group;
  const int tokens = fitting < p.num_query_tokens ? fitting : p.num_query_tokens;
  const int num_token_tiles = (p.num_query_tokens + tokens - 1) / tokens;
  const int chunk = plan_score_chunk(p.batch * num_token_tiles, p.num_kv_heads, p.num_pages, kWarps * kPages, num_sms);
  const auto kernel = page_scores_mma_kernel<T, kForm, kSteps>;
  constexpr int kBytes = sizeof(Queries<kForm, kSteps>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(p.batch * num_token_tiles, (p.num_pages + chunk - 1) / chunk, p.num_kv_heads);
  kernel<<<grid, kThreads, kBytes, stream>>>(p, tokens, num_token_tiles, chunk);
  return cudaGetLastError();
}

template <typename T, Form kForm>
cudaError_t launch_depth(const PageScoresParams& p, int num_sms, cudaStream_t stream) {
  return p.head_dim <= 64    ? launch<T, kForm, 4>(p, num_sms, stream)
         : p.head_dim <= 128 ? launch<T, kForm, 8>(p, num_sms, stream)
                             : launch<T, kForm, 16>(p, num_sms, stream);
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

cudaError_t page_scores_mma_cuda(const PageScoresParams& params, int num_sms, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16 ? launch_form<__nv_bfloat16>(params, num_sms, stream)
                                          : launch_form<__half>(params, num_sms, stream);
}

}  // namespace unique_attn
