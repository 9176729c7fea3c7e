// One work item is one query token and KV head: scores of its candidate pages, then the two on either side of the
// boundary by selection.
#include "core/cpu/select.h"
#include "core/train/gates_cpu.h"
#include "core/train/page_boundary.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

template <typename T>
class Boundary {
  using Acc = AccOf<T>;
  using Score = ScoreOf<T>;
  using Key = OrderKey<Score>;

 public:
  UA_INLINE explicit Boundary(const PageBoundaryParams& params)
      : p(params),
        group(p.num_q_heads / p.num_kv_heads),
        q_stride(static_cast<int>(round_up(p.head_dim, Vec<Acc>::kLanes))),
        gates(p.seqs, p.form, p.spread_weight, group, p.head_dim, p.index),
        scratch(Scratch::padded<Acc>(int64_t{padded_rows(group)} * q_stride) +
                3 * Scratch::padded<Score>(p.seqs.max_seqlen / p.seqs.page_size + 1)) {
    q = scratch.template take<Acc>(int64_t{padded_rows(group)} * q_stride);
    rounded = scratch.template take<Score>(p.seqs.max_seqlen / p.seqs.page_size + 1);
    keys = scratch.template take<Key>(p.seqs.max_seqlen / p.seqs.page_size + 1);
    spare = scratch.template take<Key>(p.seqs.max_seqlen / p.seqs.page_size + 1);
    for (int64_t i = 0; i < int64_t{padded_rows(group)} * q_stride; ++i) q[i] = Acc(0);
  }

  // Items head * N + token, so that a head's entries are looked up once per sequence.
  void run(int64_t begin, int64_t end) {
    const Acc infinity(__builtin_inff());
    const int wanted = max_of(p.k - p.sink_pages - p.recent_pages, 0);
    int last_b = -1, last_head = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int token = static_cast<int>(item % p.seqs.total_tokens);
      const int head = static_cast<int>(item / p.seqs.total_tokens);
      const int b = sequence_of(p.seqs, token);
      if (b != last_b || head != last_head) gates.enter(b, head);
      last_b = b;
      last_head = head;
      Acc& theta = static_cast<Acc*>(p.theta)[int64_t{token} * p.num_kv_heads + head];
      const PageRange range =
          candidate_pages(token - p.seqs.cu_seqlens[b], p.seqs.page_size, p.sink_pages, p.recent_pages);
      const int count = range.end - range.first;
      if (count <= wanted || wanted == 0) {
        theta = count <= wanted ? -infinity : infinity;
        continue;
      }
      widen_rows(static_cast<const T*>(p.q) + token * p.q_stride_token + int64_t{head} * group * p.q_stride_head,
                 p.q_stride_head, group, p.head_dim, q, q_stride);
      gates.compute(q, q_stride, range);
      // NaN ranks below every number, and as a boundary it counts as the lowest one.
      for (int i = 0; i < count; ++i) {
        const Acc s = gates.score[range.first + i];
        from_scalar(s == s ? s : -infinity, rounded[i]);
      }
      theta = midpoint(count, wanted);
    }
  }

 private:
  Acc midpoint(int count, int wanted) {
    order_keys(rounded, count, keys);
    const auto bound = find_threshold(keys, count, wanted, spare).bound;
    Acc kth(__builtin_inff()), next = -kth;
    int reach = 0;
    for (int i = 0; i < count; ++i) {
      const Acc s = to_scalar(rounded[i]);
      if (keys[i] >= bound) {
        kth = s < kth ? s : kth;
        ++reach;
      } else {
        next = s > next ? s : next;
      }
    }
    return reach > wanted ? kth : (kth + next) / 2;  // more than `wanted`: the next one ties with the last
  }

  const PageBoundaryParams& p;
  const int group;
  const int q_stride;
  PageGates<T> gates;
  Scratch scratch;
  Acc* q;          // [padded rows][q_stride]
  Score* rounded;  // scores of the candidates, in the score type
  Key* keys;       // of `rounded`
  Key* spare;      // of find_threshold
};

}  // namespace

void page_boundary_cpu(const PageBoundaryParams& params, const CpuExecutor& exec) {
  const int64_t items = int64_t{params.seqs.total_tokens} * params.num_kv_heads;
  if (items == 0) return;
  const int64_t work = int64_t{params.seqs.max_seqlen / params.seqs.page_size} *
                       (params.num_q_heads / params.num_kv_heads) * params.head_dim;
  UA_DISPATCH_CPU_DTYPE(params.dtype, T, {
    parallel_for(exec, items, grain_for(work), [&](int64_t begin, int64_t end) {
      Boundary<T> boundary(params);
      boundary.run(begin, end);
    });
  });
}

}  // namespace UA_ISA
}  // namespace unique_attn
