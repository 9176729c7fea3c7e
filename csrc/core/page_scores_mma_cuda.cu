// Page scores of 16-bit inputs on tensor cores, for every rule but `minmax` (where a query's 0 meets no infinite bound,
// which a product does not know). A warp takes 16 pages at a time as the rows of a product, and all heads
// of a group (of as many query tokens as fit) as its columns, so that each index entry is read once. The sum over the
// channels may run in any order that both sides share: a lane reads 16 bytes, 8 neighbouring channels, and these are
// its part of two products of 16 channels. Entries go from memory straight into the operands; the loads of the next
// pages are under way while the present ones are multiplied.
//
// Squares are rounded to bf16, whose range holds them, as in training: the sum over the channels errs by less than the
// rounding of the score to its order key.
#include "dependent_launch.cuh"
#include "page_scores_common.cuh"
#include "page_scores_rows.cuh"

namespace unique_attn {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPages = 16;              // of a warp's tile
constexpr int kStep = kWarps * kPages;  // pages between two tiles of a warp
constexpr int kColumns = 8;             // query rows of a product
constexpr int kMaxTiles = 8;            // products side by side: query rows a thread block can hold / 8

template <Form kForm>
constexpr int kOperands = kForm == Form::kVariance ? 2 : 1;  // of a query

// Operands of the query rows, as lanes need them: [tile of 8 rows, operand, k-step, lane]. One tile is one token, whose
// heads meet in registers; the scores of several tokens go through shared memory.
template <Form kForm, int kSteps, int kTiles>
struct Queries {
  static constexpr int kScores = kTiles > 1 ? kTiles * kColumns + 1 : 1;
  uint2 operand[kTiles][kOperands<kForm>][kSteps][kWarp];
  float norm[kTiles * kColumns];
  float scores[kWarps][kPages][kScores];
};

template <typename T, typename Row, Form kForm, int kSteps, int kTiles>
__device__ __forceinline__ void load_queries(Queries<kForm, kSteps, kTiles>& shared, const PageScoresParams& p, int b,
                                             int head, int token_begin, int num_rows, int group) {
  const int num_tiles = (num_rows + kColumns - 1) / kColumns;
  for (int row = threadIdx.x; row < kTiles * kColumns; row += kThreads) shared.norm[row] = 0.f;
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

// Where the entries of a lane's row of the tiles are: pages kStep apart, without a division for each.
class EntryCursor {
 public:
  __device__ __forceinline__ EntryCursor(const PageScoresParams& p, int page)
      : page_(page),
        table_pages_(p.table.block_size / p.table.page_size),
        block_(page / table_pages_),
        within_(page % table_pages_),
        blocks_per_step_(kStep / table_pages_),
        pages_per_step_(kStep % table_pages_) {}

  // The first page of the index stands in for pages that no token of the tile sees (the table ends with the sequence):
  // a row's score depends on nothing but its own entry.
  __device__ __forceinline__ const uint8_t* entry(const PageScoresParams& p, const ScoreTile& tile) const {
    const uint8_t* entries = p.index.data + tile.head * p.index.stride_head;
    if (page_ >= tile.page_end || page_ < tile.first_page || page_ >= tile.last.end) return entries;
    const int block = p.table.blocks[tile.b * p.table.stride_seq + block_];
    // Factors of 32 bits: one instruction each.
    return entries + int64_t{block} * static_cast<int>(p.index.stride_block) +
           within_ * static_cast<int>(p.index.stride_page);
  }
  __device__ __forceinline__ void advance() {
    page_ += kStep;
    block_ += blocks_per_step_;
    within_ += pages_per_step_;
    if (within_ >= table_pages_) {
      within_ -= table_pages_;
      ++block_;
    }
  }

 private:
  int page_, table_pages_, block_, within_, blocks_per_step_, pages_per_step_;
};

// Rows lane / 4 and lane / 4 + 8 of a warp's tiles, Row::kAhead tiles ahead of their use. Addresses are looked up one
// tile before they are read.
template <typename Row>
class RowStream {
 public:
  // `any`: whether the tile sees a page at all; else the index may be empty, and nothing is read.
  __device__ __forceinline__ RowStream(const PageScoresParams& p, const ScoreTile& tile, int page, bool any)
      : p_(p), tile_(tile), any_(any), cursors_{{p, page}, {p, page + 8}} {
    look_up();
#pragma unroll
    for (int i = 0; i < Row::kAhead; ++i) fetch(ahead_[i]);
  }
  __device__ __forceinline__ void next(Row (&rows)[2]) {
    if constexpr (Row::kAhead == 0) {
      fetch(rows);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows[half] = ahead_[0][half];
#pragma unroll
        for (int i = 1; i < Row::kAhead; ++i) ahead_[i - 1][half] = ahead_[i][half];
      }
      fetch(ahead_[Row::kAhead - 1]);
    }
  }

 private:
  __device__ __forceinline__ void look_up() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      entries_[half] = cursors_[half].entry(p_, tile_);
      cursors_[half].advance();
    }
  }
  __device__ __forceinline__ void fetch(Row (&rows)[2]) {
    if (!any_) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[half].load(entries_[half], p_.head_dim);
    look_up();
  }

  const PageScoresParams& p_;
  const ScoreTile& tile_;
  const bool any_;
  EntryCursor cursors_[2];
  const uint8_t* entries_[2];
  Row ahead_[Row::kAhead > 0 ? Row::kAhead : 1][2];
};

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Thread blocks a multiprocessor must hold, or registers would be spent on fewer.
template <typename Row, int kSteps, int kTiles>
constexpr int kResident = kSteps > 8 || kTiles > 1 ? 1
                          : Row::kSmall            ? 5
                                                   : 3;

