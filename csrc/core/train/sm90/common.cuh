// What the Hopper training kernels share: their arguments, tensor maps, and the launchers by which
// chain_cuda.cu chains them.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/sm90/roles.cuh"
#include "core/train/sm90/plan.h"

namespace unique_attn {

// The queries and keys of one launch. Rows of the workspace are the tokens from token_begin on; of sequence b they
// hold the pages from first_page(b) on.
struct HopperChunk {
  int token_begin, token_end;  // of the packed batch
  int key_begin, key_end;      // tiles of keys that start here
  int width;                   // pages in a row of the workspace
};

struct HopperArgs {
  SoftMaskForwardParams p;
  HopperChunk chunk;
  int group;
  int tokens;              // per 64 rows
  int page_shift;          // log2 of the page size
  int first_sequence = 0;  // of this launch

  HopperArgs from_sequence(int first) const {
    HopperArgs args = *this;
    args.first_sequence = first;
    return args;
  }
};

// Sequence and tile of a thread block that serves queries of a chunk.
struct QueryTile {
  int start, length;  // of the sequence
  int first;          // position of the tile's first token
  int end;            // position after the chunk's last token of this sequence
};

__device__ __forceinline__ QueryTile query_tile(const HopperArgs& a, int b, int tile, int tile_tokens) {
  const int start = a.p.seqs.cu_seqlens[b];
  const int stop = a.p.seqs.cu_seqlens[b + 1];
  const int first = max(start, a.chunk.token_begin) + tile * tile_tokens;
  return {start, stop - start, first - start, min(stop, a.chunk.token_end) - start};
}

// Whether tokens of another sequence follow those of this one.
__device__ __forceinline__ bool has_next(const HopperArgs& a, int start, int length) {
  return start + length < a.p.seqs.total_tokens;
}

// First tile of `tile_keys` keys of a sequence that starts in the chunk.
__device__ __forceinline__ int first_key_tile(const HopperChunk& chunk, int start, int tile_keys) {
  return max(chunk.key_begin - start + tile_keys - 1, 0) / tile_keys;
}

__device__ __forceinline__ int first_chunk_page(const HopperArgs& a, int start) {
  return first_key_tile(a.chunk, start, kDkvKeys) * kDkvKeys >> a.page_shift;
}

// Copies by the TMA begin and end on 16 bytes. Pages of a box of log-gates that holds those of a tile of `tile_keys`
// keys; it begins at the tile's first page rounded down to kGateAlign (kBestAlign for arg-max heads).
constexpr int kGateAlign = 8;
constexpr int kBestAlign = 16;
UA_HD int gate_box(int tile_keys, int page_size) { return tile_keys / page_size < 8 ? 8 : tile_keys / page_size; }
// Pages of a tile of keys in dq.
UA_HD int mean_box(int page_size) { return kDqKeys / page_size; }
static_assert(kDqKeys >= kMaxPageSize, "a tile has whole pages");

#ifdef UA_HOPPER
// Log-gates of one row for kBlocks blocks of 8 keys; `column` is this thread's first key of a block, `of_row` holds the
// tile's pages.
template <int kBlocks>
__device__ __forceinline__ void load_row_gates(float (&gates)[kBlocks], const __half* of_row, int page_shift,
                                               int column) {
  if (page_shift == 3) {  // a page per block: 16 bytes at a time
#pragma unroll
    for (int i = 0; i < kBlocks / 8; ++i) {
      Vec8<__half> vector;
      vector.load(of_row + i * 8);
      float x[8];
      vector.unpack(x);
#pragma unroll
      for (int j = 0; j < 8; ++j) gates[i * 8 + j] = x[j];
    }
  } else {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) gates[n] = __half2float(of_row[(n * 8 + column) >> page_shift]);
  }
}
#endif

