#include "core/decode/split_plan.h"
#include "value_checks.h"

namespace unique_attn {
namespace {

// Memory of the caller for what attention gives for q.
void check_out(const Arguments& args, const Tensor& out, const Tensor& q, const Tensor& k_cache,
               const Tensor& v_cache) {
  args.tensor("out", out, q.scalar_type(), 4);
  for (int64_t dim = 0; dim < 4; ++dim) args.size("out", out, dim, q.size(dim), "as in q");
  args.contiguous("out", out);
  const auto address = reinterpret_cast<uintptr_t>(out.data_ptr());
  if (address % 16 != 0) {  // kernels store vectors
    fail(args.op(), "out", "expected memory that begins at a multiple of 16 bytes, got ", address % 16, " past one");
  }
  args.apart("out", out, "q", q);
  args.apart("out", out, "k_cache", k_cache);
  args.apart("out", out, "v_cache", v_cache);
}

}  // namespace

SparseDecodeCall prepare_sparse_decode(const Arguments& args, const Tensor& q, const Tensor& k_cache,
                                       const Tensor& v_cache, const Tensor& pages, const Tensor& block_table,
                                       const Tensor& seq_lens, int64_t page_size, double scale, int64_t window,
                                       const std::optional<Tensor>& given_out) {
  SparseDecodeParams p;
  std::optional<Tensor> keep_q, workspace;
  p.dtype = args.dtype();
  p.q = args.tokens("q", q, keep_q);
  args.range("q.shape[1] (query tokens)", q.size(1), 1, kMaxQueryTokens);
  args.range("window", window, 0, INT32_MAX);
  p.k_cache = args.cache("k_cache", k_cache);
  p.v_cache = args.cache("v_cache", v_cache);
  for (int64_t dim = 0; dim < 4; ++dim) args.size("v_cache", v_cache, dim, k_cache.size(dim), "as in k_cache");
  args.size("k_cache", k_cache, 3, q.size(3), "head dimension of q");
  args.groups(q.size(2), k_cache.size(1));
  p.table = args.table(block_table, seq_lens, q.size(0), k_cache.size(0), k_cache.size(2), page_size);
  args.tensor("pages", pages, ScalarType::Int, 4);
  args.size("pages", pages, 0, q.size(0), "sequences");
  args.size("pages", pages, 1, q.size(1), "query tokens");
  args.size("pages", pages, 2, k_cache.size(1), "KV heads");
  args.range("pages.shape[3] (pages per row)", pages.size(3), 1, kMaxSelectedPages);
  args.contiguous("pages", pages);
  p.batch = static_cast<int>(q.size(0));
  p.num_query_tokens = static_cast<int>(q.size(1));
  p.num_q_heads = static_cast<int>(q.size(2));
  p.num_kv_heads = static_cast<int>(k_cache.size(1));
  p.head_dim = static_cast<int>(q.size(3));
  p.k = static_cast<int>(pages.size(3));
  args.finite("scale", scale);
  p.scale = scale;
  p.window = static_cast<int>(window);
  p.pages = static_cast<const int32_t*>(pages.data_ptr());
  const ScalarType lse_type = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (given_out.has_value()) check_out(args, *given_out, q, k_cache, v_cache);
  Tensor out = given_out.has_value() ? *given_out : allocate(q, q.sizes(), q.scalar_type());
  Tensor lse = allocate(q, {q.size(0), q.size(1), q.size(2)}, lse_type);
  p.out = out.data_ptr();
  p.lse = lse.data_ptr();
  p.num_splits = 1;
  p.partial_out = p.partial_lse = nullptr;
  if (args.is_cuda()) {
    // One thread block a multiprocessor; that of fp32 keeps few bytes in flight and needs four.
    const int slots = multiprocessor_count(q) * (p.dtype == DType::kFloat32 ? 4 : 1);
    const SplitPlan plan = plan_sparse_decode(p.batch, p.num_query_tokens, p.num_q_heads, p.num_kv_heads, p.head_dim,
                                              p.k, static_cast<int>(page_size), slots);
    p.num_splits = plan.num_splits;
    if (plan.num_splits > 1) {
      const int64_t floats = static_cast<int64_t>(plan.workspace_bytes / sizeof(float));
      const int64_t rows = lse.numel() * plan.num_splits;
      workspace = allocate(q, {floats}, ScalarType::Float);
      p.partial_out = static_cast<float*>(workspace->data_ptr());
      p.partial_lse = p.partial_out + rows * p.head_dim;
    }
  }
  return {p, std::move(keep_q), std::move(out), std::move(lse), std::move(workspace)};
}

std::tuple<Tensor, Tensor> sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor pages, Tensor block_table,
                                         Tensor seq_lens, int64_t page_size, double scale, int64_t window) {
  constexpr const char* kOp = "sparse_decode";
  const Arguments args(kOp, "q", q);
  const SparseDecodeCall call =
      prepare_sparse_decode(args, q, k_cache, v_cache, pages, block_table, seq_lens, page_size, scale, window);
  if (checks_values(args)) check_values(kOp, {call.params.table, block_table, seq_lens}, call.params, pages);
  Runner(kOp, q).run(call.params, sparse_decode_cpu, UA_CUDA(sparse_decode_cuda));
  return {call.out, call.lse};
}

}  // namespace unique_attn
