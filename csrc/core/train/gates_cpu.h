// Page scores and gates of one training query: what the CPU's page_boundary and soft_mask_attention share.
#pragma once

#include "core/cpu/tile.h"
#include "core/train/packed.h"

namespace unique_attn {
namespace UA_ISA {

// Scores of the query heads of one group on the pages of one sequence and KV head.
template <typename T>
class PageGates {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;

 public:
  UA_INLINE PageGates(const PackedSequences& seqs, ScoreForm form, double weight, int group, int head_dim,
                      const IndexView& index)
      : seqs(seqs),
        form(form),
        weight(weight),
        group(group),
        head_dim(head_dim),
        index(index),
        max_pages(seqs.max_seqlen / seqs.page_size),
        row_stride(round_up(max_pages, kMaxTile) + kMaxTile),
        scratch(Scratch::padded<const T*>(row_stride) + Scratch::padded<Acc>(2 * padded_rows(group) * row_stride) +
                2 * Scratch::padded<Acc>(row_stride) + Scratch::padded<int>(row_stride)) {
    entries = scratch.template take<const T*>(row_stride);
    sums = scratch.template take<Acc>(2 * padded_rows(group) * row_stride);
    score = scratch.template take<Acc>(row_stride);
    root = scratch.template take<Acc>(row_stride);
    best = scratch.template take<int>(row_stride);
  }

  // Pages of sequence b for KV head h from now on.
  void enter(int b, int h) {
    const int start = seqs.cu_seqlens[b];
    num_pages = (seqs.cu_seqlens[b + 1] - start) / seqs.page_size;
    for (int page = 0; page < num_pages; ++page) {
      const int64_t slot = page_slot(start, b, seqs.page_size, page);
      entries[page] = reinterpret_cast<const T*>(index.data + slot * index.stride_block + h * index.stride_head);
    }
    // Tiles may read past the last page.
    for (int page = num_pages; page < row_stride && num_pages > 0; ++page) entries[page] = entries[0];
  }

  // score[p], the arg-max head best[p] and its sqrt(v) or norm(q) * std in root[p], for the pages of `range`.
  // q: the group's rows, padded as tiles want them.
  void compute(const Acc* q, int q_stride, PageRange range) {
    if (range.first >= range.end) return;
    UA_DISPATCH_FORM(form, kForm, compute_form<MeanAndSpread<kForm>>(q, q_stride, range));
  }

  Acc* score;
  Acc* root;
  int* best;
  const T** entries;

 private:
  template <typename RuleT>
  void compute_form(const Acc* q, int q_stride, PageRange range) {
    const int count = range.end - range.first;
    const int64_t rule_stride = padded_rows(group) * row_stride;
    sum_all_rows<RuleT, T>(entries + range.first, count, q, group, q_stride, head_dim, Ahead<T>{nullptr, 0, 0},
                           Sums<Acc>{sums, row_stride, rule_stride});
    for (int g = 0; g < group; ++g) {
      const Acc norm = RuleT::kScalar ? row_norm(q + g * q_stride) : Acc(0);
      for (int i = 0; i < count; ++i) {
        const int page = range.first + i;
        const Acc u = sums[g * row_stride + i];
        const Acc v = RuleT::kSums > 1 ? sums[rule_stride + g * row_stride + i] : Acc(0);
        const Acc scalar = RuleT::kScalar ? Acc(to_scalar(entries[page][RuleT::kVectors * head_dim])) : Acc(0);
        const Acc s = RuleT::finish(u, v, scalar, norm, Acc(weight));
        if (g == 0 || s > score[page] || (s != s && score[page] == score[page])) {
          score[page] = s;
          best[page] = g;
          root[page] = RuleT::kScalar ? norm * scalar : RuleT::kSums > 1 ? scalar_sqrt(v) : Acc(0);
        }
      }
    }
  }

  UA_INLINE Acc row_norm(const Acc* row) const {
    Acc sum(0);
    for (int d = 0; d < head_dim; ++d) sum += row[d] * row[d];
    return scalar_sqrt(sum);
  }
  UA_INLINE static float scalar_sqrt(float x) { return __builtin_sqrtf(x); }
  UA_INLINE static double scalar_sqrt(double x) { return __builtin_sqrt(x); }

  const PackedSequences& seqs;
  const ScoreForm form;
  const double weight;
  const int group;
  const int head_dim;
  const IndexView index;
  const int max_pages;
  const int64_t row_stride;
  Scratch scratch;
  Acc* sums;  // [2][padded rows][row_stride]
  int num_pages = 0;
};

}  // namespace UA_ISA
}  // namespace unique_attn
