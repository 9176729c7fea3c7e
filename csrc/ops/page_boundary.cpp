#include "training.h"
#include "value_checks.h"

namespace unique_attn {
namespace {

Tensor without_repeats(const Arguments& args, const Tensor& tensor) {
  bool repeats = false;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) repeats |= tensor.size(dim) > 1 && tensor.stride(dim) == 0;
  return args.is_cuda() && repeats ? torch::stable::contiguous(tensor) : tensor;
}

}  // namespace

TokenView packed_tokens(const Arguments& args, const char* name, const Tensor& tensor, std::optional<Tensor>& keep) {
  return args.tokens(name, torch::stable::unsqueeze(without_repeats(args, tensor), 0), keep);
}

PackedSequences packed_sequences(const Arguments& args, const Tensor& cu_seqlens, int64_t total_tokens,
                                 int64_t max_seqlen, int64_t page_size) {
  args.tensor("cu_seqlens", cu_seqlens, ScalarType::Int, 1);
  args.contiguous("cu_seqlens", cu_seqlens);
  if (cu_seqlens.size(0) < 1) fail(args.op(), "cu_seqlens", "expected B + 1 numbers, got none");
  args.range("total tokens", total_tokens, 0, INT32_MAX / 2);
  args.range("max_seqlen", max_seqlen, 0, INT32_MAX / 2);
  args.page_size(page_size);
  const int64_t batch = cu_seqlens.size(0) - 1;
  if (checks_values(args))
    check_cu_seqlens(args.op(), "cu_seqlens", cu_seqlens, total_tokens, "max_seqlen", max_seqlen);
  return {static_cast<const int32_t*>(cu_seqlens.data_ptr()), static_cast<int>(batch), static_cast<int>(total_tokens),
          static_cast<int>(std::min(max_seqlen, total_tokens)), static_cast<int>(page_size)};
}

IndexView packed_index(const Arguments& args, const Tensor& index, Rule rule, const PackedSequences& seqs,
                       int64_t num_kv_heads, int64_t head_dim, std::optional<Tensor>& keep) {
  args.trainable(rule);
  args.tensor("index", index, ScalarType::Byte, 4);
  const int64_t slots = num_page_slots(seqs.total_tokens, seqs.batch, seqs.page_size);
  if (index.size(0) < slots) {
    fail(args.op(), "index", "expected at least ", slots, " page slots in dimension 0, got ", index.size(0));
  }
  // Gradients reach the keys through exact entries only.
  keep = without_repeats(args, index);
  return args.index(*keep, static_cast<int64_t>(IndexFormat::kExact), rule, -1, num_kv_heads, head_dim);
}

Tensor page_boundary(Tensor q, Tensor index, Tensor cu_seqlens, int64_t max_seqlen, int64_t k, int64_t page_size,
                     int64_t rule, double spread_weight, int64_t sink_pages, int64_t recent_pages) {
  constexpr const char* kOp = "page_boundary";
  const Arguments args(kOp, "q", q);
  args.floating("q", q, 3);
  PageBoundaryParams p{};
  p.dtype = args.dtype();
  const Rule chosen = args.rule(rule);
  p.form = rule_facts(chosen).form;
  args.finite("spread_weight", spread_weight);
  p.spread_weight = spread_weight;
  p.seqs = packed_sequences(args, cu_seqlens, q.size(0), max_seqlen, page_size);
  std::optional<Tensor> keep, keep_index;
  const TokenView view = packed_tokens(args, "q", q, keep);
  args.tensor("index", index, ScalarType::Byte, 4);
  args.groups(q.size(1), index.size(1));
  p.index = packed_index(args, index, chosen, p.seqs, index.size(1), q.size(2), keep_index);
  args.range("k", k, 1, INT32_MAX);
  args.range("sink_pages", sink_pages, 0, k);
  args.range("recent_pages", recent_pages, 1, k);  // a query always sees its own page
  if (k < sink_pages + recent_pages) {
    fail(kOp, "k", "expected at least sink_pages + recent_pages = ", sink_pages + recent_pages, ", got ", k);
  }
  p.num_q_heads = static_cast<int>(q.size(1));
  p.num_kv_heads = static_cast<int>(index.size(1));
  p.head_dim = static_cast<int>(q.size(2));
  p.k = static_cast<int>(k);
  p.sink_pages = static_cast<int>(sink_pages);
  p.recent_pages = static_cast<int>(recent_pages);
  p.q = view.data;
  p.q_stride_token = view.stride_token;
  p.q_stride_head = view.stride_head;
  const ScalarType theta_type = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor theta = allocate(q, {q.size(0), index.size(1)}, theta_type);
  p.theta = theta.data_ptr();
  Tensor workspace, squares;
  if (args.is_cuda()) {
    const ScalarType key = score_type(q.scalar_type());
    const int64_t row_pages = boundary_row_pages(p.seqs.max_seqlen, p.seqs.page_size);
    const int64_t row_bytes = std::max<int64_t>(index.size(1) * row_pages * (key == ScalarType::Float ? 4 : 2), 1);
    p.chunk_tokens = boundary_chunk_tokens(row_bytes, q.size(0));
    workspace = allocate(q, {p.chunk_tokens, index.size(1), row_pages}, key);
    p.workspace = workspace.data_ptr();
    if (p.form == ScoreForm::kVectorSpread && key != ScalarType::Float) {
      const int64_t slots = num_page_slots(p.seqs.total_tokens, p.seqs.batch, p.seqs.page_size);
      squares = allocate(q, {slots, index.size(1), q.size(2)}, ScalarType::BFloat16);
      p.squares = squares.data_ptr();
    }
  }
  Runner(kOp, q).run(p, page_boundary_cpu, UA_CUDA(page_boundary_cuda));
  return theta;
}

}  // namespace unique_attn
