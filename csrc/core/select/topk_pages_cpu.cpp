// One work item is one row. Scores become integers that order as they do, the key of the last page to take is found
// (cpu/select.h), and a last walk collects the pages in ascending order.
#include "core/cpu/select.h"
#include "core/select/topk_pages.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

// emit(i) for the `wanted` keys that the threshold takes, in ascending order.
template <typename Key, typename Emit>
UA_INLINE void collect(const Key* keys, int count, Threshold<Key> threshold, int wanted, const Emit& emit) {
  Key least = threshold.bound;
  each_passing(
      keys, count, [&](Key key) { return key >= least; },
      [&](int i) {
        if (keys[i] == threshold.bound && threshold.ties-- <= 0) {
          least = Key(threshold.bound + 1);  // the row may be full of ties: whole vectors of them fail from here on
          return true;
        }
        emit(i);
        return --wanted > 0;
      });
}

template <typename Score>
void select_rows(const TopkPagesParams& p, const CpuExecutor& exec) {
  const int64_t rows = int64_t{p.batch} * p.num_query_tokens * p.num_kv_heads;
  using Key = OrderKey<Score>;
  parallel_for(exec, rows, grain_for(int64_t{8} * p.row_pages), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::padded<Key>(p.row_pages) + Scratch::padded<Key>(p.row_pages / 4));
    Key* const keys = scratch.take<Key>(p.row_pages);
    Key* const spare = scratch.take<Key>(p.row_pages / 4);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / p.num_kv_heads;
      const int b = static_cast<int>(token / p.num_query_tokens);
      const RowPlan row = plan_row(p, b, static_cast<int>(token % p.num_query_tokens));
      int32_t* out = p.pages + i * p.k;
      int32_t* const out_end = out + p.k;
      const auto emit = [&](int page) { *out++ = output_page(p, b, page); };
      const int low = row.first + row.sinks;
      const int high = row.end - row.recents;
      const int wanted = min_of(row.k - row.recents - row.sinks, high - low);  // of what lies between them
      for (int page = row.first; page < low; ++page) emit(page);
      if (wanted == high - low) {
        for (int page = low; page < high; ++page) emit(page);
      } else if (wanted > 0) {
        const Score* scores = static_cast<const Score*>(p.scores) + i * p.row_pages;
        order_keys(scores + low, high - low, keys);
        const Threshold<Key> threshold = find_threshold(keys, high - low, wanted, spare);
        collect(keys, high - low, threshold, wanted, [&](int i) { emit(low + i); });
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
