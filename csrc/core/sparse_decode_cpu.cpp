// One work item is one query token and KV head: the selected pages are walked in chunks of tokens with an online
// softmax, and each key and value row is read once for all query heads of the group. Tokens that the query may not see
// never enter a chunk.
#include "sparse_decode.h"

#include "cpu_tile.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

constexpr int kChunk = kMaxPageSize;  // tokens; a page fits in one chunk

// Rows of keys and values that enter the softmax together.
template <typename T>
struct TokenChunk {
  const T* keys[kChunk];
  const T* values[kChunk];
  int count;
};

template <typename T>
class DecodeRow {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int kLanes = V::kLanes;

 public:
  UA_INLINE explicit DecodeRow(const SparseDecodeParams& params)
      : p(params),
        group(p.num_q_heads / p.num_kv_heads),
        stride(static_cast<int>(round_up(p.head_dim, kLanes))),
        scratch(2 * Scratch::padded<Acc>(int64_t{padded_rows(group)} * stride)) {
    q = scratch.template take<Acc>(int64_t{padded_rows(group)} * stride);
    out = scratch.template take<Acc>(int64_t{padded_rows(group)} * stride);
    for (int64_t i = int64_t{group} * stride; i < int64_t{padded_rows(group)} * stride; ++i) q[i] = Acc(0);
  }

  void run(int b, int t, int h) {
    const int64_t token = int64_t{b} * p.num_query_tokens + t;
    const int position = query_position(p.table.seq_lens[b], p.num_query_tokens, t);
    pages = p.pages + (token * p.num_kv_heads + h) * p.k;
    blocks = p.table.blocks + b * p.table.stride_seq;
    head = h;
    next_page = position < 0 ? p.k : 0;
    first_token = first_visible_token(position, p.window);
    end_token = position + 1;

    const int64_t q_head = int64_t{h} * group;
    widen_rows(static_cast<const T*>(p.q.data) + b * p.q.stride_batch + t * p.q.stride_token + q_head * p.q.stride_head,
               p.q.stride_head, group, p.head_dim, q, stride);
    for (int64_t i = 0; i < int64_t{padded_rows(group)} * stride; ++i) out[i] = Acc(0);
    for (int g = 0; g < padded_rows(group); ++g) {
      maxima[g] = -static_cast<Acc>(__builtin_inff());
      totals[g] = Acc(0);
    }

    TokenChunk<T>* chunk = &chunks[0];
    TokenChunk<T>* next = &chunks[1];
    gather(chunk);
    const bool empty = chunk->count == 0;
    while (chunk->count > 0) {
      gather(next);
      add_chunk(chunk, next);
      TokenChunk<T>* const done = chunk;
      chunk = next;
      next = done;
    }
    write_row(token * p.num_q_heads + q_head, empty);
  }

 private:
  // The next selected pages that fit in a chunk, clipped to what the query sees.
  UA_INLINE void gather(TokenChunk<T>* chunk) {
    const int page_size = p.table.page_size;
    const int pages_per_block = p.table.block_size / page_size;
    const int num_pages = table_pages(p.table);
    int count = 0;
    for (; next_page < p.k && count + page_size <= kChunk; ++next_page) {
      const int page = pages[next_page];
      if (page < 0 || page >= num_pages || page > (end_token - 1) / page_size) continue;
      const int begin = max_of(first_token, page * page_size);
      const int end = min_of(end_token, page * page_size + page_size);
      if (begin >= end) continue;
      const int64_t block = blocks[page / pages_per_block];
      const int64_t offset = int64_t{page % pages_per_block} * page_size + (begin - page * page_size);
      const T* key = token_row<T>(p.k_cache, block, head, offset);
      const T* value = token_row<T>(p.v_cache, block, head, offset);
      for (int i = begin; i < end; ++i, ++count) {
        chunk->keys[count] = key;
        chunk->values[count] = value;
        key += p.k_cache.stride_token;
        value += p.v_cache.stride_token;
      }
    }
    chunk->count = count;
  }

  // Online softmax over one more chunk. The values are prefetched while the keys are met, the next keys afterwards.
  UA_INLINE void add_chunk(TokenChunk<T>* chunk, const TokenChunk<T>* next) {
    const int64_t row_bytes = p.head_dim * static_cast<int64_t>(sizeof(T));
    sum_all_rows<MeanRule>(chunk->keys, chunk->count, q, group, stride, p.head_dim, chunk->values, row_bytes,
                           &weights[0][0], kChunk, 0);
    for (int g = 0; g < group; ++g) weigh(weights[g], chunk->count, g);
    const int rows = padded_rows(group);
    for (int row = 0; row < rows;) {
      const TokenChunk<T>* ahead = row == 0 ? next : nullptr;
      if (rows - row >= 4) {
        add_values<4>(chunk, row, ahead, row_bytes);
        row += 4;
      } else if (rows - row >= 2) {
        add_values<2>(chunk, row, ahead, row_bytes);
        row += 2;
      } else {
        add_values<1>(chunk, row, ahead, row_bytes);
        row += 1;
      }
    }
  }

