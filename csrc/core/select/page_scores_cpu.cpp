// One work item is a chunk of pages of one sequence and KV head: its entries are read once for all query heads of the
// group and all query tokens. Heads are the fastest index of the items, so that a thread walks memory block by block.
#include "core/index/entries_cpu.h"
#include "core/select/page_scores.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

constexpr int kChunk = 64;            // pages per item
constexpr int kAheadBytes = 1 << 14;  // of index entries between a prefetch and its use

UA_INLINE PageRange token_pages(const PageScoresParams& p, int b, int t) { return scored_pages(p, b, t, t + 1); }
UA_INLINE PageRange sequence_pages(const PageScoresParams& p, int b) {
  return scored_pages(p, b, 0, p.num_query_tokens);
}

// A sequence without visible pages has one chunk as well: its rows may have to be filled.
UA_INLINE int64_t num_chunks(PageRange pages) {
  return pages.first < pages.end ? (pages.end - pages.first + kChunk - 1) / kChunk : 1;
}

// Rows are what the sums read: the entries themselves, or what they decode to.
template <typename RuleT, typename T, bool kCompressed>
class PageScorer {
  using Acc = AccOf<T>;
  using Row = std::conditional_t<kCompressed, Acc, T>;
  using V = Vec<Acc>;
  using Score = ScoreOf<T>;

 public:
  UA_INLINE explicit PageScorer(const PageScoresParams& params)
      : p(params),
        group(p.num_q_heads / p.num_kv_heads),
        rows(p.num_query_tokens * group),
        q_stride(static_cast<int>(round_up(p.head_dim, V::kLanes))),
        rule_stride(int64_t{padded_rows(rows)} * kChunk),
        entry_bytes(index_entry_bytes(p.rule, p.index.format, p.dtype, p.head_dim)),
        ahead(max_of(min_of(kAheadBytes / entry_bytes, kChunk), 1)),
        row_stride(kCompressed ? decoded_stride<RuleT, Acc>(p.head_dim) : 0),
        scratch(Scratch::padded<Acc>(int64_t{padded_rows(rows)} * q_stride) + Scratch::padded<Acc>(rows) +
                Scratch::padded<Acc>(RuleT::kSums * rule_stride) + Scratch::padded<Acc>(row_stride * kChunk)) {
    q = scratch.template take<Acc>(int64_t{padded_rows(rows)} * q_stride);
    q_norms = scratch.template take<Acc>(rows);
    sums = scratch.template take<Acc>(RuleT::kSums * rule_stride);
    decoded = scratch.template take<Acc>(row_stride * kChunk);
    for (int64_t i = int64_t{rows} * q_stride; i < int64_t{padded_rows(rows)} * q_stride; ++i) q[i] = Acc(0);
  }

  // Chunk `chunk` of the pages [pages.first, pages.end) that sequence b and KV head h score.
  void run(int b, int h, PageRange pages, int64_t chunk) {
    if (chunk == 0 && p.fill_outside) fill_outside(b, h);
    const int first = static_cast<int>(pages.first + chunk * kChunk);
    const int count = min_of(kChunk, pages.end - first);
    if (count <= 0) return;
    load_queries(b, h);
    gather(b, h, first, count, pages.end);
    const Row* const* chunk_rows = to_rows(count);
    sum_all_rows<RuleT, Row>(chunk_rows, count, q, rows, q_stride, p.head_dim,
                             Ahead<Row>{kCompressed ? nullptr : chunk_rows + ahead, kCompressed ? 0 : count, 0},
                             Sums<Acc>{sums, kChunk, rule_stride});
    for (int t = 0; t < p.num_query_tokens; ++t) finish_token(b, t, h, first, count);
    __builtin_memmove(entries, entries + count, located_count * sizeof(entries[0]));
  }

 private:
  Score* score_row(int b, int t, int h) const {
    const int64_t row = (int64_t{b} * p.num_query_tokens + t) * p.num_kv_heads + h;
    return static_cast<Score*>(p.scores) + row * p.row_pages;
  }

