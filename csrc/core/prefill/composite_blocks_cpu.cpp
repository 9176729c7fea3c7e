// Pages first, one work item for each slot and KV head. Then one work item is one block of queries of one head: logits
// of its pooled queries with all pages that they see, a softmax of each row, and sums by key blocks.
#include "core/index/entries_cpu.h"
#include "core/prefill/composite_blocks.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

template <typename RuleT, typename T, bool kPaged>
void pool_keys(const CompositeBlocksParams& p, const CpuExecutor& exec) {
  const int slots = num_block_slots(p.total_keys, p.batch, p.pool_k);
  const int64_t work = int64_t{2} * p.pool_k * p.head_dim * p.num_kv_heads;
  parallel_for(exec, slots, grain_for(work), [&](int64_t begin, int64_t end) {
    const int64_t gathered_size = kPaged ? int64_t{p.pool_k} * p.head_dim : 0;
    Scratch scratch(Scratch::padded<T>(gathered_size));
    T* const gathered = scratch.template take<T>(gathered_size);
    for (int64_t slot = begin; slot < end; ++slot) {
      const BlockOfSlot at = block_of_slot(p.cu_seqlens_k, p.batch, p.pool_k, static_cast<int>(slot));
      const int start = p.cu_seqlens_k[at.sequence];
      const int first = at.block * p.pool_k;
      const int count = min_of(p.cu_seqlens_k[at.sequence + 1] - start - first, p.pool_k);
      if (count <= 0) continue;
      for (int head = 0; head < p.num_kv_heads; ++head) {
        const HeadKeys<T, kPaged> keys(p.k, p.table, start, at.sequence, head);
        AccOf<T>* entry =
            static_cast<AccOf<T>*>(p.pages) + (slot * p.num_kv_heads + head) * RuleT::kVectors * p.head_dim;
        if (keys.run(first) >= count) {
          encode_page<RuleT>(keys.row(first), keys.stride(), count, p.head_dim, entry);
          continue;
        }
        for (int j = 0; j < count; ++j) {
          __builtin_memcpy(gathered + j * p.head_dim, keys.row(first + j), sizeof(T) * p.head_dim);
        }
        encode_page<RuleT>(gathered, p.head_dim, count, p.head_dim, entry);
      }
    }
  });
}

template <typename RuleT, typename T>
class CompositeBlock {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;

 public:
  UA_INLINE explicit CompositeBlock(const CompositeBlocksParams& params)
      : p(params),
        pooled_rows(p.block_q / p.pool_q),
        q_stride(static_cast<int>(round_up(p.head_dim, V::kLanes))),
        row_pages(round_up(int64_t{p.key_blocks} * (p.block_k / p.pool_k), kMaxTile) + kMaxTile),
        scratch(Scratch::padded<Acc>(int64_t{padded_rows(pooled_rows)} * q_stride) +
                Scratch::padded<Acc>(RuleT::kSums * padded_rows(pooled_rows) * row_pages) +
                Scratch::padded<const Acc*>(row_pages)) {
    q = scratch.template take<Acc>(int64_t{padded_rows(pooled_rows)} * q_stride);
    sums = scratch.template take<Acc>(RuleT::kSums * padded_rows(pooled_rows) * row_pages);
    entries = scratch.template take<const Acc*>(row_pages);
    for (int64_t i = 0; i < int64_t{padded_rows(pooled_rows)} * q_stride; ++i) q[i] = Acc(0);
  }

  void run(int slot, int mask_head) {
    const int heads = composite_heads(p);
    Acc* shares = static_cast<Acc*>(p.shares) + (int64_t{slot - p.first_slot} * heads + mask_head) * p.key_blocks;
    for (int block = 0; block < p.key_blocks; ++block) shares[block] = Acc(0);
    const QueryBlock at = query_block_at(p.cu_seqlens_q, p.cu_seqlens_k, p.batch, p.block_q, slot);
    if (at.num_queries <= 0) return;
    const int group = p.num_q_heads / p.num_kv_heads;
    const int kv_head = p.pools_heads ? mask_head : mask_head / group;
    const int key_start = p.cu_seqlens_k[at.sequence];
    const int num_keys = p.cu_seqlens_k[at.sequence + 1] - key_start;
    const int rows = (at.num_queries + p.pool_q - 1) / p.pool_q;
    for (int r = 0; r < rows; ++r) pool_queries(at, r, mask_head);
    const int pages = composite_seen(p, at, rows - 1, num_keys);
    const int64_t first_page = block_slot(key_start, at.sequence, p.pool_k, 0);
    const int64_t entry = int64_t{RuleT::kVectors} * p.head_dim;
    for (int64_t j = 0; j < round_up(pages, kMaxTile); ++j) {
      const int64_t page = first_page + min_of(static_cast<int>(j), pages - 1);
      entries[j] = static_cast<const Acc*>(p.pages) + (page * p.num_kv_heads + kv_head) * entry;
    }
    const int64_t rule_stride = padded_rows(pooled_rows) * row_pages;
    sum_all_rows<RuleT>(entries, pages, q, rows, q_stride, p.head_dim, Ahead<Acc>{entries, 0, 0},
                        Sums<Acc>{sums, row_pages, rule_stride});
    const int block_pages = p.block_k / p.pool_k;
    for (int r = 0; r < rows; ++r) {
      Acc* row = sums + r * row_pages;
      const int seen = composite_seen(p, at, r, num_keys);
      const Acc total = weigh(row, row + rule_stride * (RuleT::kSums - 1), seen);
      for (int block = 0; block * block_pages < seen; ++block) {
        Acc mass(0);
        for (int j = block * block_pages; j < min_of((block + 1) * block_pages, seen); ++j) mass += row[j];
        add(mass / total, rows, shares[block]);
      }
    }
    for (int block = 0; block < p.key_blocks; ++block) {  // by rounding
      shares[block] = shares[block] > Acc(1) ? Acc(1) : shares[block];
    }
  }

