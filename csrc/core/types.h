// Plain types shared by every op: no torch, no Python, usable from C++ and CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

// Always inlined on the host too: CPU sources are compiled once per instruction set, and an out-of-line copy
// made for one of them must not serve the others.
#if defined(__CUDACC__)
#define UA_HD __host__ __device__ __forceinline__
#else
#define UA_HD inline __attribute__((always_inline))
#endif

namespace unique_attn {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Page-scoring rules; rules.h defines what each one computes.
enum class Rule : int { kMean, kUnique, kDirectional, kMinMax };

// How the index stores the entries of a rule; index_format.h has the bytes.
enum class IndexFormat : int { kExact, kCompressed };

constexpr int kMaxGroup = 16;        // query heads per KV head
constexpr int kMaxQueryTokens = 16;  // query tokens per sequence in one decode step
constexpr int kMaxHeadDim = 256;
constexpr int kMaxPageSize = 64;
constexpr int kMaxSelectedPages = 4096;

UA_HD constexpr size_t dtype_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A strided view [B, T, heads, D]; the channel stride is 1. Strides are in elements.
struct TokenView {
  const void* data;
  int64_t stride_batch;
  int64_t stride_token;
  int64_t stride_head;
};

// A paged cache [num_blocks, H, block_size, D]; the channel stride is 1, the other strides are
// free, so [num_blocks, block_size, H, D] memory is another set of strides. In elements.
struct PagedView {
  void* data;
  int64_t stride_block;
  int64_t stride_head;
  int64_t stride_token;
};

// The page index [num_blocks, H, pages_per_block, entry_bytes] of opaque bytes. Strides in bytes.
struct IndexView {
  uint8_t* data;
  int64_t stride_block;
  int64_t stride_head;
  int64_t stride_page;
  IndexFormat format;
};

// Where the tokens of each sequence are. Entries of `blocks` past a sequence's last token are
// never read, so they may hold anything.
struct PageTable {
  const int32_t* blocks;    // [B, max_blocks] physical block of each logical block
  const int32_t* seq_lens;  // [B] tokens in the cache, the query tokens included
  int64_t stride_seq;       // elements between the rows of `blocks`
  int max_blocks;
  int block_size;  // tokens per block, a multiple of page_size
  int page_size;   // tokens per page
};

// ---- Positions: the only place where causal limits and windows are computed. ----

// Position of query token t of T: the last T tokens of the sequence are the queries. Negative when
// the sequence is shorter than T; such a query sees nothing.
UA_HD int query_position(int seq_len, int num_query_tokens, int t) { return seq_len - num_query_tokens + t; }

// First position a query at `position` may see; window 0 means no window.
UA_HD int first_visible_token(int position, int window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// Visible pages of a query are [first, end).
struct PageRange {
  int first;
  int end;
};

UA_HD PageRange visible_pages(int position, int window, int page_size) {
  if (position < 0) return {0, 0};
  return {first_visible_token(position, window) / page_size, position / page_size + 1};
}

}  // namespace unique_attn
