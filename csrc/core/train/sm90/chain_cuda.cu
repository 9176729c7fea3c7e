// Chains the Hopper training kernels over chunks of queries (forward pass, dq, gradients of the pages) and of keys
// (dk, dv), and describes their tensors to the TMA.
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

#define UA_RETURN_IF(call)                        \
  do {                                            \
    const cudaError_t ua_error = (call);          \
    if (ua_error != cudaSuccess) return ua_error; \
  } while (false)

class Launcher {
 public:
  Launcher(const SoftMaskForwardParams& p, const HopperPlan& plan, cudaStream_t stream)
      : p_(p), plan_(plan), stream_(stream), group_(p.num_q_heads / p.num_kv_heads) {}

  // Plain scores of the tokens [begin, end) on all pages.
  cudaError_t scores(int begin, int end, int row_pages, __nv_bfloat16* out);
  cudaError_t forward();
  cudaError_t backward(const SoftMaskBackwardParams& b);

 private:
  template <typename X>
  X* at(size_t offset) const {
    return reinterpret_cast<X*>(static_cast<char*>(p_.workspace) + offset);
  }

  HopperArgs args(int token_begin, int token_end, int key_begin, int key_end, int width) const {
    return {p_,
            {token_begin, token_end, key_begin, key_end, width},
            group_,
            plan_.tokens,
            __builtin_ctz(static_cast<unsigned>(p_.seqs.page_size))};
  }

  // Rows of queries: all heads of a group of so many tokens.
  TensorBox queries(const void* data, int64_t stride_token, int64_t stride_head, int64_t tokens) const {
    return {data,
            2,
            {p_.head_dim, p_.num_q_heads, tokens},
            {stride_head * 2, stride_token * 2},
            {kTileChannels, group_, plan_.tokens},
            true};
  }
  TensorBox keys(const void* data, int64_t stride_token, int64_t stride_head, int rows) const {
    return {data,
            2,
            {p_.head_dim, p_.num_kv_heads, p_.seqs.total_tokens},
            {stride_head * 2, stride_token * 2},
            {kTileChannels, 1, rows},
            true};
  }
  TensorBox entries(int rows) const {
    return {p_.index.data,
            2,
            {p_.head_dim, p_.num_kv_heads, slots()},
            {p_.index.stride_head, p_.index.stride_block},
            {kTileChannels, 1, rows},
            true};
  }
  TensorBox cells(size_t offset, int bytes, const HopperChunk& chunk, int pages) const {
    const int64_t row = int64_t{chunk.width} * bytes;
    return {at<char>(offset),
            bytes,
            {chunk.width, p_.num_kv_heads, chunk.token_end - chunk.token_begin},
            {row, row * p_.num_kv_heads},
            {pages, 1, plan_.tokens},
            false};
  }
  int64_t slots() const { return num_page_slots(p_.seqs.total_tokens, p_.seqs.batch, p_.seqs.page_size); }

  cudaError_t score_maps(ScoreMaps& maps) const;
  // Log-gates of a chunk into the workspace.
  cudaError_t gates(const HopperArgs& a, ScoreOutput which) const;