 private:
  void pool_queries(const QueryBlock& at, int r, int mask_head) {
    const int first = at.first_query + r * p.pool_q;
    const int count = min_of(at.num_queries - r * p.pool_q, p.pool_q);
    const int group = p.pools_heads ? p.num_q_heads / p.num_kv_heads : 1;
    const T* from =
        static_cast<const T*>(p.q) + int64_t{first} * p.q_stride_token + int64_t{mask_head} * group * p.q_stride_head;
    const V number(static_cast<Acc>(count * group));
    T rounded[kMaxHeadDim];
    each_vector<Acc>(p.head_dim, [&](int d, auto part) __attribute__((always_inline)) {
      V sum(Acc(0));
      for (int i = 0; i < count; ++i) {
        for (int g = 0; g < group; ++g) sum += load(from + i * p.q_stride_token + g * p.q_stride_head + d, part);
      }
      store(rounded + d, sum / number, part);
      store(q + int64_t{r} * q_stride + d, load(rounded + d, part), Full());
    });
  }

  // Logits become weights of a softmax; returns their sum. What is not seen is left as it is.
  Acc weigh(Acc* row, const Acc* spreads, int seen) {
    const V scale(static_cast<Acc>(p.scale)), weight(static_cast<Acc>(p.spread_weight)), none(Acc(0));
    Acc largest = -Acc(__builtin_inff());
    for (int j = 0; j < seen; j += V::kLanes) {
      const V logit = RuleT::finish(load(row + j, Full()), load(spreads + j, Full()), none, none, weight) * scale;
      store(row + j, logit, Full());
    }
    for (int j = 0; j < seen; ++j) largest = row[j] > largest ? row[j] : largest;
    for (int j = 0; j < seen; j += V::kLanes) {
      store(row + j, exp_negative(load(row + j, Full()) - V(largest)), Full());
    }
    Acc total(0);
    for (int j = 0; j < seen; ++j) total += row[j];
    return total;
  }

  UA_INLINE void add(Acc share, int rows, Acc& to) {
    if (p.aggregate == Aggregate::kMean) {
      to += share / rows;
    } else if (!(to >= share) && to == to) {
      to = share;
    }
  }

  const CompositeBlocksParams& p;
  const int pooled_rows;  // of a block of queries
  const int q_stride;
  const int64_t row_pages;
  Scratch scratch;
  Acc* q;               // [padded pooled rows][q_stride]
  Acc* sums;            // [sums][padded pooled rows][row_pages]; u becomes logits, then weights
  const Acc** entries;  // [row_pages]
};

template <typename RuleT, typename T>
void estimate(const CompositeBlocksParams& p, const CpuExecutor& exec) {
  if (p.pools_keys && is_paged(p.table)) {
    pool_keys<RuleT, T, true>(p, exec);
  } else if (p.pools_keys) {
    pool_keys<RuleT, T, false>(p, exec);
  }
  const int heads = composite_heads(p);
  const int64_t items = int64_t{p.end_slot - p.first_slot} * heads;
  const int64_t work =
      int64_t{RuleT::kSums} * (p.block_q / p.pool_q) * p.key_blocks * (p.block_k / p.pool_k) * p.head_dim / 2;
  // Late blocks see more pages: threads take one item after the other, the long ones first.
  int64_t taken = 0;
  parallel_for(exec, items, grain_for(work), [&](int64_t, int64_t) {
    CompositeBlock<RuleT, T> block(p);
    for (;;) {
      const int64_t item = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
      if (item >= items) break;
      block.run(p.end_slot - 1 - static_cast<int>(item / heads), static_cast<int>(item % heads));
    }
  });
}

}  // namespace

void composite_blocks_cpu(const CompositeBlocksParams& params, const CpuExecutor& exec) {
  UA_DISPATCH_CPU_DTYPE(params.dtype, T, {
    if (params.form == ScoreForm::kVectorSpread) {
      estimate<MeanAndSpread<ScoreForm::kVectorSpread>, T>(params, exec);
    } else {
      estimate<MeanAndSpread<ScoreForm::kMean>, T>(params, exec);
    }
  });
}

}  // namespace UA_ISA
}  // namespace unique_attn
