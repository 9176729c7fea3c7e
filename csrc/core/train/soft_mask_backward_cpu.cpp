// One work item is one KV head of one sequence: it owns its keys' gradients, so nothing is added from two sides. Tokens
// are walked in order; a page's mean and spread collect the gradients of its scores and hand them to its keys at the
// end (see soft_mask_dkv_cuda.cu for the formulas).
#include "core/train/soft_mask_cpu.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

template <typename T>
class Backward {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;

 public:
  UA_INLINE explicit Backward(const SoftMaskBackwardParams& params)
      : b(params),
        p(params.forward),
        query(p),
        stride(query.stride),
        rows(p.seqs.max_seqlen),
        pages(p.seqs.max_seqlen / p.seqs.page_size + 1),
        scratch(Scratch::padded<Acc>(rows * stride) * 2 + Scratch::padded<Acc>(pages * stride) * 2 +
                Scratch::padded<Acc>(int64_t{padded_rows(query.group)} * stride) * 2 +
                Scratch::padded<Acc>(int64_t{padded_rows(query.group)} * query.row) + Scratch::padded<Acc>(pages)) {
    dk = scratch.template take<Acc>(rows * stride);
    dv = scratch.template take<Acc>(rows * stride);
    d_mean = scratch.template take<Acc>(pages * stride);
    d_spread = scratch.template take<Acc>(pages * stride);
    grad = scratch.template take<Acc>(int64_t{padded_rows(query.group)} * stride);
    dq = scratch.template take<Acc>(int64_t{padded_rows(query.group)} * stride);
    dp = scratch.template take<Acc>(int64_t{padded_rows(query.group)} * query.row);
    d_gate = scratch.template take<Acc>(pages);
    clear(grad, int64_t{padded_rows(query.group)} * stride);
  }

  void run(int sequence, int head) {
    query.enter(sequence, head);
    const int length = p.seqs.cu_seqlens[sequence + 1] - query.start;
    for (Acc* x : {dk, dv}) clear(x, int64_t{length} * stride);
    for (Acc* x : {d_mean, d_spread}) clear(x, int64_t{length / p.seqs.page_size} * stride);
    for (int position = 0; position < length; ++position) add_token(position);
    if (p.mode == MaskMode::kSoft) {
      for (int page = 0; page < length / p.seqs.page_size; ++page) spread_page(page);
    }
    for (int i = 0; i < length; ++i) {
      const int64_t at = (int64_t{query.start + i} * p.num_kv_heads + head) * p.head_dim;
      write(static_cast<T*>(b.dk) + at, dk + i * stride);
      write(static_cast<T*>(b.dv) + at, dv + i * stride);
    }
  }

 private:
  static void clear(Acc* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = Acc(0);
  }
  // y += a * x, x a padded row.
  UA_INLINE void add(Acc* y, Acc a, const Acc* x) const {
    const V factor(a);
    for (int d = 0; d < stride; d += V::kLanes)
      store(y + d, load(y + d, Full()) + factor * load(x + d, Full()), Full());
  }
  // y += a * x, x a row of T.
  UA_INLINE void add(Acc* y, Acc a, const T* x, int) const {
    const V factor(a);
    each_vector<Acc>(p.head_dim, [&](int d, auto part) __attribute__((always_inline)) {
      store(y + d, load(y + d, Full()) + factor * load(x + d, part), Full());
    });
  }
  UA_INLINE void write(T* to, const Acc* from) const {
    each_vector<Acc>(p.head_dim, [&](int d, auto part)
                                     __attribute__((always_inline)) { store(to + d, load(from + d, Full()), part); });
  }

  void add_token(int position) {
    const int group = query.group;
    const int count = position + 1;
    const int64_t first_row = int64_t{query.start + position} * p.num_q_heads + int64_t{query.head} * group;
    query.compute(position);
    widen_rows(static_cast<const T*>(b.grad_out) + first_row * p.head_dim, p.head_dim, group, p.head_dim, grad, stride);
    // d loss / d probability = grad_out . v_j
    sum_all_rows<DotProduct, T>(query.values, count, grad, group, stride, p.head_dim, Ahead<T>{nullptr, 0, 0},
                                Sums<Acc>{dp, query.row, 0});
    clear(dq, int64_t{group} * stride);
    for (int page = query.range.first; page < query.range.end; ++page) d_gate[page] = Acc(0);
    for (int g = 0; g < group; ++g) {
      const T* out = static_cast<const T*>(p.out) + (first_row + g) * p.head_dim;
      Acc delta(0);
      for (int d = 0; d < p.head_dim; ++d) delta += Acc(to_scalar(out[d])) * grad[g * stride + d];
      static_cast<Acc*>(b.delta)[first_row + g] = delta;
      const Acc lse = static_cast<const Acc*>(p.lse)[first_row + g];
      Acc* x = query.logits + g * query.row;
      Acc* ds = dp + g * query.row;
      for (int j = 0; j < count; ++j) {
        x[j] = scalar_exp(x[j] - lse);
        ds[j] = x[j] == Acc(0) ? Acc(0) : x[j] * (ds[j] - delta);  // a gate of 0 hides its values, NaN and all
      }
      for (int page = query.range.first; page < query.range.end; ++page) {
        Acc sum(0);
        for (int j = page * p.seqs.page_size; j < (page + 1) * p.seqs.page_size; ++j) sum += ds[j];
        d_gate[page] += sum;
      }
    }
    add_products(count);
    if (p.mode == MaskMode::kSoft) add_scores();
    for (int g = 0; g < group; ++g) write(static_cast<T*>(b.dq) + (first_row + g) * p.head_dim, dq + g * stride);
  }

