// One work item is one block of queries of one head: the listed blocks of keys are walked in ascending order with an
// online softmax. Queries are lanes, so no sum runs across lanes, and what a query does not see cannot reach it: not even
// a NaN in a key that only a later query of its vector sees.
#include "core/cpu/tile.h"
#include "core/prefill/block_sparse.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

constexpr int kStripVectors = 2;                       // vectors of queries that are worked on together: a strip
constexpr int kStripSums = kTileSums / kStripVectors;  // keys, or channels of the output, that a strip meets at once
static_assert(8 % kStripSums == 0, "head dimensions and blocks are whole tiles");

UA_INLINE float log_of(float x) { return __builtin_logf(x); }
UA_INLINE double log_of(double x) { return __builtin_log(x); }

template <typename T>
class BlockAttention {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kStrip = kStripVectors * kLanes;  // queries

 public:
  UA_INLINE explicit BlockAttention(const BlockSparseParams& params)
      : p(params),
        dim(p.head_dim),
        stride(static_cast<int>(round_up(dim, kLanes))),
        scratch(2 * Scratch::padded<Acc>(int64_t{p.block_q} * dim) + 3 * Scratch::padded<Acc>(p.block_q) +
                2 * Scratch::padded<Acc>(int64_t{p.block_k} * stride) +
                Scratch::padded<Acc>(int64_t{p.block_k} * kStrip) + Scratch::padded<Acc>(stride)) {
    q = scratch.template take<Acc>(int64_t{p.block_q} * dim);
    out = scratch.template take<Acc>(int64_t{p.block_q} * dim);
    maxima = scratch.template take<Acc>(p.block_q);
    totals = scratch.template take<Acc>(p.block_q);
    corrections = scratch.template take<Acc>(p.block_q);
    keys = scratch.template take<Acc>(int64_t{p.block_k} * stride);
    values = scratch.template take<Acc>(int64_t{p.block_k} * stride);
    weights = scratch.template take<Acc>(int64_t{p.block_k} * kStrip);
    line = scratch.template take<Acc>(stride);
    // Tiles multiply a few keys past the last one, to no effect.
    for (int64_t i = 0; i < int64_t{p.block_k} * stride; ++i) keys[i] = Acc(0);
  }

  void run(int slot, int head) {
    const QueryBlock at = query_block_at(p.cu_seqlens_q, p.cu_seqlens_k, p.batch, p.block_q, slot);
    const int first = at.first_query;
    rows = at.num_queries;
    if (rows <= 0) return;
    sequence = at.sequence;
    const int num_keys = p.cu_seqlens_k[sequence + 1] - p.cu_seqlens_k[sequence];
    position = at.position;
    enter(first, head);
    const uint32_t* mask = p.mask + (int64_t{slot} * p.num_mask_heads + mask_head(p, head)) * p.mask_words;
    const int end = visible_blocks(p, position + rows - 1);
    int first_key = num_keys;  // of the first listed block
    for (int word = 0; word * kMaskBits < end; ++word) {
      for (uint32_t bits = mask[word]; bits != 0; bits &= bits - 1) {
        const int block = word * kMaskBits + __builtin_ctz(bits);
        if (block >= end) break;
        first_key = min_of(first_key, block * p.block_k);
        add_block(block * p.block_k, head);
      }
    }
    leave(first, head, first_key);
  }

 private:
  // The queries of the block as strips [D][kStrip], and no key so far.
  void enter(int first, int head) {
    const int strips = (rows + kStrip - 1) / kStrip;
    const T* from = static_cast<const T*>(p.q) + int64_t{first} * p.q_stride_token + int64_t{head} * p.q_stride_head;
    for (int row = 0; row < strips * kStrip; ++row) {
      Acc* to = q + int64_t{row / kStrip} * kStrip * dim + row % kStrip;
      if (row < rows) widen_rows(from + row * p.q_stride_token, 0, 1, dim, line, stride);
      for (int d = 0; d < dim; ++d) to[d * kStrip] = row < rows ? line[d] : Acc(0);
      maxima[row] = -Acc(__builtin_inff());
      totals[row] = Acc(0);
    }
    for (int64_t i = 0; i < int64_t{strips} * kStrip * dim; ++i) out[i] = Acc(0);
  }

