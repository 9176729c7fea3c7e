#include "value_checks.h"

namespace unique_attn {

std::tuple<Tensor, Tensor, Tensor> unique_decode(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v,
                                                 Tensor k_cache, Tensor v_cache, Tensor index, Tensor block_table,
                                                 Tensor seq_lens, int64_t num_pages, int64_t page_size, int64_t rule,
                                                 int64_t index_format, double spread_weight, int64_t sink_pages,
                                                 int64_t recent_pages, double scale, int64_t window,
                                                 std::optional<Tensor> budget_pages) {
  constexpr const char* kOp = "unique_decode";
  const Arguments args(kOp, "q", q);
  if (k.has_value() != v.has_value()) {
    fail(kOp, k.has_value() ? "v" : "k", "expected k and v together or neither, got only ", k.has_value() ? "k" : "v");
  }

  // All checks and allocations first, in the order the data flows; dtypes before them, as an index entry's size
  // follows.
  args.floating("q", q, 4);
  args.floating("k_cache", k_cache, 4);
  PageScoresCall scoring =
      prepare_page_scores(args, q, index, block_table, seq_lens, page_size, rule, index_format, spread_weight, window);
  scoring.params.fill_outside = false;  // topk_pages reads visible pages only
  PageIndexCall indexing = prepare_page_index(args, k_cache, index, block_table, std::nullopt, seq_lens, q.size(1),
                                              page_size, rule, index_format);
  const Arguments score_args(kOp, "scores", scoring.scores);
  const TopkPagesCall selection =
      prepare_topk_pages(score_args, scoring.scores, seq_lens, "num_pages", num_pages, page_size, sink_pages,
                         recent_pages, window, budget_pages, std::nullopt, 1);
  const SparseDecodeCall attention = prepare_sparse_decode(args, q, k_cache, v_cache, selection.pages, block_table,
                                                           seq_lens, page_size, scale, window);
  std::optional<AppendKvCall> append;
  if (k.has_value()) {
    append = prepare_append_kv(args, *k, *v, k_cache, v_cache, nullptr, scoring.params.table);
    args.size("k", *k, 0, q.size(0), "sequences");
    args.size("k", *k, 1, q.size(1), "query tokens");
  }
  if (checks_values(args)) {  // the two look up all blocks that are
    const TableOnHost host(scoring.params.table, block_table, seq_lens);
    check_values(kOp, host, indexing.params, std::nullopt);
    check_values(kOp, host, scoring.params);
  }

  const Runner runner(kOp, q);
  if (append.has_value()) {
    const AppendIndexParams both{append->params, indexing.params};
    runner.run(both, append_index_cpu, UA_CUDA(append_index_cuda));
  } else {
    runner.run(indexing.params, page_index_cpu, UA_CUDA(page_index_cuda));
  }
  runner.run(scoring.params, page_scores_cpu, UA_CUDA(page_scores_cuda));
  runner.run(selection.params, topk_pages_cpu, UA_CUDA(topk_pages_cuda));
  runner.run(attention.params, sparse_decode_cpu, UA_CUDA(sparse_decode_cuda));
  return {attention.out, attention.lse, selection.pages};
}

std::tuple<Tensor, Tensor, Tensor> unique_decode_stored(Tensor q, Tensor k_cache, Tensor v_cache, Tensor index,
                                                        Tensor block_table, Tensor seq_lens, int64_t num_pages,
                                                        int64_t page_size, int64_t rule, int64_t index_format,
                                                        double spread_weight, int64_t sink_pages, int64_t recent_pages,
                                                        double scale, int64_t window,
                                                        std::optional<Tensor> budget_pages) {
  return unique_decode(q, std::nullopt, std::nullopt, k_cache, v_cache, index, block_table, seq_lens, num_pages,
                       page_size, rule, index_format, spread_weight, sink_pages, recent_pages, scale, window,
                       budget_pages);
}

}  // namespace unique_attn