  // Turns q . k of one head into weights relative to the running maximum. Logits that are all -inf so far weigh 0, and
  // leave 0 / 0 = NaN if nothing else comes, as softmax does.
  UA_INLINE void weigh(Acc* logits, int count, int g) {
    const V minus_inf(-static_cast<Acc>(__builtin_inff()));
    const int padded = static_cast<int>(round_up(count, kLanes));
    V top = minus_inf;
    for (int i = 0; i < padded; i += kLanes) {
      V x = load(logits + i, Full()) * V(static_cast<Acc>(p.scale));
      if (i + kLanes > count) x = mask_tail(x, count - i, minus_inf);
      store(logits + i, x, Full());
      top = max_number(top, x);
    }
    const Acc chunk_max = max_lanes(top);
    const Acc old_max = maxima[g];
    const Acc new_max = chunk_max > old_max ? chunk_max : old_max;
    const V offset(new_max == minus_inf.v[0] ? Acc(0) : new_max);
    V total(Acc(0));
    for (int i = 0; i < padded; i += kLanes) {
      const V weight = exp_negative(load(logits + i, Full()) - offset);
      store(logits + i, weight, Full());
      total += weight;
    }
    corrections[g] = exp_negative(V(old_max) - offset).v[0];
    totals[g] = totals[g] * corrections[g] + sum_lanes(total);
    maxima[g] = new_max;
  }

  // Lanes from `count` on become -inf, which is weight 0.
  UA_INLINE static V mask_tail(V x, int count, V minus_inf) {
    typename V::Bits lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return select(lane < count, x, minus_inf);
  }

  // out = out * correction + weights . values, for kRows heads.
  template <int kRows>
  UA_INLINE void add_values(const TokenChunk<T>* chunk, int row, const TokenChunk<T>* next, int64_t row_bytes) {
    constexpr int kWide = kTileSums / 4;  // vectors of channels that share one broadcast weight
    if (next != nullptr) {
      for (int j = 0; j < next->count; ++j) prefetch_row(next->keys[j], row_bytes);
    }
    int d = 0;
    for (; d + kWide * kLanes <= p.head_dim; d += kWide * kLanes) add_channels<kRows, kWide>(chunk, row, d, Full());
    for (; d + kLanes <= p.head_dim; d += kLanes) add_channels<kRows, 1>(chunk, row, d, Full());
    if constexpr (kLanes > 8) {
      if (d < p.head_dim) add_channels<kRows, 1>(chunk, row, d, Half());
    }
  }

  template <int kRows, int kWide, typename Part>
  UA_INLINE void add_channels(const TokenChunk<T>* chunk, int row, int d, Part part) {
    V acc[kRows][kWide];
    UA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      UA_UNROLL
      for (int i = 0; i < kWide; ++i) {
        acc[r][i] = load(out + (row + r) * stride + d + i * kLanes, Full()) * V(corrections[row + r]);
      }
    }
    for (int j = 0; j < chunk->count; ++j) {
      V value[kWide];
      UA_UNROLL
      for (int i = 0; i < kWide; ++i) value[i] = load(chunk->values[j] + d + i * kLanes, part);
      UA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V weight(weights[row + r][j]);
        UA_UNROLL
        for (int i = 0; i < kWide; ++i) acc[r][i] += weight * value[i];
      }
    }
    UA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      UA_UNROLL
      for (int i = 0; i < kWide; ++i) store(out + (row + r) * stride + d + i * kLanes, acc[r][i], Full());
    }
  }

  // `row`: the first of the group's rows of out and lse.
  UA_INLINE void write_row(int64_t row, bool empty) {
    for (int g = 0; g < group; ++g) {
      const V total(empty ? Acc(1) : totals[g]);
      T* const to = static_cast<T*>(p.out) + (row + g) * p.head_dim;
      each_vector<Acc>(p.head_dim, [&](int d, auto part) __attribute__((always_inline)) {
        store(to + d, load(out + g * stride + d, Full()) / total, part);
      });
      static_cast<Acc*>(p.lse)[row + g] = maxima[g] + log_of(totals[g]);
    }
  }

  UA_INLINE static float log_of(float x) { return __builtin_logf(x); }
  UA_INLINE static double log_of(double x) { return __builtin_log(x); }

  const SparseDecodeParams& p;
  const int group;
  const int stride;  // of q and out
  Scratch scratch;
  Acc* q;    // [heads][stride]
  Acc* out;  // [heads][stride], relative to the running maximum

  // The row of work.
  const int32_t* pages;
  const int32_t* blocks;
  int head;
  int next_page;
  int first_token;
  int end_token;

  Acc maxima[kMaxGroup];
  Acc totals[kMaxGroup];
  Acc corrections[kMaxGroup];
  TokenChunk<T> chunks[2];
  alignas(64) Acc weights[kMaxGroup][kChunk];
};

template <typename T>
void decode(const SparseDecodeParams& p, const CpuExecutor& exec) {
  const int64_t total = int64_t{p.batch} * p.num_query_tokens * p.num_kv_heads;
  const int64_t work = int64_t{2} * p.k * p.table.page_size * p.head_dim * (p.num_q_heads / p.num_kv_heads);
  parallel_for(exec, total, grain_for(work), [&](int64_t begin, int64_t end) {
    DecodeRow<T> row(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / p.num_kv_heads;
      row.run(static_cast<int>(token / p.num_query_tokens), static_cast<int>(token % p.num_query_tokens),
              static_cast<int>(i % p.num_kv_heads));
    }
  });
}

}  // namespace

void sparse_decode_cpu(const SparseDecodeParams& params, const CpuExecutor& exec) {
  if (params.num_kv_heads == 0) return;
  UA_DISPATCH_CPU_DTYPE(params.dtype, T, decode<T>(params, exec));
}

}  // namespace UA_ISA
}  // namespace unique_attn