  // One more block of keys, from `block_start` on: each strip sees those up to its last query.
  void add_block(int block_start, int head) {
    const int count = min_of(p.block_k, position + rows - block_start);
    if (is_paged(p.table)) {
      widen_keys<true>(p.k, block_start, count, head, keys);
      widen_keys<true>(p.v, block_start, count, head, values);
    } else {
      widen_keys<false>(p.k, block_start, count, head, keys);
      widen_keys<false>(p.v, block_start, count, head, values);
    }
    for (int row = 0; row < rows; row += kStrip) {
      const int own = position + row - block_start;  // the strip's first query, counted from the block's first key
      const int seen = min_of(count, own + min_of(kStrip, rows - row));
      if (seen <= 0) continue;
      const int common = max_of(min_of(seen, own + 1), 0);  // keys that every query of the strip sees
      multiply_keys(q + int64_t{row} * dim, seen);
      weigh(row, own, common, seen);
      add_values(out + int64_t{row} * dim, corrections + row, own, common, seen);
    }
  }

  // `count` keys or values of the sequence, from `first` on.
  template <bool kPaged>
  UA_INLINE void widen_keys(const KeyView& view, int first, int count, int head, Acc* to) {
    const HeadKeys<T, kPaged> from(view, p.table, p.cu_seqlens_k[sequence], sequence, kv_head(head));
    for (int done = 0; done < count;) {
      const int some = min_of(from.run(first + done), count - done);
      widen_rows(from.row(first + done), from.stride(), some, dim, to + int64_t{done} * stride, stride);
      done += some;
    }
  }

  UA_INLINE int kv_head(int head) const { return head / (p.num_q_heads / p.num_kv_heads); }

  // weights[j][query] = scale * q . k_j, for the first `count` keys and some more.
  UA_INLINE void multiply_keys(const Acc* strip, int count) {
    const V scale(static_cast<Acc>(p.scale));
    for (int j = 0; j < count; j += kStripSums) {
      V acc[kStripSums][kStripVectors];
      UA_UNROLL
      for (int i = 0; i < kStripSums; ++i) {
        UA_UNROLL
        for (int s = 0; s < kStripVectors; ++s) acc[i][s] = V(Acc(0));
      }
      const Acc* key = keys + int64_t{j} * stride;
      for (int d = 0; d < dim; ++d) {
        V query[kStripVectors];
        UA_UNROLL
        for (int s = 0; s < kStripVectors; ++s) query[s] = load(strip + d * kStrip + s * kLanes, Full());
        UA_UNROLL
        for (int i = 0; i < kStripSums; ++i) {
          const V channel(key[i * stride + d]);
          UA_UNROLL
          for (int s = 0; s < kStripVectors; ++s) acc[i][s] += channel * query[s];
        }
      }
      UA_UNROLL
      for (int i = 0; i < kStripSums; ++i) {
        UA_UNROLL
        for (int s = 0; s < kStripVectors; ++s) {
          store(weights + (j + i) * kStrip + s * kLanes, acc[i][s] * scale, Full());
        }
      }
    }
  }

  // Lanes of a strip's vector s whose queries see key j; `own` as in add_block.
  UA_INLINE static auto sees(int s, int own, int j) {
    typename V::Bits lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane >= j - own - s * kLanes;
  }

  // Turns logits into weights relative to the running maximum. Logits that are all -inf so far weigh 0, and leave
  // 0 / 0 = NaN if nothing else comes, as softmax does.
  UA_INLINE void weigh(int row, int own, int common, int seen) {
    const V minus_inf(-static_cast<Acc>(__builtin_inff()));
    UA_UNROLL
    for (int s = 0; s < kStripVectors; ++s) {
      Acc* x = weights + s * kLanes;
      const int at = row + s * kLanes;
      const V old_max = load(maxima + at, Full());
      V top = old_max;
      for (int j = 0; j < common; ++j) top = max_number(top, load(x + j * kStrip, Full()));
      for (int j = common; j < seen; ++j) {
        const V logit = select(sees(s, own, j), load(x + j * kStrip, Full()), minus_inf);
        store(x + j * kStrip, logit, Full());
        top = max_number(top, logit);
      }
      const V offset = select(top > minus_inf, top, V(Acc(0)));
      V total(Acc(0));
      for (int j = 0; j < seen; ++j) {
        const V weight = exp_negative(load(x + j * kStrip, Full()) - offset);
        store(x + j * kStrip, weight, Full());
        total += weight;
      }
      const V correction = exp_negative(old_max - offset);
      store(corrections + at, correction, Full());
      store(totals + at, load(totals + at, Full()) * correction + total, Full());
      store(maxima + at, top, Full());
    }
  }

