// One training query token with the heads of its group: logits and gates over the keys it sees. Shared by the forward
// and the backward pass.
#pragma once

#include "core/train/gates_cpu.h"
#include "core/train/soft_mask_attention.h"

namespace unique_attn {
namespace UA_ISA {

UA_INLINE float scalar_exp(float x) { return __builtin_expf(x); }
UA_INLINE double scalar_exp(double x) { return __builtin_exp(x); }
UA_INLINE float scalar_log(float x) { return __builtin_logf(x); }
UA_INLINE double scalar_log(double x) { return __builtin_log(x); }
UA_INLINE float scalar_log1p(float x) { return __builtin_log1pf(x); }
UA_INLINE double scalar_log1p(double x) { return __builtin_log1p(x); }

template <typename T>
class QueryLogits {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;

 public:
  UA_INLINE explicit QueryLogits(const SoftMaskForwardParams& params)
      : p(params),
        group(p.num_q_heads / p.num_kv_heads),
        stride(static_cast<int>(round_up(p.head_dim, V::kLanes))),
        row(round_up(p.seqs.max_seqlen, kMaxTile) + kMaxTile),
        gates(p.seqs, p.form, p.spread_weight, group, p.head_dim, p.index),
        scratch(Scratch::padded<const T*>(row) * 2 + Scratch::padded<Acc>(int64_t{padded_rows(group)} * stride) +
                Scratch::padded<Acc>(int64_t{padded_rows(group)} * row) + Scratch::padded<Acc>(row) * 2) {
    keys = scratch.template take<const T*>(row);
    values = scratch.template take<const T*>(row);
    q = scratch.template take<Acc>(int64_t{padded_rows(group)} * stride);
    logits = scratch.template take<Acc>(int64_t{padded_rows(group)} * row);
    log_gate = scratch.template take<Acc>(row);
    slope = scratch.template take<Acc>(row);
    for (int64_t i = 0; i < int64_t{padded_rows(group)} * stride; ++i) q[i] = Acc(0);
  }

  // Sequence b and KV head h from now on.
  void enter(int b, int h) {
    head = h;
    start = p.seqs.cu_seqlens[b];
    const int length = p.seqs.cu_seqlens[b + 1] - start;
    for (int i = 0; i < length; ++i) {
      keys[i] = static_cast<const T*>(p.k) + int64_t{start + i} * p.k_stride_token + h * p.k_stride_head;
      values[i] = static_cast<const T*>(p.v) + int64_t{start + i} * p.v_stride_token + h * p.v_stride_head;
    }
    // Tiles may read past the last row.
    for (int64_t i = length; i < row && length > 0; ++i) {
      keys[i] = keys[0];
      values[i] = values[0];
    }
    if (p.mode == MaskMode::kSoft) gates.enter(b, h);
  }

  // logits[g * row + j] = scale * q . k_j + log gate for the keys j <= position. A hard gate of 0 hides the key, NaN
  // and all: decoding does not read it.
  void compute(int position) {
    const int64_t token = start + position;
    widen_rows(static_cast<const T*>(p.q) + token * p.q_stride_token + int64_t{head} * group * p.q_stride_head,
               p.q_stride_head, group, p.head_dim, q, stride);
    const int count = position + 1;
    sum_all_rows<DotProduct, T>(keys, count, q, group, stride, p.head_dim, Ahead<T>{nullptr, 0, 0},
                                Sums<Acc>{logits, row, 0});
    range = p.mode == MaskMode::kDense ? PageRange{0, 0}
                                       : candidate_pages(position, p.seqs.page_size, p.sink_pages, p.recent_pages);
    compute_gates(token);
    const V scale(static_cast<Acc>(p.scale));
    for (int g = 0; g < group; ++g) {
      Acc* x = logits + g * row;
      for (int j = 0; j < count; j += V::kLanes) store(x + j, load(x + j, Full()) * scale, Full());
      if (p.mode == MaskMode::kHard) {
        hide_pages(x);
        continue;
      }
      for (int page = range.first; page < range.end; ++page) {
        for (int j = page * p.seqs.page_size; j < (page + 1) * p.seqs.page_size; ++j) x[j] += log_gate[page];
      }
    }
  }

  const SoftMaskForwardParams& p;
  const int group;
  const int stride;   // of q
  const int64_t row;  // of logits
  PageGates<T> gates;

 private:
  Scratch scratch;

 public:
  const T** keys;    // of the sequence
  const T** values;  // of the sequence
  Acc* q;            // [padded rows][stride]
  Acc* logits;       // [padded rows][row]
  Acc* log_gate;     // per page of `range`
  Acc* slope;        // d log gate / d score
  PageRange range;   // pages with a gate
  int head = 0;
  int start = 0;  // of the sequence

 private:
  void hide_pages(Acc* x) const {
    for (int page = range.first; page < range.end; ++page) {
      if (log_gate[page] == Acc(0)) continue;
      for (int j = page * p.seqs.page_size; j < (page + 1) * p.seqs.page_size; ++j) x[j] = -Acc(__builtin_inff());
    }
  }

  void compute_gates(int64_t token) {
    const Acc infinity(__builtin_inff());
    if (p.mode == MaskMode::kHard) {
      const int32_t* list = p.pages + (token * p.num_kv_heads + head) * p.num_selected;
      int at = 0;
      for (int page = range.first; page < range.end; ++page) {
        while (at < p.num_selected && list[at] >= 0 && list[at] < page) ++at;
        log_gate[page] = at < p.num_selected && list[at] == page ? Acc(0) : -infinity;
      }
      return;
    }
    if (p.mode != MaskMode::kSoft) return;
    const Acc theta = static_cast<const Acc*>(p.theta)[token * p.num_kv_heads + head];
    if (theta == -infinity) {  // no boundary: every gate is 1, whatever the score is
      for (int page = range.first; page < range.end; ++page) log_gate[page] = slope[page] = Acc(0);
      return;
    }
    gates.compute(q, stride, range);
    const Acc tau(*p.tau);
    for (int page = range.first; page < range.end; ++page) {
      const Acc x = (gates.score[page] - theta) / tau;
      const Acc magnitude = x < Acc(0) ? -x : x;
      log_gate[page] = (x < Acc(0) ? x : Acc(0)) - scalar_log1p(scalar_exp(-magnitude));
      if (x != x) log_gate[page] = x;
      slope[page] = Acc(1) / ((Acc(1) + scalar_exp(x)) * tau);
    }
  }
};

}  // namespace UA_ISA
}  // namespace unique_attn
