#include "value_checks.h"

namespace unique_attn {

PageScoresCall prepare_page_scores(const Arguments& args, const Tensor& q, const Tensor& index,
                                   const Tensor& block_table, const Tensor& seq_lens, int64_t page_size, int64_t rule,
                                   int64_t index_format, double spread_weight, int64_t window) {
  PageScoresParams p;
  std::optional<Tensor> keep_q;
  p.dtype = args.dtype();
  p.rule = args.rule(rule);
  args.finite("spread_weight", spread_weight);
  p.spread_weight = spread_weight;
  p.q = args.tokens("q", q, keep_q);
  args.range("q.shape[1] (query tokens)", q.size(1), 1, kMaxQueryTokens);
  args.range("window", window, 0, INT32_MAX);
  args.tensor("index", index, ScalarType::Byte, 4);
  args.groups(q.size(2), index.size(1));
  p.index = args.index(index, index_format, p.rule, -1, index.size(1), q.size(3));
  args.page_size(page_size);
  p.table = args.table(block_table, seq_lens, q.size(0), index.size(0), index.size(2) * page_size, page_size);
  p.batch = static_cast<int>(q.size(0));
  p.num_query_tokens = static_cast<int>(q.size(1));
  p.num_q_heads = static_cast<int>(q.size(2));
  p.num_kv_heads = static_cast<int>(index.size(1));
  p.head_dim = static_cast<int>(q.size(3));
  p.window = static_cast<int>(window);
  const int64_t row_pages = block_table.size(1) * index.size(2);
  p.row_pages = static_cast<int>(row_pages);
  p.fill_outside = true;
  Tensor scores = allocate(q, {q.size(0), q.size(1), index.size(1), row_pages}, score_type(q.scalar_type()));
  p.scores = scores.data_ptr();
  return {p, std::move(keep_q), std::move(scores)};
}

Tensor page_scores(Tensor q, Tensor index, Tensor block_table, Tensor seq_lens, int64_t page_size, int64_t rule,
                   int64_t index_format, double spread_weight, int64_t window) {
  constexpr const char* kOp = "page_scores";
  const Arguments args(kOp, "q", q);
  const PageScoresCall call =
      prepare_page_scores(args, q, index, block_table, seq_lens, page_size, rule, index_format, spread_weight, window);
  if (checks_values(args)) check_values(kOp, {call.params.table, block_table, seq_lens}, call.params);
  Runner(kOp, q).run(call.params, page_scores_cpu, UA_CUDA(page_scores_cuda));
  return call.scores;
}

}  // namespace unique_attn
