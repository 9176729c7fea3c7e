// One work item is one touched page of one KV head. Its keys are read twice (two-pass variance), the second time from
// the first-level cache.
#include "core/index/entries_cpu.h"
#include "core/index/page_index.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

constexpr int kAhead = 2;  // items from a prefetch to its use

template <typename RuleT, typename T, bool kCompressed>
void encode_pages(const PageIndexParams& p, const CpuExecutor& exec) {
  const int page_size = p.table.page_size;
  const int pages_per_block = p.table.block_size / page_size;
  int64_t total = 0;
  for (int b = 0; b < p.batch; ++b) {
    const PageRange pages = touched_pages(p, b);
    total += int64_t{pages.end - pages.first} * p.num_kv_heads;
  }
  const int64_t work = int64_t{2} * page_size * p.head_dim;
  parallel_for(exec, total, grain_for(work), [&](int64_t begin, int64_t end) {
    int64_t skipped = 0;  // items of the sequences before b
    for (int b = 0; b < p.batch && skipped < end; ++b) {
      const PageRange pages = touched_pages(p, b);
      const int64_t items = int64_t{pages.end - pages.first} * p.num_kv_heads;
      const int64_t from = begin > skipped ? begin - skipped : 0;
      const int64_t to = end - skipped < items ? end - skipped : items;
      const auto block_of = [&](int64_t item) {
        const int page = pages.first + static_cast<int>(item / p.num_kv_heads);
        return physical_block(p.table, b, page / pages_per_block);
      };
      const auto keys_of = [&](int64_t item, int block) -> const T* {
        const int page = pages.first + static_cast<int>(item / p.num_kv_heads);
        const int64_t offset = int64_t{page % pages_per_block} * page_size;
        return token_row<T>(p.k_cache, block, item % p.num_kv_heads, offset);
      };
      for (int64_t i = from; i < to; ++i) {
        const int page = pages.first + static_cast<int>(i / p.num_kv_heads);
        const int block = block_of(i);
        if (block < 0 || !has_written_token(p, b, page)) continue;
        const int64_t ahead = i + kAhead < items ? i + kAhead : i;
        const T* const next = keys_of(ahead, max_of(block_of(ahead), 0));
        for (int j = 0; j < page_size; ++j) {
          for (int d = 0; d < p.head_dim; d += line_channels<T>()) {
            __builtin_prefetch(next + j * p.k_cache.stride_token + d);
          }
        }
        uint8_t* entry = p.index.data + block * p.index.stride_block + i % p.num_kv_heads * p.index.stride_head +
                         page % pages_per_block * p.index.stride_page;
        const int count = min_of(page_size, p.table.seq_lens[b] - page * page_size);
        if constexpr (kCompressed) {
          AccOf<T> statistics[2 * kMaxHeadDim];  // means, then standard deviations
          encode_page<MeanAndSpread<ScoreForm::kVectorSpread>>(keys_of(i, block), p.k_cache.stride_token, count,
                                                               p.head_dim, statistics);
          compress_entry<RuleT>(statistics, statistics + p.head_dim, p.head_dim, entry);
        } else {
          encode_page<RuleT>(keys_of(i, block), p.k_cache.stride_token, count, p.head_dim, reinterpret_cast<T*>(entry));
        }
      }
      skipped += items;
    }
  });
}

}  // namespace

void page_index_cpu(const PageIndexParams& params, const CpuExecutor& exec) {
  if (params.num_kv_heads == 0) return;
  UA_DISPATCH_CPU_DTYPE(params.dtype, T,
                        UA_DISPATCH_INDEX(params.index.format, params.rule, RuleT, kCompressed,
                                          encode_pages<RuleT, T, kCompressed>(params, exec)));
}

}  // namespace UA_ISA
}  // namespace unique_attn