  // strip = strip * correction + weights . values.
  UA_INLINE void add_values(Acc* strip, const Acc* correction, int own, int common, int seen) {
    for (int d = 0; d < dim; d += kStripSums) {
      V acc[kStripSums][kStripVectors];
      UA_UNROLL
      for (int s = 0; s < kStripVectors; ++s) {
        const V factor = load(correction + s * kLanes, Full());
        UA_UNROLL
        for (int i = 0; i < kStripSums; ++i) {
          acc[i][s] = load(strip + (d + i) * kStrip + s * kLanes, Full()) * factor;
        }
      }
      for (int j = 0; j < common; ++j) {
        V weight[kStripVectors];
        UA_UNROLL
        for (int s = 0; s < kStripVectors; ++s) weight[s] = load(weights + j * kStrip + s * kLanes, Full());
        UA_UNROLL
        for (int i = 0; i < kStripSums; ++i) {
          const V channel(values[j * stride + d + i]);
          UA_UNROLL
          for (int s = 0; s < kStripVectors; ++s) acc[i][s] += channel * weight[s];
        }
      }
      for (int j = common; j < seen; ++j) {
        UA_UNROLL
        for (int s = 0; s < kStripVectors; ++s) {
          const V weight = load(weights + j * kStrip + s * kLanes, Full());
          UA_UNROLL
          for (int i = 0; i < kStripSums; ++i) {
            acc[i][s] = select(sees(s, own, j), acc[i][s] + V(values[j * stride + d + i]) * weight, acc[i][s]);
          }
        }
      }
      UA_UNROLL
      for (int i = 0; i < kStripSums; ++i) {
        UA_UNROLL
        for (int s = 0; s < kStripVectors; ++s) store(strip + (d + i) * kStrip + s * kLanes, acc[i][s], Full());
      }
    }
  }

  void leave(int first, int head, int first_key) {
    for (int row = 0; row < rows; ++row) {
      const int64_t at = int64_t{first + row} * p.num_q_heads + head;
      const bool empty = position + row < first_key;
      const V total(empty ? Acc(1) : totals[row]);
      const Acc* from = out + int64_t{row / kStrip} * kStrip * dim + row % kStrip;
      for (int d = 0; d < dim; ++d) line[d] = from[d * kStrip];
      T* to = static_cast<T*>(p.out) + at * dim;
      each_vector<Acc>(dim, [&](int d, auto part) __attribute__((always_inline)) {
        store(to + d, load(line + d, Full()) / total, part);
      });
      static_cast<Acc*>(p.lse)[at] = maxima[row] + log_of(totals[row]);
    }
  }

  const BlockSparseParams& p;
  const int dim;
  const int stride;  // of keys and values
  Scratch scratch;
  int sequence = 0;
  int rows = 0;      // queries of the block
  int position = 0;  // of the first of them
  Acc* q;            // [strips][D][kStrip]
  Acc* out;          // [strips][D][kStrip], relative to the running maximum
  Acc* maxima;       // [queries], as the next two
  Acc* totals;
  Acc* corrections;  // by the last block
  Acc* keys;         // [keys of a block][stride], as the next
  Acc* values;
  Acc* weights;  // [keys of a block][kStrip] of one strip; first the logits
  Acc* line;     // [stride] channels of one query
};

template <typename T>
void attend(const BlockSparseParams& p, const CpuExecutor& exec) {
  const int slots = num_block_slots(p.total_queries, p.batch, p.block_q);
  const int64_t items = int64_t{slots} * p.num_q_heads;
  const int64_t work = int64_t{2} * p.block_q * p.block_k * p.head_dim;
  // Items cost what their rows of the mask list, so threads take one after the other instead of equal ranges, the late
  // and long query blocks first. Which thread computes an item makes no difference to it.
  int64_t taken = 0;
  parallel_for(exec, items, grain_for(work), [&](int64_t, int64_t) {
    BlockAttention<T> attention(p);
    for (;;) {
      const int64_t item = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
      if (item >= items) break;
      attention.run(slots - 1 - static_cast<int>(item / p.num_q_heads), static_cast<int>(item % p.num_q_heads));
    }
  });
}

}  // namespace

void block_sparse_attention_cpu(const BlockSparseParams& params, const CpuExecutor& exec) {
  if (params.total_queries == 0) return;
  UA_DISPATCH_CPU_DTYPE(params.dtype, T, attend<T>(params, exec));
}

}  // namespace UA_ISA
}  // namespace unique_attn
