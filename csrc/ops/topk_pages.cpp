#include "value_checks.h"

namespace unique_attn {

TopkPagesCall prepare_topk_pages(const Arguments& args, const Tensor& scores, const Tensor& seq_lens,
                                 const char* k_name, int64_t k, int64_t page_size, int64_t sink_pages,
                                 int64_t recent_pages, int64_t window, const std::optional<Tensor>& budget_pages,
                                 const std::optional<Tensor>& block_table, int64_t pages_per_block) {
  TopkPagesParams p;
  args.floating("scores", scores, 4);
  if (scores.scalar_type() == ScalarType::Half) {
    fail(args.op(), "scores", "expected dtype bfloat16, float32 or float64, got float16");
  }
  args.contiguous("scores", scores);
  const int64_t batch = scores.size(0);
  args.range("scores.shape[1] (query tokens)", scores.size(1), 1, kMaxQueryTokens);
  args.range(k_name, k, 1, kMaxSelectedPages);
  args.range("sink_pages", sink_pages, 0, k);
  args.range("recent_pages", recent_pages, 0, k);
  if (k < sink_pages + recent_pages) {
    fail(args.op(), k_name, "expected at least sink_pages + recent_pages = ", sink_pages + recent_pages, ", got ", k);
  }
  args.range("window", window, 0, INT32_MAX);
  args.range("scores.shape[3] (pages)", scores.size(3), 0, INT32_MAX);
  args.page_size(page_size);
  if (budget_pages.has_value()) {
    args.tensor("budget_pages", *budget_pages, ScalarType::Int, 1);
    args.size("budget_pages", *budget_pages, 0, batch, "sequences");
    args.contiguous("budget_pages", *budget_pages);
  }
  if (block_table.has_value()) {
    args.range("pages_per_block", pages_per_block, 1, INT32_MAX / page_size);
    // How many blocks there are is not known here; their pages have numbers.
    p.table =
        args.table(*block_table, seq_lens, batch, INT32_MAX / pages_per_block, pages_per_block * page_size, page_size);
    if (block_table->size(1) * pages_per_block < scores.size(3)) {
      fail(args.op(), "block_table", "expected at least as many pages as scores has (", scores.size(3), "), got ",
           block_table->size(1), " blocks of ", pages_per_block);
    }
  } else {
    args.seq_lens(seq_lens, batch);
    p.table = PageTable{nullptr,
                        static_cast<const int32_t*>(seq_lens.data_ptr()),
                        0,
                        0,
                        static_cast<int>(page_size),
                        static_cast<int>(page_size),
                        0};
  }
  p.dtype = args.dtype();
  p.batch = static_cast<int>(batch);
  p.num_query_tokens = static_cast<int>(scores.size(1));
  p.num_kv_heads = static_cast<int>(scores.size(2));
  p.row_pages = static_cast<int>(scores.size(3));
  p.k = static_cast<int>(k);
  p.sink_pages = static_cast<int>(sink_pages);
  p.recent_pages = static_cast<int>(recent_pages);
  p.window = static_cast<int>(window);
  p.scores = scores.data_ptr();
  p.budget_pages = budget_pages.has_value() ? static_cast<const int32_t*>(budget_pages->data_ptr()) : nullptr;
  p.physical = block_table.has_value();
  Tensor pages = allocate(scores, {batch, scores.size(1), scores.size(2), k}, ScalarType::Int);
  p.pages = static_cast<int32_t*>(pages.data_ptr());
  return {p, std::move(pages)};
}

Tensor topk_pages(Tensor scores, Tensor seq_lens, int64_t k, int64_t page_size, int64_t sink_pages,
                  int64_t recent_pages, int64_t window, std::optional<Tensor> budget_pages,
                  std::optional<Tensor> block_table, int64_t pages_per_block) {
  constexpr const char* kOp = "topk_pages";
  const Arguments args(kOp, "scores", scores);
  const TopkPagesCall call = prepare_topk_pages(args, scores, seq_lens, "k", k, page_size, sink_pages, recent_pages,
                                                window, budget_pages, block_table, pages_per_block);
  if (checks_values(args)) check_values(kOp, {call.params.table, block_table, seq_lens}, call.params);
  Runner(kOp, scores).run(call.params, topk_pages_cpu, UA_CUDA(topk_pages_cuda));
  return call.pages;
}

}  // namespace unique_attn