  void fill_outside(int b, int h) const {
    Score minus_inf;
    from_scalar(-__builtin_inff(), minus_inf);
    for (int t = 0; t < p.num_query_tokens; ++t) {
      const PageRange visible = token_pages(p, b, t);
      Score* row = score_row(b, t, h);
      for (int page = 0; page < visible.first; ++page) row[page] = minus_inf;
      for (int page = visible.end; page < p.row_pages; ++page) row[page] = minus_inf;
    }
  }

  UA_INLINE void load_queries(int b, int h) {
    const T* source = static_cast<const T*>(p.q.data) + b * p.q.stride_batch + h * group * p.q.stride_head;
    for (int t = 0; t < p.num_query_tokens; ++t) {
      widen_rows(source + t * p.q.stride_token, p.q.stride_head, group, p.head_dim, q + int64_t{t} * group * q_stride,
                 q_stride);
    }
    if constexpr (RuleT::kScalar) {
      for (int row = 0; row < rows; ++row) {
        V squares(Acc(0));
        for (int d = 0; d < q_stride; d += V::kLanes) {
          const V x = load(q + int64_t{row} * q_stride + d, Full());
          squares += x * x;
        }
        store(norm_lanes, sqrt(V(sum_lanes(squares))), Full());
        q_norms[row] = norm_lanes[0];
      }
    }
  }

  // Where the entries of the chunk are, and after its end those of the next item, so that entries[i + ahead] is what to
  // bring into cache when entry i is read.
  void gather(int b, int h, int first, int count, int end) {
    const int32_t* blocks = p.table.blocks + b * p.table.stride_seq;
    if (b != located_b || h != located_h || first != located_first) locate(blocks, h, first, count, entries);
    located_b = b;
    if (h + 1 < p.num_kv_heads) {  // the same pages
      located_h = h + 1;
      located_first = first;
      located_count = count;
      for (int i = 0; i < count; ++i) {
        entries[count + i] = entries[i] + p.index.stride_head;
      }
    } else {
      located_h = 0;
      located_first = first + count;
      located_count = min_of(kChunk, end - located_first);
      locate(blocks, 0, located_first, located_count, entries + count);
    }
    for (int i = count + located_count; i < count + ahead + kMaxTile; ++i) entries[i] = entries[i - 1];
  }

  UA_INLINE void locate(const int32_t* blocks, int h, int first, int count, const uint8_t** to) const {
    const int pages_per_block = p.table.block_size / p.table.page_size;
    const uint8_t* const data = p.index.data + h * p.index.stride_head;
    for (int i = 0; i < count; ++i) {
      const int page = first + i;
      to[i] =
          data + blocks[page / pages_per_block] * p.index.stride_block + page % pages_per_block * p.index.stride_page;
    }
  }

  // The chunk's entries as rows, and behind them those that whole tiles and prefetches may touch.
  UA_INLINE const Row* const* to_rows(int count) {
    if constexpr (kCompressed) {
      for (int i = 0; i < count; ++i) {
        for (int byte = 0; byte < entry_bytes; byte += 64) __builtin_prefetch(entries[i + ahead] + byte);
        decode_entry<RuleT>(entries[i], p.head_dim, decoded + i * row_stride);
        chunk[i] = decoded + i * row_stride;
      }
      for (int i = count; i < count + kMaxTile; ++i) chunk[i] = chunk[i - 1];
    } else {
      for (int i = 0; i < count + ahead + kMaxTile; ++i) chunk[i] = reinterpret_cast<const T*>(entries[i]);
    }
    return chunk;
  }

