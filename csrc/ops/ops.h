// Every op in two steps: prepare_X checks all arguments, allocates the results and fills the kernel's Params;
// run() hands them to the CPU or CUDA implementation. unique_decode prepares the whole chain before it runs any of it,
// so that bad input leaves everything unwritten.
#pragma once

#include "arguments.h"
#include "core/decode/decode_step.h"
#include "core/index/append_index.h"
#include "runner.h"

namespace unique_attn {

// Params plus the tensors whose memory they point into. Those that are not there from the start are optional: an
// undefined Tensor takes memory too.
struct AppendKvCall {
  AppendKvParams params;
  std::optional<Tensor> k, v;
};
struct PageIndexCall {
  PageIndexParams params;
};
struct PageScoresCall {
  PageScoresParams params;
  std::optional<Tensor> q;
  Tensor scores;
};
struct TopkPagesCall {
  TopkPagesParams params;
  Tensor pages;
};
struct SparseDecodeCall {
  SparseDecodeParams params;
  std::optional<Tensor> q;
  Tensor out, lse;
  std::optional<Tensor> workspace;
};

// `slots` is the slot mapping [B * T]; with a `table`, through which the last T tokens of each sequence are appended, it
// leaves some out, or is null.
AppendKvCall prepare_append_kv(const Arguments& args, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                               const Tensor& v_cache, const int64_t* slots, const PageTable& table);
PageIndexCall prepare_page_index(const Arguments& args, const Tensor& k_cache, const Tensor& index,
                                 const Tensor& block_table, const std::optional<Tensor>& start_lens,
                                 const Tensor& seq_lens, int64_t max_new_tokens, int64_t page_size, int64_t rule,
                                 int64_t index_format);
PageScoresCall prepare_page_scores(const Arguments& args, const Tensor& q, const Tensor& index,
                                   const Tensor& block_table, const Tensor& seq_lens, int64_t page_size, int64_t rule,
                                   int64_t index_format, double spread_weight, int64_t window);
// `k_name` is what the op calls k.
TopkPagesCall prepare_topk_pages(const Arguments& args, const Tensor& scores, const Tensor& seq_lens,
                                 const char* k_name, int64_t k, int64_t page_size, int64_t sink_pages,
                                 int64_t recent_pages, int64_t window, const std::optional<Tensor>& budget_pages,
                                 const std::optional<Tensor>& block_table, int64_t pages_per_block);
SparseDecodeCall prepare_sparse_decode(const Arguments& args, const Tensor& q, const Tensor& k_cache,
                                       const Tensor& v_cache, const Tensor& pages, const Tensor& block_table,
                                       const Tensor& seq_lens, int64_t page_size, double scale, int64_t window,
                                       const std::optional<Tensor>& out = std::nullopt);

// ---- The registered functions; library.cpp has their schemas. ----

void append_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping);
void page_index(Tensor k_cache, Tensor index, Tensor block_table, Tensor start_lens, Tensor seq_lens,
                int64_t max_new_tokens, int64_t page_size, int64_t rule, int64_t index_format);
Tensor page_scores(Tensor q, Tensor index, Tensor block_table, Tensor seq_lens, int64_t page_size, int64_t rule,
                   int64_t index_format, double spread_weight, int64_t window);
Tensor topk_pages(Tensor scores, Tensor seq_lens, int64_t k, int64_t page_size, int64_t sink_pages,
                  int64_t recent_pages, int64_t window, std::optional<Tensor> budget_pages,
                  std::optional<Tensor> block_table, int64_t pages_per_block);
std::tuple<Tensor, Tensor> sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor pages, Tensor block_table,
                                         Tensor seq_lens, int64_t page_size, double scale, int64_t window);
std::tuple<Tensor, Tensor, Tensor> unique_decode(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v,
                                                 Tensor k_cache, Tensor v_cache, Tensor index, Tensor block_table,
                                                 Tensor seq_lens, int64_t num_pages, int64_t page_size, int64_t rule,
                                                 int64_t index_format, double spread_weight, int64_t sink_pages,
                                                 int64_t recent_pages, double scale, int64_t window,
                                                 std::optional<Tensor> budget_pages);
// The same without k and v, by a schema that leaves k_cache and v_cache unwritten.
std::tuple<Tensor, Tensor, Tensor> unique_decode_stored(Tensor q, Tensor k_cache, Tensor v_cache, Tensor index,
                                                        Tensor block_table, Tensor seq_lens, int64_t num_pages,
                                                        int64_t page_size, int64_t rule, int64_t index_format,
                                                        double spread_weight, int64_t sink_pages, int64_t recent_pages,
                                                        double scale, int64_t window,
                                                        std::optional<Tensor> budget_pages);
// The same into `out`, without the tokens whose slot is negative: lse and pages.
std::tuple<Tensor, Tensor> unique_decode_out(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v, Tensor k_cache,
                                             Tensor v_cache, Tensor index, Tensor block_table, Tensor seq_lens,
                                             int64_t num_pages, int64_t page_size, int64_t rule, int64_t index_format,
                                             double spread_weight, int64_t sink_pages, int64_t recent_pages,
                                             double scale, int64_t window, std::optional<Tensor> budget_pages,
                                             std::optional<Tensor> slot_mapping, Tensor out);

}  // namespace unique_attn
