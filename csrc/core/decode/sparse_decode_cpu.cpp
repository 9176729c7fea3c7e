// One work item is one query token and KV head: the selected pages are walked in chunks of tokens with an online
// softmax, and each key and value row is read once for all query heads of the group. Tokens that the query may not see
// never enter a chunk.
#include "core/cpu/tile.h"
#include "core/decode/sparse_decode.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

constexpr int kChunk = kMaxPageSize;  // tokens; a page fits in one chunk
constexpr int kTouchAhead = 32;       // selected pages from touch() to use

// Rows of keys and values that enter the softmax together.
template <typename T>
struct TokenChunk {
  const T* keys[kChunk + kMaxTile];
  const T* values[kChunk];
  int count;
  int64_t item;  // (b * T + t) * H + h
  bool first;    // of its item
  bool last;
};

// Walks over the visible tokens of the selected pages of items [begin, end). Every item has at least one chunk, which
// may be empty. Chunks are taken one ahead of their use, across items, so that their rows can be prefetched.
template <typename T>
class TokenWalk {
 public:
  UA_INLINE TokenWalk(const SparseDecodeParams& params, int64_t begin, int64_t end) : p(params), item(begin), end(end) {
    if (item < end) enter_item();
  }

  // False after the last chunk.
  bool next(TokenChunk<T>* chunk) {
    if (item >= end) return false;
    chunk->item = item;
    chunk->first = slot == 0;
    fill(chunk);
    chunk->last = slot == p.k;
    for (int i = chunk->count; i % kMaxTile != 0; ++i) chunk->keys[i] = chunk->keys[chunk->count - 1];
    if (chunk->last && ++item < end) enter_item();
    return true;
  }

 private:
  UA_INLINE void enter_item() {
    const int64_t token = item / p.num_kv_heads;
    const int64_t b = token / p.num_query_tokens;
    head = item % p.num_kv_heads;
    pages = p.pages + item * p.k;
    blocks = p.table.blocks + b * p.table.stride_seq;
    const int position =
        query_position(p.table.seq_lens[b], p.num_query_tokens, static_cast<int>(token % p.num_query_tokens));
    tokens = visible_tokens(p.table, position, p.window);
    const int page_size = p.table.page_size;
    visible = {tokens.first / page_size, (tokens.end + page_size - 1) / page_size};
    slot = 0;
    for (int i = 0; i < kTouchAhead; ++i) touch(i);
  }

  // Starts the address translation of a page that is read much later: pages lie anywhere in memory.
  UA_INLINE void touch(int at) const {
    const int page = at < p.k ? pages[at] : -1;
    if (page < visible.first || page >= visible.end) return;
    __builtin_prefetch(page_row(p.k_cache, page));
    __builtin_prefetch(page_row(p.v_cache, page));
  }

  // First token of a page.
  UA_INLINE const T* page_row(const PagedView& cache, int page) const {
    const int pages_per_block = p.table.block_size / p.table.page_size;
    return token_row<T>(cache, blocks[page / pages_per_block], head, page % pages_per_block * p.table.page_size);
  }

  // The next selected pages that fit in a chunk, clipped to what the query sees.
  UA_INLINE void fill(TokenChunk<T>* chunk) {
    const int page_size = p.table.page_size;
    int count = 0;
    for (; slot < p.k && count + page_size <= kChunk; ++slot) {
      touch(slot + kTouchAhead);
      const int page = pages[slot];
      if (page < visible.first || page >= visible.end) continue;  // negative pages as well
      const int begin = max_of(tokens.first, page * page_size);
      const int stop = min_of(tokens.end, page * page_size + page_size);
      const T* key = page_row(p.k_cache, page) + (begin - page * page_size) * p.k_cache.stride_token;
      const T* value = page_row(p.v_cache, page) + (begin - page * page_size) * p.v_cache.stride_token;
      for (int i = begin; i < stop; ++i, ++count) {
        chunk->keys[count] = key;
        chunk->values[count] = value;
        key += p.k_cache.stride_token;
        value += p.v_cache.stride_token;
      }
    }
    chunk->count = count;
  }

  const SparseDecodeParams& p;
  int64_t item;
  int64_t end;
  // The item.
  int64_t head;
  const int32_t* pages;
  const int32_t* blocks;
  TokenRange tokens;  // that it sees, and their pages
  PageRange visible;
  int slot;  // next of its selected pages
};

// Online softmax over the chunks of one item after the other.
template <typename T>
class Attention {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int kLanes = V::kLanes;

 public:
  UA_INLINE explicit Attention(const SparseDecodeParams& params)
      : p(params),
        group(p.num_q_heads / p.num_kv_heads),
        stride(static_cast<int>(round_up(p.head_dim, kLanes))),
        scratch(2 * Scratch::padded<Acc>(int64_t{padded_rows(group)} * stride)) {
    q = scratch.template take<Acc>(int64_t{padded_rows(group)} * stride);
    out = scratch.template take<Acc>(int64_t{padded_rows(group)} * stride);
    for (int64_t i = int64_t{group} * stride; i < int64_t{padded_rows(group)} * stride; ++i) q[i] = Acc(0);
  }