  // dv += P^T grad_out, dk += scale dS^T q, dq = scale dS K over the first `count` keys. The heads are summed before
  // they join the sum over tokens: fewer roundings, and a key's row is touched once.
  void add_products(int count) {
    const V scale(static_cast<Acc>(p.scale));
    for (int j = 0; j < count; ++j) {
      const Acc* prob = query.logits + j;
      const Acc* ds = dp + j;
      each_vector<Acc>(p.head_dim, [&](int d, auto part) __attribute__((always_inline)) {
        const V key = load(query.keys[j] + d, part);
        V of_value(Acc(0)), of_key(Acc(0));
        for (int g = 0; g < query.group; ++g) {
          if (prob[g * query.row] == Acc(0)) continue;
          const V s(ds[g * query.row]);
          of_value += V(prob[g * query.row]) * load(grad + g * stride + d, Full());
          of_key += s * load(query.q + g * stride + d, Full());
          store(dq + g * stride + d, load(dq + g * stride + d, Full()) + scale * s * key, Full());
        }
        store(dv + int64_t{j} * stride + d, load(dv + int64_t{j} * stride + d, Full()) + of_value, Full());
        store(dk + int64_t{j} * stride + d, load(dk + int64_t{j} * stride + d, Full()) + scale * of_key, Full());
      });
    }
  }

  // Gradients of the scores of the pages with a gate, to the arg-max head's query and the page's mean and spread.
  void add_scores() {
    for (int page = query.range.first; page < query.range.end; ++page) {
      const Acc gradient = d_gate[page] * query.slope[page];
      // Without a boundary the slope is 0 and nothing was scored, not even where d_gate is NaN.
      if (gradient == Acc(0) || query.slope[page] == Acc(0)) continue;
      const int g = query.gates.best[page];
      const Acc* q = query.q + g * stride;
      const T* entry = query.gates.entries[page];
      add(dq + g * stride, gradient, entry, 0);
      add(d_mean + int64_t{page} * stride, gradient, q);
      const Acc root = query.gates.root[page];
      if (!(root > Acc(0))) continue;
      Acc* to = d_spread + int64_t{page} * stride;
      if (p.form == ScoreForm::kVectorSpread) {
        const V factor(gradient * Acc(p.spread_weight) / root);
        for (int d = 0; d < stride; d += V::kLanes) {
          const V x = load(q + d, Full());
          store(to + d, load(to + d, Full()) + factor * x * x, Full());
        }
      } else if (p.form == ScoreForm::kScalarSpread) {
        const Acc std = to_scalar(entry[p.head_dim]);
        const V factor(gradient * Acc(p.spread_weight) * root / (std * std));  // root = norm(q) * std
        for (int d = 0; d < stride; d += V::kLanes) store(to + d, load(to + d, Full()) + factor, Full());
      }
    }
  }

  // Hands a page's gradients to its keys: dk_jd += (d_mean_d + d_spread_d * (k_jd - mean_d)) / S.
  void spread_page(int page) {
    const int page_size = p.seqs.page_size;
    const T* const* keys = query.keys + page * page_size;
    const V per_key(Acc(1) / page_size);
    each_vector<Acc>(p.head_dim, [&](int d, auto part) __attribute__((always_inline)) {
      V mean(Acc(0));
      for (int j = 0; j < page_size; ++j) mean += load(keys[j] + d, part);
      mean = mean * per_key;
      const V of_mean = load(d_mean + int64_t{page} * stride + d, Full());
      const V of_spread = load(d_spread + int64_t{page} * stride + d, Full());
      for (int j = 0; j < page_size; ++j) {
        Acc* to = dk + int64_t{page * page_size + j} * stride + d;
        const V diff = load(keys[j] + d, part) - mean;
        store(to, load(to, Full()) + (of_mean + of_spread * diff) * per_key, Full());
      }
    });
  }

  const SoftMaskBackwardParams& b;
  const SoftMaskForwardParams& p;
  QueryLogits<T> query;
  const int stride;
  const int64_t rows;
  const int64_t pages;
  Scratch scratch;
  Acc* dk;        // [length][stride]
  Acc* dv;        // [length][stride]
  Acc* d_mean;    // [pages][stride]
  Acc* d_spread;  // [pages][stride]: factor of (k - mean) / S
  Acc* grad;      // [padded rows][stride]
  Acc* dq;        // [rows][stride]
  Acc* dp;        // [padded rows][row]: d loss / d probability, then d loss / d logit
  Acc* d_gate;    // per page: d loss / d log gate
};

}  // namespace

void soft_mask_backward_cpu(const SoftMaskBackwardParams& params, const CpuExecutor& exec) {
  const SoftMaskForwardParams& p = params.forward;
  const int64_t items = int64_t{p.seqs.batch} * p.num_kv_heads;
  if (items == 0 || p.seqs.total_tokens == 0) return;
  UA_DISPATCH_CPU_DTYPE(p.dtype, T, {
    parallel_for(exec, items, 1, [&](int64_t begin, int64_t end) {
      Backward<T> backward(params);
      for (int64_t i = begin; i < end; ++i) {
        backward.run(static_cast<int>(i / p.num_kv_heads), static_cast<int>(i % p.num_kv_heads));
      }
    });
  });
}

}  // namespace UA_ISA
}  // namespace unique_attn