template <typename T, typename Row, Form kForm, int kSteps, int kTiles>
__global__ void __launch_bounds__(kThreads, kResident<Row, kSteps, kTiles>)
    page_scores_mma_kernel(const PageScoresParams p, const ScoreGrid grid) {
  wait_for_previous_kernel();
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Queries<kForm, kSteps, kTiles>*>(shared_bytes);
  const ScoreTile tile = score_tile(p, grid);
  const bool nothing = max(tile.first_page, tile.page_begin) >= min(tile.last.end, tile.page_end);
  if (nothing && !p.fill_outside) return;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int num_rows = tile.num_tokens * group;
  const int num_tiles = (num_rows + kColumns - 1) / kColumns;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const float c = static_cast<float>(p.spread);
  const int first = tile.page_begin + warp * kPages;
  __nv_bfloat16* out = score_row<__nv_bfloat16>(p, tile, 0);

  RowStream<Row> stream(p, tile, first + lane / 4, !nothing);
  if (!nothing) load_queries<T, Row>(shared, p, tile.b, tile.head, tile.token_begin, num_rows, group);

  for (int base = first; base < tile.page_end; base += kStep) {
    Row rows[2];
    stream.next(rows);
    const bool any = max(base, tile.first_page) < min(base + kPages, min(tile.last.end, tile.page_end));
    float best[2] = {-INFINITY, -INFINITY};  // one tile: of the two rows
    if (any) {
      rows[0].decode();
      rows[1].decode();
      unsigned mean[kSteps][4], var[kForm == Form::kVariance ? kSteps : 1][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mean[step][i] = rows[i % 2].mean_pair(step, i / 2);
          if constexpr (kForm == Form::kVariance) var[step][i] = rows[i % 2].var_pair(step, i / 2);
        }
      }
      for (int n = 0; n < (kTiles > 1 ? num_tiles : 1); ++n) {
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
          if constexpr (kForm == Form::kVariance) score = fmaf(c, sqrt_fast(v[i]), score);
          if constexpr (kForm == Form::kUnique) score = fmaf(c * shared.norm[row], rows[i / 2].scalar, score);
          if constexpr (kTiles > 1) {
            shared.scores[warp][lane / 4 + i / 2 * 8][row] = score;
          } else if (row < num_rows) {
            best[i / 2] = max_or_nan(best[i / 2], score);
          }
        }
      }
    } else if (!p.fill_outside) {
      continue;
    }

    if constexpr (kTiles == 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        best[half] = max_or_nan(best[half], __shfl_xor_sync(kFullMask, best[half], 1));
        best[half] = max_or_nan(best[half], __shfl_xor_sync(kFullMask, best[half], 2));
      }
      const int page = base + lane / 4 + lane % 4 * 8;
      const bool visible = page >= tile.first_page && page < tile.last.end;
      if (lane % 4 < 2 && page < tile.page_end && (visible || p.fill_outside)) {
        out[page] = __float2bfloat16_rn(!visible ? -INFINITY : lane % 4 == 0 ? best[0] : best[1]);
      }
    } else {
      __syncwarp();
      for (int i = lane; i < tile.num_tokens * kPages; i += kWarp) {
        const int token = i / kPages;
        const int page = base + i % kPages;
        if (page >= tile.page_end) continue;
        float most = -INFINITY;
        if (any) {
          const float* scores = shared.scores[warp][i % kPages] + token * group;
          for (int g = 0; g < group; ++g) most = max_or_nan(most, scores[g]);
        }
        store_score<__nv_bfloat16>(p, tile, token, page, most);
      }
      __syncwarp();
    }
  }
}

