#include "value_checks.h"

namespace unique_attn {

namespace {

std::tuple<Tensor, Tensor, Tensor> decode_step(
    const Tensor& q, const std::optional<Tensor>& k, const std::optional<Tensor>& v, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& index, const Tensor& block_table, const Tensor& seq_lens, int64_t num_pages,
    int64_t page_size, int64_t rule, int64_t index_format, double spread_weight, int64_t sink_pages,
    int64_t recent_pages, double scale, int64_t window, const std::optional<Tensor>& budget_pages,
    const std::optional<Tensor>& slot_mapping = std::nullopt, const std::optional<Tensor>& out = std::nullopt) {
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
                                                           seq_lens, page_size, scale, window, out);
  if (out.has_value()) args.apart("out", *out, "index", index);
  std::optional<AppendKvCall> append;
  if (slot_mapping.has_value() && !k.has_value()) {
    fail(kOp, "slot_mapping", "expected None without k and v, got a tensor");
  }
  if (k.has_value()) {
    const int64_t* slots = nullptr;
    if (slot_mapping.has_value()) {
      args.tensor("slot_mapping", *slot_mapping, ScalarType::Long, 1);
      args.size("slot_mapping", *slot_mapping, 0, q.size(0) * q.size(1), "tokens of q");
      args.contiguous("slot_mapping", *slot_mapping);
      slots = static_cast<const int64_t*>(slot_mapping->data_ptr());
    }
    append = prepare_append_kv(args, *k, *v, k_cache, v_cache, slots, scoring.params.table);
    indexing.params.slots = slots;
    args.size("k", *k, 0, q.size(0), "sequences");
    args.size("k", *k, 1, q.size(1), "query tokens");
  }
  if (checks_values(args)) {  // the two look up all blocks that are
    const TableOnHost host(scoring.params.table, block_table, seq_lens);
    check_values(kOp, host, indexing.params, std::nullopt);
    check_values(kOp, host, scoring.params);
    if (append.has_value() && slot_mapping.has_value()) check_values(kOp, host, append->params, *slot_mapping);
  }

  const Runner runner(kOp, q);
  if (append.has_value()) {
    const AppendIndexParams both{append->params, indexing.params};
    runner.run(both, append_index_cpu, UA_CUDA(append_index_cuda));
  } else {
    runner.run(indexing.params, page_index_cpu, UA_CUDA(page_index_cuda));
  }
  const DecodeStepParams step{scoring.params, selection.params, attention.params};
  runner.run(step, decode_step_cpu, UA_CUDA(decode_step_cuda));
  return {attention.out, attention.lse, selection.pages};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> unique_decode(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v,
                                                 Tensor k_cache, Tensor v_cache, Tensor index, Tensor block_table,
                                                 Tensor seq_lens, int64_t num_pages, int64_t page_size, int64_t rule,
                                                 int64_t index_format, double spread_weight, int64_t sink_pages,
                                                 int64_t recent_pages, double scale, int64_t window,
                                                 std::optional<Tensor> budget_pages) {
  return decode_step(q, k, v, k_cache, v_cache, index, block_table, seq_lens, num_pages, page_size, rule, index_format,
                     spread_weight, sink_pages, recent_pages, scale, window, budget_pages);
}

std::tuple<Tensor, Tensor, Tensor> unique_decode_stored(Tensor q, Tensor k_cache, Tensor v_cache, Tensor index,
                                                        Tensor block_table, Tensor seq_lens, int64_t num_pages,
                                                        int64_t page_size, int64_t rule, int64_t index_format,
                                                        double spread_weight, int64_t sink_pages, int64_t recent_pages,
                                                        double scale, int64_t window,
                                                        std::optional<Tensor> budget_pages) {
  return decode_step(q, std::nullopt, std::nullopt, k_cache, v_cache, index, block_table, seq_lens, num_pages,
                     page_size, rule, index_format, spread_weight, sink_pages, recent_pages, scale, window,
                     budget_pages);
}

std::tuple<Tensor, Tensor> unique_decode_out(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v, Tensor k_cache,
                                             Tensor v_cache, Tensor index, Tensor block_table, Tensor seq_lens,
                                             int64_t num_pages, int64_t page_size, int64_t rule, int64_t index_format,
                                             double spread_weight, int64_t sink_pages, int64_t recent_pages,
                                             double scale, int64_t window, std::optional<Tensor> budget_pages,
                                             std::optional<Tensor> slot_mapping, Tensor out) {
  auto [_, lse, pages] =
      decode_step(q, k, v, k_cache, v_cache, index, block_table, seq_lens, num_pages, page_size, rule, index_format,
                  spread_weight, sink_pages, recent_pages, scale, window, budget_pages, slot_mapping, out);
  return {std::move(lse), std::move(pages)};
}

}  // namespace unique_attn