// Tiles of `tile_tokens` tokens in the longest sequence's part of `span` tokens; and of the chunk's queries.
inline int tiles_of(const HopperArgs& a, int span, int tile_tokens) {
  return (min_of(span, a.p.seqs.max_seqlen) + tile_tokens - 1) / tile_tokens;
}
inline int query_tiles(const HopperArgs& a, int tile_tokens) {
  return tiles_of(a, a.chunk.token_end - a.chunk.token_begin, tile_tokens);
}

// A kernel with roles over thread blocks [tile, KV head, sequence].
template <typename Roles, typename Shared, typename Kernel, typename Maps, typename... Rest>
cudaError_t launch_roles(Kernel* kernel, const HopperArgs& a, int tiles, cudaStream_t stream, const Maps& maps,
                         Rest... rest) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<Shared>);
  if (error != cudaSuccess) return error;
  return launch_sequences(a.p.seqs.batch, [&](int first, unsigned count) {
    kernel<<<dim3(tiles, a.p.num_kv_heads, count), Roles::kThreads, kSharedBytes<Shared>, stream>>>(
        maps, a.from_sequence(first), rest...);
  });
}

enum class ScoreOutput { kScores, kGates, kGatesForBackward };
struct ScoreMaps {
  CUtensorMap mean, var;
};
struct ScoreOutputs {
  __nv_bfloat16* scores;  // kScores; candidates only
  __half* log_gates;
  uint8_t* best;
  __nv_bfloat16* slopes;
};
struct ForwardMaps {
  CUtensorMap q, k, v, log_gates;
};
struct DqMaps {
  CUtensorMap q, grad, k, v, mean, log_gates, best;
};
struct PageGradMaps {
  CUtensorMap q, q_squares, weights, best, slopes;
};
struct DkvMaps {
  CUtensorMap q, grad, k, v, log_gates;
};

// std^2 of every entry, or the squares of a chunk of queries: rows of D channels, 16-bit to bf16.
cudaError_t launch_squares(const HopperArgs& args, __nv_bfloat16* out, bool of_queries, cudaStream_t stream);
cudaError_t launch_hard_gates(const HopperArgs& args, __half* log_gates, cudaStream_t stream);
cudaError_t launch_page_gates(const HopperArgs& args, const ScoreMaps& maps, const ScoreOutputs& out, ScoreOutput which,
                              cudaStream_t stream);
cudaError_t launch_forward(const HopperArgs& args, const ForwardMaps& maps, cudaStream_t stream);
cudaError_t launch_row_stats(const SoftMaskBackwardParams& params, float2* stats, cudaStream_t stream);
cudaError_t launch_dq(const HopperArgs& args, const DqMaps& maps, const float2* stats, __nv_bfloat16* weights, void* dq,
                      cudaStream_t stream);
cudaError_t launch_page_gradients(const HopperArgs& args, const PageGradMaps& maps, float* page_grads,
                                  cudaStream_t stream);
cudaError_t launch_finish_page_gradients(const HopperArgs& args, float* page_grads, cudaStream_t stream);
cudaError_t launch_dkv(const HopperArgs& args, const DkvMaps& maps, const float2* stats, const float* page_grads,
                       void* dk, void* dv, cudaStream_t stream);

// Calls `...` with T and D.
#define UA_DISPATCH_HOPPER(params, T, D, ...) \
  if ((params).dtype == DType::kBFloat16) {   \
    using T = __nv_bfloat16;                  \
    if ((params).head_dim == 64) {            \
      constexpr int D = 64;                   \
      __VA_ARGS__;                            \
    } else {                                  \
      constexpr int D = 128;                  \
      __VA_ARGS__;                            \
    }                                         \
  } else {                                    \
    using T = __half;                         \
    if ((params).head_dim == 64) {            \
      constexpr int D = 64;                   \
      __VA_ARGS__;                            \
    } else {                                  \
      constexpr int D = 128;                  \
      __VA_ARGS__;                            \
    }                                         \
  }

}  // namespace unique_attn