  void run(int64_t begin, int64_t end) {
    TokenWalk<T> walk(p, begin, end);
    TokenChunk<T> chunks[2];
    TokenChunk<T>* chunk = &chunks[0];
    TokenChunk<T>* next = &chunks[1];
    bool more = walk.next(chunk);
    while (more) {
      more = walk.next(next);
      if (!more) next->count = 0;
      if (chunk->first) enter_item(chunk->item);
      if (chunk->count > 0) add_chunk(*chunk, *next);
      if (chunk->last) write_item(chunk->item);
      TokenChunk<T>* const done = chunk;
      chunk = next;
      next = done;
    }
  }

 private:
  void enter_item(int64_t item) {
    const int64_t token = item / p.num_kv_heads;
    const int64_t b = token / p.num_query_tokens;
    const int64_t t = token % p.num_query_tokens;
    const int64_t q_head = item % p.num_kv_heads * group;
    widen_rows(static_cast<const T*>(p.q.data) + b * p.q.stride_batch + t * p.q.stride_token + q_head * p.q.stride_head,
               p.q.stride_head, group, p.head_dim, q, stride);
    for (int64_t i = 0; i < int64_t{padded_rows(group)} * stride; ++i) out[i] = Acc(0);
    for (int g = 0; g < group; ++g) {
      maxima[g] = -static_cast<Acc>(__builtin_inff());
      totals[g] = Acc(0);
    }
    empty = true;
  }

  // One more chunk. Meanwhile the rows of the next one are prefetched: its keys while keys are read, then its values.
  void add_chunk(const TokenChunk<T>& chunk, const TokenChunk<T>& next) {
    empty = false;
    sum_all_rows<DotProduct, T>(chunk.keys, chunk.count, q, group, stride, p.head_dim,
                                Ahead<T>{next.keys, next.count, p.head_dim}, Sums<Acc>{&weights[0][0], kChunk, 0});
    for (int g = 0; g < group; ++g) weigh(weights[g], chunk.count, g);
    Ahead<T> ahead{next.values, next.count, p.head_dim};
    for (int row = 0; row < group;) {  // in the steps of sum_all_rows
      if (group - row >= 3) {
        add_values<4>(chunk, row, ahead);
        row += 4;
      } else if (group - row == 2) {
        add_values<2>(chunk, row, ahead);
        row += 2;
      } else {
        add_values<1>(chunk, row, ahead);
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

  // out = out * correction + weights . values, for kRows heads. `ahead` is emptied by who prefetches it.
  template <int kRows>
  UA_INLINE void add_values(const TokenChunk<T>& chunk, int row, Ahead<T>& ahead) {
    constexpr int kWide = kTileSums / 4;  // vectors of channels that share one broadcast weight
    int d = 0;
    for (; d + kWide * kLanes <= p.head_dim; d += kWide * kLanes)
      add_channels<kRows, kWide>(chunk, row, d, ahead, Full());
    for (; d + kLanes <= p.head_dim; d += kLanes) add_channels<kRows, 1>(chunk, row, d, ahead, Full());
    if constexpr (kLanes > 8) {
      if (d < p.head_dim) add_channels<kRows, 1>(chunk, row, d, ahead, Half());
    }
  }

  template <int kRows, int kWide, typename Part>
  UA_INLINE void add_channels(const TokenChunk<T>& chunk, int row, int d, Ahead<T>& ahead, Part part) {
    V acc[kRows][kWide];
    UA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      UA_UNROLL
      for (int i = 0; i < kWide; ++i) {
        acc[r][i] = load(out + (row + r) * stride + d + i * kLanes, Full()) * V(corrections[row + r]);
      }
    }
    for (int j = 0; j < chunk.count; ++j) {
      if (j < ahead.count) {
        for (int c = 0; c < ahead.channels; c += line_channels<T>()) __builtin_prefetch(ahead.rows[j] + c);
      }
      V value[kWide];
      UA_UNROLL
      for (int i = 0; i < kWide; ++i) value[i] = load(chunk.values[j] + d + i * kLanes, part);
      UA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V weight(weights[row + r][j]);
        UA_UNROLL
        for (int i = 0; i < kWide; ++i) acc[r][i] += weight * value[i];
      }
    }
    ahead.finish(chunk.count);
    UA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      UA_UNROLL
      for (int i = 0; i < kWide; ++i) store(out + (row + r) * stride + d + i * kLanes, acc[r][i], Full());
    }
  }

  void write_item(int64_t item) {
    const int64_t row = item / p.num_kv_heads * p.num_q_heads + item % p.num_kv_heads * group;
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
  Acc* q;      // [heads][stride]
  Acc* out;    // [heads][stride], relative to the running maximum
  bool empty;  // no token so far
  Acc maxima[kMaxGroup];
  Acc totals[kMaxGroup];
  Acc corrections[kMaxGroup] = {};
  alignas(64) Acc weights[kMaxGroup][kChunk];  // first q . k
};

template <typename T>
void decode(const SparseDecodeParams& p, const CpuExecutor& exec) {
  const int64_t total = int64_t{p.batch} * p.num_query_tokens * p.num_kv_heads;
  const int64_t work = int64_t{2} * p.k * p.table.page_size * p.head_dim * (p.num_q_heads / p.num_kv_heads);
  parallel_for(exec, total, grain_for(work), [&](int64_t begin, int64_t end) {
    Attention<T> attention(p);
    attention.run(begin, end);
  });
}

}  // namespace

void sparse_decode_cpu(const SparseDecodeParams& params, const CpuExecutor& exec) {
  if (params.num_kv_heads == 0) return;
  UA_DISPATCH_CPU_DTYPE(params.dtype, T, decode<T>(params, exec));
}

}  // namespace UA_ISA
}  // namespace unique_attn