template <typename T, typename Row, Form kForm, int kSteps, int kTiles>
cudaError_t launch(const PageScoresParams& p, int tokens, int num_sms, cudaStream_t stream) {
  const auto kernel = page_scores_mma_kernel<T, Row, kForm, kSteps, kTiles>;
  constexpr int kBytes = sizeof(Queries<kForm, kSteps, kTiles>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  static const int resident = resident_blocks(kernel, kThreads, kBytes);
  const ScoreGrid grid = plan_score_grid(p, tokens, kStep, resident * num_sms);
  return launch_dependent(kernel, score_blocks(p, grid), kThreads, kBytes, stream, p, grid);
}

template <typename T, typename Row, Form kForm, int kSteps>
cudaError_t launch_rows(const PageScoresParams& p, int num_sms, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  if (p.num_query_tokens == 1 && group <= kColumns) return launch<T, Row, kForm, kSteps, 1>(p, 1, num_sms, stream);
  const int fitting = kMaxTiles * kColumns / group;
  const int tokens = fitting < p.num_query_tokens ? fitting : p.num_query_tokens;
  return launch<T, Row, kForm, kSteps, kMaxTiles>(p, tokens, num_sms, stream);
}

template <typename T, Form kForm, int kSteps>
cudaError_t launch_format(const PageScoresParams& p, int num_sms, cudaStream_t stream) {
  if (p.index.format == IndexFormat::kExact) {
    return launch_rows<T, ExactRow<T, kForm, kSteps>, kForm, kSteps>(p, num_sms, stream);
  }
  return launch_rows<__nv_bfloat16, CompressedRow<kForm, kSteps>, kForm, kSteps>(p, num_sms, stream);
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
  if (p.rule == Rule::kMinMax || p.dtype == DType::kFloat32 || p.index.stride_block > INT32_MAX) return false;
  if (p.index.format == IndexFormat::kExact) return true;
  return p.dtype == DType::kBFloat16 && (p.head_dim == 64 || p.head_dim == 128 || p.head_dim == 256);
}

cudaError_t page_scores_mma_cuda(const PageScoresParams& params, int num_sms, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16 ? launch_form<__nv_bfloat16>(params, num_sms, stream)
                                          : launch_form<__half>(params, num_sms, stream);
}

}  // namespace unique_attn