  template <typename Body>
  cudaError_t each_query_chunk(const Body& body) const {
    for (int begin = 0; begin < p_.seqs.total_tokens; begin += plan_.chunk_tokens) {
      const int end =
          begin + plan_.chunk_tokens < p_.seqs.total_tokens ? begin + plan_.chunk_tokens : p_.seqs.total_tokens;
      const cudaError_t error = body(args(begin, end, 0, p_.seqs.total_tokens, plan_.width));
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  const SoftMaskForwardParams& p_;
  const HopperPlan& plan_;
  cudaStream_t stream_;
  int group_;
};

cudaError_t Launcher::score_maps(ScoreMaps& maps) const {
  UA_RETURN_IF(encode_tensor_map(maps.mean, entries(kScorePages)));
  return encode_tensor_map(maps.var, {at<char>(plan_.squares),
                                      2,
                                      {p_.head_dim, p_.num_kv_heads, slots()},
                                      {int64_t{p_.head_dim} * 2, int64_t{p_.head_dim} * p_.num_kv_heads * 2},
                                      {kTileChannels, 1, kScorePages},
                                      true});
}

cudaError_t Launcher::scores(int begin, int end, int row_pages, __nv_bfloat16* out) {
  if (begin == 0 && p_.form == ScoreForm::kVectorSpread) {
    UA_RETURN_IF(launch_squares(args(0, 0, 0, 0, 0), at<__nv_bfloat16>(plan_.squares), false, stream_));
  }
  ScoreMaps maps;
  UA_RETURN_IF(score_maps(maps));
  return launch_page_gates(args(begin, end, 0, p_.seqs.total_tokens, row_pages), maps, {out, nullptr, nullptr, nullptr},
                           ScoreOutput::kScores, stream_);
}

cudaError_t Launcher::gates(const HopperArgs& a, ScoreOutput which) const {
  if (p_.mode == MaskMode::kDense) return cudaSuccess;
  if (p_.mode == MaskMode::kHard) return launch_hard_gates(a, at<__half>(plan_.log_gates), stream_);
  ScoreMaps maps;
  UA_RETURN_IF(score_maps(maps));
  const ScoreOutputs out{nullptr, at<__half>(plan_.log_gates), at<uint8_t>(plan_.best),
                         at<__nv_bfloat16>(plan_.slopes)};
  return launch_page_gates(a, maps, out, which, stream_);
}

cudaError_t Launcher::forward() {
  ForwardMaps maps{};
  UA_RETURN_IF(encode_tensor_map(maps.q, queries(p_.q, p_.q_stride_token, p_.q_stride_head, p_.seqs.total_tokens)));
  UA_RETURN_IF(encode_tensor_map(maps.k, keys(p_.k, p_.k_stride_token, p_.k_stride_head, kForwardKeys)));
  UA_RETURN_IF(encode_tensor_map(maps.v, keys(p_.v, p_.v_stride_token, p_.v_stride_head, kForwardKeys)));
  if (p_.mode == MaskMode::kSoft && p_.form == ScoreForm::kVectorSpread) {
    UA_RETURN_IF(launch_squares(args(0, 0, 0, 0, 0), at<__nv_bfloat16>(plan_.squares), false, stream_));
  }
  return each_query_chunk([&](const HopperArgs& a) {
    if (p_.mode != MaskMode::kDense) {
      UA_RETURN_IF(gates(a, ScoreOutput::kGates));
      UA_RETURN_IF(encode_tensor_map(maps.log_gates,
                                     cells(plan_.log_gates, 2, a.chunk, gate_box(kForwardKeys, p_.seqs.page_size))));
    }
    return launch_forward(a, maps, stream_);
  });
}

cudaError_t Launcher::backward(const SoftMaskBackwardParams& b) {
  const bool soft = p_.mode == MaskMode::kSoft;
  const bool spreads = soft && p_.form != ScoreForm::kMean;
  const bool vectors = soft && p_.form == ScoreForm::kVectorSpread;
  const int64_t grad_stride = int64_t{p_.num_q_heads} * p_.head_dim;
  const int page_size = p_.seqs.page_size;
  auto* stats = at<float2>(plan_.stats);
  auto* page_grads = soft ? at<float>(plan_.page_grads) : nullptr;
  UA_RETURN_IF(launch_row_stats(b, stats, stream_));
  if (vectors) UA_RETURN_IF(launch_squares(args(0, 0, 0, 0, 0), at<__nv_bfloat16>(plan_.squares), false, stream_));
  if (soft) {
    UA_RETURN_IF(cudaMemsetAsync(
        page_grads, 0, static_cast<size_t>(slots()) * p_.num_kv_heads * p_.head_dim * 2 * sizeof(float), stream_));
  }

  DqMaps dq{};
  UA_RETURN_IF(encode_tensor_map(dq.q, queries(p_.q, p_.q_stride_token, p_.q_stride_head, p_.seqs.total_tokens)));
  UA_RETURN_IF(encode_tensor_map(dq.grad, queries(b.grad_out, grad_stride, p_.head_dim, p_.seqs.total_tokens)));
  UA_RETURN_IF(encode_tensor_map(dq.k, keys(p_.k, p_.k_stride_token, p_.k_stride_head, kDqKeys)));
  UA_RETURN_IF(encode_tensor_map(dq.v, keys(p_.v, p_.v_stride_token, p_.v_stride_head, kDqKeys)));
  if (soft) UA_RETURN_IF(encode_tensor_map(dq.mean, entries(mean_box(page_size))));
  UA_RETURN_IF(each_query_chunk([&](const HopperArgs& a) {
    if (p_.mode != MaskMode::kDense) {
      UA_RETURN_IF(gates(a, soft ? ScoreOutput::kGatesForBackward : ScoreOutput::kGates));
      UA_RETURN_IF(encode_tensor_map(dq.log_gates, cells(plan_.log_gates, 2, a.chunk, gate_box(kDqKeys, page_size))));
    }
    if (soft) UA_RETURN_IF(encode_tensor_map(dq.best, cells(plan_.best, 1, a.chunk, kBestAlign)));
    UA_RETURN_IF(launch_dq(a, dq, stats, at<__nv_bfloat16>(plan_.log_gates), b.dq, stream_));
    if (!soft) return cudaSuccess;
    PageGradMaps maps{};
    maps.q = dq.q;
    UA_RETURN_IF(encode_tensor_map(maps.weights, cells(plan_.log_gates, 2, a.chunk, kGradPages)));
    UA_RETURN_IF(encode_tensor_map(maps.best, cells(plan_.best, 1, a.chunk, kGradPages)));
    UA_RETURN_IF(encode_tensor_map(maps.slopes, cells(plan_.slopes, 2, a.chunk, kGradPages)));
    if (spreads) {
      UA_RETURN_IF(launch_squares(a, at<__nv_bfloat16>(plan_.q_squares), true, stream_));
      UA_RETURN_IF(encode_tensor_map(maps.q_squares, queries(at<char>(plan_.q_squares), grad_stride, p_.head_dim,
                                                             a.chunk.token_end - a.chunk.token_begin)));
    }
    return launch_page_gradients(a, maps, page_grads, stream_);
  }));
  if (soft) UA_RETURN_IF(launch_finish_page_gradients(args(0, 0, 0, 0, 0), page_grads, stream_));

  DkvMaps dkv{};
  dkv.q = dq.q;
  dkv.grad = dq.grad;
  UA_RETURN_IF(encode_tensor_map(dkv.k, keys(p_.k, p_.k_stride_token, p_.k_stride_head, 64)));
  UA_RETURN_IF(encode_tensor_map(dkv.v, keys(p_.v, p_.v_stride_token, p_.v_stride_head, 64)));
  for (int begin = 0; begin < p_.seqs.total_tokens; begin += plan_.chunk_keys) {
    const HopperArgs a = args(0, p_.seqs.total_tokens, begin, begin + plan_.chunk_keys, plan_.key_width);
    if (p_.mode != MaskMode::kDense) {
      UA_RETURN_IF(gates(a, ScoreOutput::kGates));
      UA_RETURN_IF(encode_tensor_map(dkv.log_gates, cells(plan_.log_gates, 2, a.chunk, gate_box(kDkvKeys, page_size))));
    }
    UA_RETURN_IF(launch_dkv(a, dkv, stats, page_grads, b.dk, b.dv, stream_));
  }
  return cudaSuccess;
}

}  // namespace

size_t soft_mask_workspace_bytes(const SoftMaskForwardParams& params, bool backward, int device) {
  DeviceFacts facts;
  return device_facts(facts, device) == cudaSuccess ? plan_soft_mask(params, backward, facts).bytes : 0;
}

cudaError_t boundary_scores_hopper(const PageBoundaryParams& b, int begin, int end, int row_pages,
                                   cudaStream_t stream) {
  SoftMaskForwardParams p{};
  p.dtype = b.dtype;
  p.form = b.form;
  p.spread_weight = b.spread_weight;
  p.seqs = b.seqs;
  p.num_q_heads = b.num_q_heads;
  p.num_kv_heads = b.num_kv_heads;
  p.head_dim = b.head_dim;
  p.sink_pages = b.sink_pages;
  p.recent_pages = b.recent_pages;
  p.q = b.q;
  p.q_stride_token = b.q_stride_token;
  p.q_stride_head = b.q_stride_head;
  p.index = b.index;
  p.workspace = b.squares;
  HopperPlan plan;
  plan.tokens = 64 / (p.num_q_heads / p.num_kv_heads);
  return Launcher(p, plan, stream).scores(begin, end, row_pages, static_cast<__nv_bfloat16*>(b.workspace));
}

cudaError_t soft_mask_forward_hopper(const SoftMaskForwardParams& params, const HopperPlan& plan, cudaStream_t stream) {
  return Launcher(params, plan, stream).forward();
}

cudaError_t soft_mask_backward_hopper(const SoftMaskBackwardParams& params, const HopperPlan& plan,
                                      cudaStream_t stream) {
  return Launcher(params.forward, plan, stream).backward(params);
}

}  // namespace unique_attn