  // Scores of one query token from the sums of its heads.
  UA_INLINE void finish_token(int b, int t, int h, int first, int count) {
    const PageRange visible = token_pages(p, b, t);
    const int begin = max_of(visible.first, first) - first;
    const int end = min_of(visible.end, first + count) - first;
    if (begin >= end) return;
    alignas(64) Acc scalars[kChunk];
    if constexpr (RuleT::kScalar) {
      for (int i = 0; i < count; ++i) scalars[i] = to_scalar(chunk[i][RuleT::kVectors * p.head_dim]);
      for (int i = count; i < kChunk; ++i) scalars[i] = Acc(0);
    }
    const V weight(static_cast<Acc>(p.spread_weight));
    alignas(64) Score scores[kChunk];
    for (int i = begin / V::kLanes * V::kLanes; i < end; i += V::kLanes) {
      V best(Acc(0));
      for (int g = 0; g < group; ++g) {
        const int row = t * group + g;
        const Acc* u = sums + int64_t{row} * kChunk + i;
        const V v = RuleT::kSums > 1 ? load(u + rule_stride, Full()) : V(Acc(0));
        const V scalar = RuleT::kScalar ? load(scalars + i, Full()) : V(Acc(0));
        const V score = RuleT::finish(load(u, Full()), v, scalar, V(RuleT::kScalar ? q_norms[row] : Acc(0)), weight);
        best = g == 0 ? score : max_or_nan(best, score);
      }
      store(scores + i, best, Full());
    }
    __builtin_memcpy(score_row(b, t, h) + first + begin, scores + begin, (end - begin) * sizeof(Score));
  }

  const PageScoresParams& p;
  const int group;
  const int rows;
  const int q_stride;
  const int64_t rule_stride;
  const int entry_bytes;
  const int ahead;           // entries from a prefetch to its use
  const int64_t row_stride;  // of decoded entries
  Scratch scratch;
  Acc* q;        // [rows][q_stride]
  Acc* q_norms;  // [rows]
  Acc* sums;     // [kSums][rows][kChunk]
  Acc* decoded;  // [kChunk][row_stride]
  const uint8_t* entries[2 * kChunk + kMaxTile];
  const Row* chunk[2 * kChunk + kMaxTile];  // the rows of the item at hand
  int located_b = -1;                       // the item whose entries are already in `entries`
  int located_h;
  int located_first;
  int located_count;
  alignas(64) Acc norm_lanes[V::kLanes];
};

template <typename RuleT, typename T, bool kCompressed>
void score(const PageScoresParams& p, const CpuExecutor& exec) {
  int64_t total = 0;
  for (int b = 0; b < p.batch; ++b) total += num_chunks(sequence_pages(p, b)) * p.num_kv_heads;
  const int64_t work = int64_t{kChunk} * p.num_query_tokens * (p.num_q_heads / p.num_kv_heads) * p.head_dim;
  parallel_for(exec, total, grain_for(work), [&](int64_t begin, int64_t end) {
    PageScorer<RuleT, T, kCompressed> scorer(p);
    int64_t skipped = 0;  // items of the sequences before b
    for (int b = 0; b < p.batch && skipped < end; ++b) {
      const PageRange pages = sequence_pages(p, b);
      const int64_t items = num_chunks(pages) * p.num_kv_heads;
      const int64_t from = begin > skipped ? begin - skipped : 0;
      const int64_t to = end - skipped < items ? end - skipped : items;
      for (int64_t i = from; i < to; ++i) {
        scorer.run(b, static_cast<int>(i % p.num_kv_heads), pages, i / p.num_kv_heads);
      }
      skipped += items;
    }
  });
}

}  // namespace

void page_scores_cpu(const PageScoresParams& params, const CpuExecutor& exec) {
  if (params.num_query_tokens == 0 || params.num_kv_heads == 0) return;
  UA_DISPATCH_CPU_DTYPE(params.dtype, T,
                        UA_DISPATCH_INDEX(params.index.format, params.rule, RuleT, kCompressed,
                                          score<RuleT, T, kCompressed>(params, exec)));
}

}  // namespace UA_ISA
}  // namespace unique_attn
