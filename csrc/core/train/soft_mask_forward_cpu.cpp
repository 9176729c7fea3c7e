// One work item is one query token and KV head: logits and gates over the keys it sees, softmax, weighted values.
#include "core/train/soft_mask_cpu.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

template <typename T>
void forward_range(const SoftMaskForwardParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  QueryLogits<T> query(p);
  Scratch scratch(Scratch::padded<Acc>(query.stride));
  Acc* out = scratch.template take<Acc>(query.stride);
  int last_b = -1, last_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    // Items head * N + token, so that a head's rows are looked up once per sequence.
    const int token = static_cast<int>(item % p.seqs.total_tokens);
    const int head = static_cast<int>(item / p.seqs.total_tokens);
    const int b = sequence_of(p.seqs, token);
    if (b != last_b || head != last_head) query.enter(b, head);
    last_b = b;
    last_head = head;
    const int count = token - query.start + 1;
    query.compute(count - 1);
    for (int g = 0; g < query.group; ++g) {
      Acc* x = query.logits + g * query.row;
      Acc top = -Acc(__builtin_inff());
      for (int j = 0; j < count; ++j) top = x[j] > top ? x[j] : top;
      // The tail of the last vector has weight 0.
      for (int j = count; j < round_up(count, V::kLanes); ++j) x[j] = -Acc(__builtin_inff());
      V sums(Acc(0));
      for (int j = 0; j < count; j += V::kLanes) {
        const V weight = exp_negative(load(x + j, Full()) - V(top));
        store(x + j, weight, Full());
        sums += weight;
      }
      const Acc total = sum_lanes(sums);
      for (int d = 0; d < query.stride; d += V::kLanes) store(out + d, V(Acc(0)), Full());
      for (int j = 0; j < count; ++j) {
        if (x[j] == Acc(0)) continue;  // a gate of 0 hides its values, NaN and all
        const V weight(x[j]);
        each_vector<Acc>(p.head_dim, [&](int d, auto part) __attribute__((always_inline)) {
          store(out + d, load(out + d, Full()) + weight * load(query.values[j] + d, part), Full());
        });
      }
      const int64_t q_head = int64_t{token} * p.num_q_heads + int64_t{head} * query.group + g;
      T* to = static_cast<T*>(p.out) + q_head * p.head_dim;
      const V inverse(Acc(1) / total);
      each_vector<Acc>(p.head_dim, [&](int d, auto part) __attribute__((always_inline)) {
        store(to + d, load(out + d, Full()) * inverse, part);
      });
      static_cast<Acc*>(p.lse)[q_head] = top + scalar_log(total);
    }
  }
}

}  // namespace

void soft_mask_forward_cpu(const SoftMaskForwardParams& params, const CpuExecutor& exec) {
  const int64_t items = int64_t{params.seqs.total_tokens} * params.num_kv_heads;
  if (items == 0) return;
  const int64_t work = int64_t{params.seqs.max_seqlen} * (params.num_q_heads / params.num_kv_heads) * params.head_dim;
  UA_DISPATCH_CPU_DTYPE(params.dtype, T, {
    parallel_for(exec, items, grain_for(work),
                 [&](int64_t begin, int64_t end) { forward_range<T>(params, begin, end); });
  });
}

}  // namespace UA_ISA
}  // namespace unique_attn
