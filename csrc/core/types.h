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

// A page-scoring rule, by its place in the table of rules.h.
enum class Rule : int {};

// How a rule makes a score of a query, the mean a of a page's keys, and what its entry says of their spread. Kernels
// that are not written for any rule are written for these.
enum class ScoreForm : int {
  kMean,          // q . a
  kScalarSpread,  // q . a + weight * norm(q) * s, of one number s
  kVectorSpread,  // q . a + weight * sqrt(sum_d (q_d b_d)^2), of one number b_d per channel
  kGeneral,       // what the rule's functions say
};

// How the index stores the entries of a rule; index/format.h has the bytes.
enum class IndexFormat : int { kExact, kCompressed };

constexpr int kMaxGroup = 16;        // query heads per KV head
constexpr int kMaxQueryTokens = 16;  // query tokens per sequence in one decode step
constexpr int kMaxHeadDim = 256;
constexpr int kMaxPageSize = 64;
constexpr int kPageSizes[] = {4, 8, 16, 32, 64};
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

// Where the tokens of each sequence are. Entries of `blocks` past a sequence's last token or before its window are
// never read, so they may hold anything. Of the others the CPU's ops check that they exist. On CUDA nothing is read
// back for that: there, what no block holds is neither read nor written, by the functions below.
struct PageTable {
  const int32_t* blocks;    // [B, max_blocks] physical block of each logical block
  const int32_t* seq_lens;  // [B] tokens in the cache, the query tokens included
  int64_t stride_seq;       // elements between the rows of `blocks`
  int max_blocks;
  int block_size;  // tokens per block, a multiple of page_size
  int page_size;   // tokens per page
  int num_blocks;  // physical blocks there are: numbers from 0 to this
};

UA_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
UA_HD constexpr int max_of(int a, int b) { return a > b ? a : b; }

// ---- The table: the only place where it is looked up. ----

// What a row of it can hold; the ops see to it that this is a number.
UA_HD int table_tokens(const PageTable& table) { return table.max_blocks * table.block_size; }
UA_HD int table_pages(const PageTable& table) { return table.max_blocks * (table.block_size / table.page_size); }

// Whether it is one of 0 .. count - 1.
UA_HD bool is_index(int number, int count) { return static_cast<unsigned>(number) < static_cast<unsigned>(count); }

// The physical block of a sequence's logical one; -1 if the row does not reach so far or names no block.
UA_HD int physical_block(const PageTable& table, int64_t b, int logical) {
  if (!is_index(logical, table.max_blocks)) return -1;
  const int block = table.blocks[b * table.stride_seq + logical];
  return is_index(block, table.num_blocks) ? block : -1;
}

// First element of token `offset` of a block.
template <typename T>
UA_HD T* token_row(const PagedView& cache, int64_t block, int64_t head, int64_t offset) {
  return static_cast<T*>(cache.data) + block * cache.stride_block + head * cache.stride_head +
         offset * cache.stride_token;
}

// ---- Positions: the only place where causal limits and windows are computed. ----

// Position of query token t of T: the last T tokens of the sequence are the queries. Negative when
// the sequence is shorter than T; such a query sees nothing. A negative length counts as 0.
UA_HD int query_position(int seq_len, int num_query_tokens, int t) { return max_of(seq_len, 0) - num_query_tokens + t; }

// First position a query at `position` may see; window 0 means no window.
UA_HD int first_visible_token(int position, int window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// Pages [first, end); nothing in them if first == end.
struct PageRange {
  int first;
  int end;
};

struct TokenRange {
  int first;
  int end;
};

// Pages that a query sees.
UA_HD PageRange visible_pages(int position, int window, int page_size) {
  if (position < 0) return {0, 0};
  return {first_visible_token(position, window) / page_size, position / page_size + 1};
}

// Pages that any query token from t to t_end - 1 sees, of the first `row_pages`: later tokens see later pages.
UA_HD PageRange visible_pages(int seq_len, int num_query_tokens, int t, int t_end, int window, int page_size,
                              int row_pages) {
  const int last = query_position(seq_len, num_query_tokens, t_end - 1);
  if (last < 0) return {0, 0};
  const int first = first_visible_token(max_of(query_position(seq_len, num_query_tokens, t), 0), window);
  const int end = min_of(last / page_size + 1, row_pages);
  return {min_of(first / page_size, end), end};
}

// Tokens that a query sees, as far as the table's row reaches.
UA_HD TokenRange visible_tokens(const PageTable& table, int position, int window) {
  if (position < 0) return {0, 0};
  const int end = min_of(position + 1, table_tokens(table));
  return {min_of(first_visible_token(position, window), end), end};
}

}  // namespace unique_attn
