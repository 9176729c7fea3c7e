#include "value_checks.h"

namespace unique_attn {

PageIndexCall prepare_page_index(const Arguments& args, const Tensor& k_cache, const Tensor& index,
                                 const Tensor& block_table, const std::optional<Tensor>& start_lens,
                                 const Tensor& seq_lens, int64_t max_new_tokens, int64_t page_size, int64_t rule,
                                 int64_t index_format) {
  PageIndexCall call;
  PageIndexParams& p = call.params;
  p.dtype = args.dtype();
  p.rule = args.rule(rule);
  p.k_cache = args.cache("k_cache", k_cache);
  p.index = args.index(index, index_format, p.rule, k_cache.size(0), k_cache.size(1), k_cache.size(3));
  const int64_t batch = seq_lens.dim() == 1 ? seq_lens.size(0) : 0;
  p.table = args.table(block_table, seq_lens, batch, k_cache.size(0), k_cache.size(2), page_size);
  args.size("index", index, 2, k_cache.size(2) / page_size, "pages of a block");
  for (int64_t dim = 0; dim < 3; ++dim) {
    if (index.size(dim) > 1 && index.stride(dim) == 0) {
      fail(args.op(), "index", "expected memory of its own for every entry, got strides ", stride_string(index));
    }
  }
  if (index.numel() > 0 && index.data_ptr() == k_cache.data_ptr()) {
    fail(args.op(), "index", "expected memory of its own, got that of k_cache");
  }
  args.range("max_new_tokens", max_new_tokens, 0, INT32_MAX);
  if (start_lens.has_value()) {
    args.tensor("start_lens", *start_lens, ScalarType::Int, 1);
    args.size("start_lens", *start_lens, 0, batch, "sequences");
    args.contiguous("start_lens", *start_lens);
  }
  p.batch = static_cast<int>(batch);
  p.num_kv_heads = static_cast<int>(k_cache.size(1));
  p.head_dim = static_cast<int>(k_cache.size(3));
  p.start_lens = start_lens.has_value() ? static_cast<const int32_t*>(start_lens->data_ptr()) : nullptr;
  p.max_new_tokens = static_cast<int>(max_new_tokens);
  p.slots = nullptr;
  return call;
}

void page_index(Tensor k_cache, Tensor index, Tensor block_table, Tensor start_lens, Tensor seq_lens,
                int64_t max_new_tokens, int64_t page_size, int64_t rule, int64_t index_format) {
  constexpr const char* kOp = "page_index";
  const Arguments args(kOp, "k_cache", k_cache);
  const PageIndexCall call = prepare_page_index(args, k_cache, index, block_table, start_lens, seq_lens, max_new_tokens,
                                                page_size, rule, index_format);
  if (checks_values(args)) check_values(kOp, {call.params.table, block_table, seq_lens}, call.params, start_lens);
  Runner(kOp, k_cache).run(call.params, page_index_cpu, UA_CUDA(page_index_cuda));
}

}  // namespace unique_attn
