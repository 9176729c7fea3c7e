// One work item is one row: radix select over order-preserving integer keys, 8 bits a round, finds the key of the last
// page to take; a final walk collects the pages in ascending order.
#include "topk_pages.h"

#include "cpu_tile.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

constexpr int kBins = 256;
constexpr int kBlock = 256;  // scores turned into keys at once, in vectors

// The bits of a score type and those of +inf.
template <typename Score>
struct ScoreBits;
template <>
struct ScoreBits<BF16> {
  using Type = uint16_t;
  static constexpr uint16_t kInf = 0x7f80;
};
template <>
struct ScoreBits<F16> {
  using Type = uint16_t;
  static constexpr uint16_t kInf = 0x7c00;
};
template <>
struct ScoreBits<float> {
  using Type = uint32_t;
  static constexpr uint32_t kInf = 0x7f800000u;
};
template <>
struct ScoreBits<double> {
  using Type = uint64_t;
  static constexpr uint64_t kInf = 0x7ff0000000000000ull;
};

// Keys order as scores do, with -0 equal to +0 and NaN the smallest of all.
template <typename Score, typename Key = typename ScoreBits<Score>::Type>
UA_INLINE void order_keys(const Score* scores, int count, Key* keys) {
  constexpr Key kSign = Key(Key(1) << (sizeof(Key) * 8 - 1));
  constexpr Key kInf = ScoreBits<Score>::kInf;
  __builtin_memcpy(keys, scores, count * sizeof(Key));
  for (int i = 0; i < count; ++i) {
    const Key bits = keys[i];
    const Key magnitude = Key(bits & Key(~kSign));
    Key key = bits > kSign ? Key(~bits) : Key(bits | kSign);
    key = magnitude > kInf ? Key(0) : key;
    keys[i] = key;
  }
}

// What a row takes: sinks [first, first + sinks), recents [end - recents, end), and `wanted` of what lies between.
struct RowPlan {
  int first;
  int end;
  int sinks;
  int recents;
  int wanted;
};

UA_INLINE RowPlan plan_row(const TopkPagesParams& p, int b, int t) {
  const int position = query_position(p.table.seq_lens[b], p.num_query_tokens, t);
  const PageRange visible = visible_pages(position, p.window, p.table.page_size);
  RowPlan row;
  row.end = min_of(visible.end, p.num_pages);
  row.first = min_of(visible.first, row.end);
  const int budget = p.budget_pages != nullptr ? max_of(min_of(p.k, p.budget_pages[b]), 0) : p.k;
  row.recents = min_of(min_of(p.recent_pages, budget), row.end - row.first);
  row.sinks = max_of(min_of(min_of(p.sink_pages, row.end - row.recents) - row.first, budget - row.recents), 0);
  row.wanted = min_of(budget - row.recents - row.sinks, row.end - row.first - row.recents - row.sinks);
  return row;
}

template <typename Score>
class RowSelector {
  using Key = typename ScoreBits<Score>::Type;

 public:
  // The `wanted` best of scores[low .. high) are those with a key above `threshold`, and the first `ties` equal to it.
  // Fewer than high - low are wanted, and at least one.
  void find_threshold(const Score* scores, int low, int high, int wanted) {
    threshold = 0;
    ties = wanted;
    for (int shift = static_cast<int>(sizeof(Key)) * 8 - 8; shift >= 0; shift -= 8) {
      count_bins(scores, low, high, shift);
      int bin = kBins - 1;
      while (static_cast<int>(bins[bin]) < ties) ties -= static_cast<int>(bins[bin--]);
      threshold = Key(threshold | Key(Key(bin) << shift));
      // All pages of this bin are wanted: no further round can drop one, and none lies between them and the next bin.
      if (static_cast<int>(bins[bin]) == ties) return;
    }
  }

