#include "training.h"
#include "value_checks.h"

namespace unique_attn {
namespace {

// The forward pass's Params, which the backward pass needs too, and the tensors whose memory they point into.
struct SoftMaskCall {
  SoftMaskForwardParams params{};
  std::optional<Tensor> q, k, v, index;
};

// Memory that the call works in on CUDA, entered in `params`.
Tensor workspace_of([[maybe_unused]] const Tensor& q, [[maybe_unused]] SoftMaskForwardParams& params,
                    [[maybe_unused]] bool backward) {
  Tensor workspace;
#ifdef UNIQUE_ATTN_WITH_CUDA
  if (q.is_cuda()) {
    const size_t bytes = soft_mask_workspace_bytes(params, backward, q.get_device_index());
    workspace = allocate(q, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    params.workspace = workspace.data_ptr();
  }
#endif
  return workspace;
}

SoftMaskCall prepare(const Arguments& args, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                     int64_t max_seqlen, const std::optional<Tensor>& index, const std::optional<Tensor>& theta,
                     const std::optional<Tensor>& tau, const std::optional<Tensor>& pages, int64_t page_size,
                     int64_t rule, double spread_weight, int64_t sink_pages, int64_t recent_pages, double scale) {
  SoftMaskCall call;
  SoftMaskForwardParams& p = call.params;
  args.floating("q", q, 3);
  args.floating("k", k, 3);
  args.floating("v", v, 3);
  p.dtype = args.dtype();
  const Rule chosen = args.rule(rule);
  p.form = rule_facts(chosen).form;
  args.finite("spread_weight", spread_weight);
  args.finite("scale", scale);
  p.spread_weight = spread_weight;
  p.scale = scale;
  p.seqs = packed_sequences(args, cu_seqlens, q.size(0), max_seqlen, page_size);
  const TokenView q_view = packed_tokens(args, "q", q, call.q);
  const TokenView k_view = packed_tokens(args, "k", k, call.k);
  const TokenView v_view = packed_tokens(args, "v", v, call.v);
  args.size("k", k, 0, q.size(0), "tokens of q");
  args.size("k", k, 2, q.size(2), "head dimension of q");
  for (int64_t dim = 0; dim < 3; ++dim) args.size("v", v, dim, k.size(dim), "as in k");
  args.groups(q.size(1), k.size(1));
  args.range("sink_pages", sink_pages, 0, INT32_MAX);
  if (theta.has_value() != tau.has_value() || theta.has_value() != index.has_value()) {
    fail(args.op(), "theta", "expected index, theta and tau together (soft mask) or none of them, got",
         index ? " index" : "", theta ? " theta" : "", tau ? " tau" : "", " alone");
  }
  if (theta.has_value() && pages.has_value()) {
    fail(args.op(), "pages", "expected either theta (soft mask) or pages (hard mask), got both");
  }
  p.mode = theta.has_value() ? MaskMode::kSoft : pages.has_value() ? MaskMode::kHard : MaskMode::kDense;
  // A query always sees its own page.
  args.range("recent_pages", recent_pages, p.mode == MaskMode::kDense ? 0 : 1, INT32_MAX);
  if (p.mode == MaskMode::kSoft) {
    p.index = packed_index(args, *index, chosen, p.seqs, k.size(1), q.size(2), call.index);
    const ScalarType type = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    args.tensor("theta", *theta, type, 2);
    args.size("theta", *theta, 0, q.size(0), "tokens of q");
    args.size("theta", *theta, 1, k.size(1), "KV heads");
    args.contiguous("theta", *theta);
    args.tensor("tau", *tau, ScalarType::Float, 0);
    if (checks_values(args)) check_tau(args.op(), *tau);
    p.theta = theta->data_ptr();
    p.tau = static_cast<const float*>(tau->data_ptr());
  } else if (p.mode == MaskMode::kHard) {
    args.tensor("pages", *pages, ScalarType::Int, 3);
    args.size("pages", *pages, 0, q.size(0), "tokens of q");
    args.size("pages", *pages, 1, k.size(1), "KV heads");
    args.contiguous("pages", *pages);
    if (checks_values(args)) check_selection(args.op(), *pages, (p.seqs.max_seqlen + page_size - 1) / page_size);
    p.pages = static_cast<const int32_t*>(pages->data_ptr());
    p.num_selected = static_cast<int>(pages->size(2));
  }
  p.num_q_heads = static_cast<int>(q.size(1));
  p.num_kv_heads = static_cast<int>(k.size(1));
  p.head_dim = static_cast<int>(q.size(2));
  p.sink_pages = static_cast<int>(sink_pages);
  p.recent_pages = static_cast<int>(recent_pages);
  p.q = q_view.data, p.q_stride_token = q_view.stride_token, p.q_stride_head = q_view.stride_head;
  p.k = k_view.data, p.k_stride_token = k_view.stride_token, p.k_stride_head = k_view.stride_head;
  p.v = v_view.data, p.v_stride_token = v_view.stride_token, p.v_stride_head = v_view.stride_head;
  return call;
}

}  // namespace

std::tuple<Tensor, Tensor> soft_mask_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int64_t max_seqlen,
                                             std::optional<Tensor> index, std::optional<Tensor> theta,
                                             std::optional<Tensor> tau, std::optional<Tensor> pages, int64_t page_size,
                                             int64_t rule, double spread_weight, int64_t sink_pages,
                                             int64_t recent_pages, double scale) {
  constexpr const char* kOp = "soft_mask_forward";
  const Arguments args(kOp, "q", q);
  SoftMaskCall call = prepare(args, q, k, v, cu_seqlens, max_seqlen, index, theta, tau, pages, page_size, rule,
                              spread_weight, sink_pages, recent_pages, scale);
  const ScalarType lse_type = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = allocate(q, q.sizes(), q.scalar_type());
  Tensor lse = allocate(q, {q.size(0), q.size(1)}, lse_type);
  call.params.out = out.data_ptr();
  call.params.lse = lse.data_ptr();
  const Tensor workspace = workspace_of(q, call.params, false);
  Runner(kOp, q).run(call.params, soft_mask_forward_cpu, UA_CUDA(soft_mask_forward_cuda));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> soft_mask_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,
                                                      Tensor lse, Tensor cu_seqlens, int64_t max_seqlen,
                                                      std::optional<Tensor> index, std::optional<Tensor> theta,
                                                      std::optional<Tensor> tau, std::optional<Tensor> pages,
                                                      int64_t page_size, int64_t rule, double spread_weight,
                                                      int64_t sink_pages, int64_t recent_pages, double scale) {
  constexpr const char* kOp = "soft_mask_backward";
  const Arguments args(kOp, "q", q);
  SoftMaskBackwardParams p{};
  SoftMaskCall call = prepare(args, q, k, v, cu_seqlens, max_seqlen, index, theta, tau, pages, page_size, rule,
                              spread_weight, sink_pages, recent_pages, scale);
  args.floating("grad_out", grad_out, 3);
  args.floating("out", out, 3);
  for (int64_t dim = 0; dim < 3; ++dim) {
    args.size("grad_out", grad_out, dim, q.size(dim), "as in q");
    args.size("out", out, dim, q.size(dim), "as in q");
  }
  args.contiguous("out", out);
  args.tensor("lse", lse, q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, 2);
  args.size("lse", lse, 0, q.size(0), "tokens of q");
  args.size("lse", lse, 1, q.size(1), "heads of q");
  args.contiguous("lse", lse);
  // Autograd hands over any strides.
  Tensor grad = torch::stable::contiguous(grad_out);
  if (reinterpret_cast<uintptr_t>(grad.data_ptr()) % 16 != 0) grad = torch::stable::clone(grad);
  Tensor delta = allocate(lse, lse.sizes(), lse.scalar_type());
  Tensor dq = allocate(q, q.sizes(), q.scalar_type());
  Tensor dk = allocate(k, k.sizes(), k.scalar_type());
  Tensor dv = allocate(v, v.sizes(), v.scalar_type());
  p.forward = call.params;
  p.forward.out = out.data_ptr();
  p.forward.lse = lse.data_ptr();
  p.grad_out = grad.data_ptr();
  p.delta = delta.data_ptr();
  p.dq = dq.data_ptr();
  p.dk = dk.data_ptr();
  p.dv = dv.data_ptr();
  const Tensor workspace = workspace_of(q, p.forward, true);
  Runner(kOp, q).run(p, soft_mask_backward_cpu, UA_CUDA(soft_mask_backward_cuda));
  return {dq, dk, dv};
}

}  // namespace unique_attn
