// The schema table: the one place where the ops get their names and signatures. `rule` and `index_format` are Rule and
// IndexFormat of types.h.
#include "ops.h"
#include "prefill.h"
#include "training.h"

STABLE_TORCH_LIBRARY(unique_attn, m) {
  // clang-format off
  m.def("append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
  m.def(
      "page_index(Tensor k_cache, Tensor(a!) index, Tensor block_table, Tensor start_lens, Tensor seq_lens, "
      "int max_new_tokens, int page_size, int rule, int index_format) -> ()");
  m.def(
      "page_scores(Tensor q, Tensor index, Tensor block_table, Tensor seq_lens, int page_size, int rule, "
      "int index_format, float spread_weight, int window) -> Tensor");
  m.def(
      "topk_pages(Tensor scores, Tensor seq_lens, int k, int page_size, int sink_pages, int recent_pages, "
      "int window, Tensor? budget_pages, Tensor? block_table, int pages_per_block) -> Tensor");
  m.def(
      "sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor pages, Tensor block_table, Tensor seq_lens, "
      "int page_size, float scale, int window) -> (Tensor, Tensor)");
  m.def(
      "unique_decode(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) index, "
      "Tensor block_table, Tensor seq_lens, int num_pages, int page_size, int rule, int index_format, "
      "float spread_weight, int sink_pages, int recent_pages, float scale, int window, "
      "Tensor? budget_pages) -> (Tensor, Tensor, Tensor)");
  m.def(  // of tokens that are stored: it says that keys and values stay as they are
      "unique_decode.stored(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) index, Tensor block_table, "
      "Tensor seq_lens, int num_pages, int page_size, int rule, int index_format, float spread_weight, "
      "int sink_pages, int recent_pages, float scale, int window, Tensor? budget_pages) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(  // into memory of the caller: lse and pages are returned
      "unique_decode.out(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) index, "
      "Tensor block_table, Tensor seq_lens, int num_pages, int page_size, int rule, int index_format, "
      "float spread_weight, int sink_pages, int recent_pages, float scale, int window, Tensor? budget_pages, "
      "Tensor? slot_mapping, Tensor(d!) out) -> (Tensor, Tensor)");
  m.def(
      "page_boundary(Tensor q, Tensor index, Tensor cu_seqlens, int max_seqlen, int k, int page_size, int rule, "
      "float spread_weight, int sink_pages, int recent_pages) -> Tensor");
  m.def(
      "soft_mask_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, Tensor? index, "
      "Tensor? theta, Tensor? tau, Tensor? pages, int page_size, int rule, float spread_weight, int sink_pages, "
      "int recent_pages, float scale) -> (Tensor, Tensor)");
  m.def(
      "soft_mask_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, int max_seqlen, Tensor? index, Tensor? theta, Tensor? tau, Tensor? pages, int page_size, "
      "int rule, float spread_weight, int sink_pages, int recent_pages, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int max_seqlen_q, Tensor mask, int block_q, int block_k, float scale, Tensor? block_table) -> (Tensor, Tensor)");
  m.def(
      "composite_blocks(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
      "int max_seqlen_k, int rule, bool pools_heads, int aggregate, int pool_q, int pool_k, int block_q, int block_k, "
      "float spread_weight, float scale, Tensor? block_table) -> Tensor");
  m.def(
      "select_blocks(Tensor shares, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float? threshold, float? top_p, "
      "int min_blocks, int? max_blocks, int block_q, int block_k) -> (Tensor, Tensor)");
  m.def(
      "unique_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
      "int max_seqlen_k, int rule, bool pools_heads, int aggregate, float? threshold, float? top_p, int min_blocks, "
      "int? max_blocks, int pool_q, int pool_k, int block_q, int block_k, float spread_weight, float scale, "
      "Tensor? block_table) -> (Tensor, Tensor, Tensor, Tensor)");
  // clang-format on
}

// One function serves both devices: it looks at its tensors. A build without CUDA kernels says so there.
#define UA_REGISTER(m)                                                               \
  m.impl("append_kv", TORCH_BOX(&unique_attn::append_kv));                           \
  m.impl("page_index", TORCH_BOX(&unique_attn::page_index));                         \
  m.impl("page_scores", TORCH_BOX(&unique_attn::page_scores));                       \
  m.impl("topk_pages", TORCH_BOX(&unique_attn::topk_pages));                         \
  m.impl("sparse_decode", TORCH_BOX(&unique_attn::sparse_decode));                   \
  m.impl("unique_decode", TORCH_BOX(&unique_attn::unique_decode));                   \
  m.impl("unique_decode.stored", TORCH_BOX(&unique_attn::unique_decode_stored));     \
  m.impl("unique_decode.out", TORCH_BOX(&unique_attn::unique_decode_out));           \
  m.impl("page_boundary", TORCH_BOX(&unique_attn::page_boundary));                   \
  m.impl("soft_mask_forward", TORCH_BOX(&unique_attn::soft_mask_forward));           \
  m.impl("soft_mask_backward", TORCH_BOX(&unique_attn::soft_mask_backward));         \
  m.impl("block_sparse_attention", TORCH_BOX(&unique_attn::block_sparse_attention)); \
  m.impl("composite_blocks", TORCH_BOX(&unique_attn::composite_blocks));             \
  m.impl("select_blocks", TORCH_BOX(&unique_attn::select_blocks));                   \
  m.impl("unique_prefill", TORCH_BOX(&unique_attn::unique_prefill))

STABLE_TORCH_LIBRARY_IMPL(unique_attn, CPU, m) { UA_REGISTER(m); }
STABLE_TORCH_LIBRARY_IMPL(unique_attn, CUDA, m) { UA_REGISTER(m); }