  template <typename Emit>
  UA_INLINE void collect(const Score* scores, int low, int high, int wanted, const Emit& emit) {
    Key keys[kBlock];
    int left = ties;
    for (int base = low; base < high && wanted > 0; base += kBlock) {
      const int count = min_of(kBlock, high - base);
      order_keys(scores + base, count, keys);
      for (int from = 0; from < count; from += kGroup) {
        const int to = min_of(from + kGroup, count);
        unsigned any = 0;
        for (int i = from; i < to; ++i) any |= keys[i] >= threshold;
        if (any == 0) continue;
        for (int i = from; i < to; ++i) {
          if (keys[i] < threshold) continue;
          if (keys[i] == threshold && left-- <= 0) continue;
          emit(base + i);
          --wanted;
        }
      }
    }
  }

 private:
  static constexpr int kGroup = 32;  // keys that are skipped together

  // Histogram of the 8 bits above `shift` of the keys whose higher bits are those of the threshold.
  void count_bins(const Score* scores, int low, int high, int shift) {
    constexpr int kTop = static_cast<int>(sizeof(Key)) * 8 - 8;
    // Neighbouring scores often fall into one bin: four histograms keep the increments independent.
    uint32_t parts[4][kBins];
    __builtin_memset(parts, 0, sizeof(parts));
    Key keys[kBlock];
    for (int base = low; base < high; base += kBlock) {
      const int count = min_of(kBlock, high - base);
      order_keys(scores + base, count, keys);
      if (shift == kTop) {
        for (int i = 0; i < count; ++i) ++parts[i & 3][keys[i] >> kTop];
        continue;
      }
      const Key prefix = Key(threshold >> (shift + 8));
      for (int from = 0; from < count; from += kGroup) {
        const int to = min_of(from + kGroup, count);
        unsigned any = 0;
        for (int i = from; i < to; ++i) any |= Key(keys[i] >> (shift + 8)) == prefix;
        if (any == 0) continue;
        for (int i = from; i < to; ++i) {
          if (Key(keys[i] >> (shift + 8)) == prefix) ++parts[i & 3][keys[i] >> shift & 0xff];
        }
      }
    }
    for (int i = 0; i < kBins; ++i) bins[i] = parts[0][i] + parts[1][i] + parts[2][i] + parts[3][i];
  }

  Key threshold;
  int ties;
  uint32_t bins[kBins];
};

template <typename Score>
void select_rows(const TopkPagesParams& p, const CpuExecutor& exec) {
  const int64_t rows = int64_t{p.batch} * p.num_query_tokens * p.num_kv_heads;
  const int pages_per_block = p.table.block_size / p.table.page_size;
  parallel_for(exec, rows, grain_for(int64_t{16} * p.num_pages), [&](int64_t begin, int64_t end) {
    RowSelector<Score> selector;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / p.num_kv_heads;
      const int b = static_cast<int>(token / p.num_query_tokens);
      const RowPlan row = plan_row(p, b, static_cast<int>(token % p.num_query_tokens));
      const int32_t* blocks = p.table.blocks + b * p.table.stride_seq;
      int32_t* out = p.pages + i * p.k;
      int32_t* const out_end = out + p.k;
      const auto emit = [&](int page) {
        *out++ = p.physical ? blocks[page / pages_per_block] * pages_per_block + page % pages_per_block : page;
      };
      const int low = row.first + row.sinks;
      const int high = row.end - row.recents;
      for (int page = row.first; page < low; ++page) emit(page);
      if (row.wanted == high - low) {
        for (int page = low; page < high; ++page) emit(page);
      } else if (row.wanted > 0) {
        const Score* scores = static_cast<const Score*>(p.scores) + i * p.num_pages;
        selector.find_threshold(scores, low, high, row.wanted);
        selector.collect(scores, low, high, row.wanted, emit);
      }
      for (int page = high; page < row.end; ++page) emit(page);
      while (out < out_end) *out++ = -1;
    }
  });
}

}  // namespace

void topk_pages_cpu(const TopkPagesParams& params, const CpuExecutor& exec) {
  if (params.num_query_tokens == 0 || params.num_kv_heads == 0 || params.k == 0) return;
  UA_DISPATCH_CPU_DTYPE(params.dtype, Score, select_rows<Score>(params, exec));
}

}  // namespace UA_ISA
}  // namespace unique_attn
