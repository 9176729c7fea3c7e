// Chains the Hopper training kernels over chunks of queries (forward pass, dq, gradients of the pages) and of keys
// (dk, dv), and describes their tensors to the TMA.
#include <atomic>

#include "soft_mask_hopper.cuh"

namespace unique_attn {
namespace {

// Memory for what is computed per (query, page), in bytes; a chunk never has less than one tile.
constexpr size_t kChunkBytes = size_t{384} << 20;

constexpr size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

// Whether these kernels run there, and were built for it. Strides are multiples of 16 bytes, as the ops require.
bool on_hopper([[maybe_unused]] DType dtype, [[maybe_unused]] int head_dim, [[maybe_unused]] int device) {
#ifdef UNIQUE_ATTN_SM90A
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && (head_dim == 64 || head_dim == 128) &&
         attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
#else
  return false;
#endif
}

// The number of tiles, at most `most`, whose thread blocks fill the device best; the larger on near ties.
int full_waves(int64_t most, int blocks_per_tile, int multiprocessors) {
  int chosen = 1;
  double best = 0.;
  for (int64_t n = 1; n <= most && n <= 8 * multiprocessors; ++n) {
    const int64_t blocks = n * blocks_per_tile;
    const int64_t waves = (blocks + multiprocessors - 1) / multiprocessors;
    const double share = static_cast<double>(blocks) / static_cast<double>(waves * multiprocessors);
    if (share >= best - 0.02) {
      chosen = static_cast<int>(n);
      best = share > best ? share : best;
    }
  }
  return chosen;
}

}  // namespace

HopperPlan plan_soft_mask(const SoftMaskForwardParams& p, bool backward, int device) {
  HopperPlan plan;
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  plan.use = on_hopper(p.dtype, p.head_dim, device) && p.scale != 0. && p.seqs.total_tokens > 0 &&
             p.seqs.max_seqlen > 0 && p.num_kv_heads > 0;
  if (!plan.use) return plan;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t num_tokens = p.seqs.total_tokens;
  const int64_t longest = p.seqs.max_seqlen;
  const int heads = p.num_kv_heads;
  plan.tokens = 64 / group;
  plan.chunk_tokens = static_cast<int>(num_tokens);
  plan.chunk_keys = static_cast<int>(num_tokens);
  size_t offset = 0;
  const auto take = [&](size_t bytes) {
    const size_t at = offset;
    offset += aligned(bytes);
    return at;
  };
  const size_t rows = static_cast<size_t>(num_tokens) * p.num_q_heads;
  const size_t entries =
      static_cast<size_t>(num_page_slots(p.seqs.total_tokens, p.seqs.batch, p.seqs.page_size)) * heads * p.head_dim;
  if (backward) plan.stats = take(rows * sizeof(float2));
  if (p.mode != MaskMode::kDense) {
    const int page_size = p.seqs.page_size;
    plan.width = static_cast<int>(((longest + page_size - 1) / page_size + 15) / 16 * 16);
    const bool soft = p.mode == MaskMode::kSoft;
    const size_t cell = backward && soft ? 5 : 2;  // bytes per (token, head, page)
    const size_t token_bytes = cell * heads * plan.width + (cell == 5 ? size_t{2} * p.num_q_heads * p.head_dim : 0);
    const int tile = 2 * plan.tokens;
    const int64_t all_tiles = (num_tokens + tile - 1) / tile;
    const int64_t most = static_cast<int64_t>(kChunkBytes / (token_bytes * tile));
    const int64_t chunk = all_tiles <= most ? all_tiles : full_waves(most, heads, multiprocessors);
    plan.chunk_tokens = static_cast<int>(chunk * tile < num_tokens ? chunk * tile : num_tokens);
    const size_t cells = static_cast<size_t>(plan.chunk_tokens) * heads * plan.width;
    size_t gates = cells;
    if (backward) {
      const int pages = kDkvKeys / page_size;  // of a tile
      const int64_t all_key_tiles = (num_tokens + kDkvKeys - 1) / kDkvKeys;
      const size_t tile_bytes = static_cast<size_t>(num_tokens) * heads * pages * 2;
      const int64_t most_keys = static_cast<int64_t>(kChunkBytes / tile_bytes);
      const int64_t key_tiles =
          all_key_tiles <= most_keys ? all_key_tiles : full_waves(most_keys, heads, multiprocessors);
      plan.chunk_keys = static_cast<int>(key_tiles * kDkvKeys);
      const int64_t longest_tiles = (longest + kDkvKeys - 1) / kDkvKeys;
      const int64_t tiles = key_tiles < longest_tiles ? key_tiles : longest_tiles;
      plan.key_width = static_cast<int>((tiles * pages + 15) / 16 * 16);
      const size_t key_cells = static_cast<size_t>(num_tokens) * heads * plan.key_width;
      gates = gates > key_cells ? gates : key_cells;
    }
    plan.log_gates = take(gates * 2);
    if (soft) plan.squares = take(entries * 2);
    if (soft && backward) {
      plan.best = take(cells);
      plan.slopes = take(cells * 2);
      plan.q_squares = take(static_cast<size_t>(plan.chunk_tokens) * p.num_q_heads * p.head_dim * 2);
      plan.page_grads = take(entries * 2 * sizeof(float));
    }
  }
  plan.bytes = offset;
  return plan;
}

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver: the library loads where there is none. It is asked for until there
// is one, so that a failure is not remembered.
cudaError_t find_encode(Encode& encode) {
  static std::atomic<Encode> known{nullptr};
  encode = known.load(std::memory_order_relaxed);
  if (encode != nullptr) return cudaSuccess;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorNotSupported;
  encode = reinterpret_cast<Encode>(function);
  known.store(encode, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace

cudaError_t encode_tensor_map(CUtensorMap& map, const TensorBox& t) {
  Encode encode = nullptr;
  const cudaError_t error = find_encode(encode);
  if (error != cudaSuccess) return error;
  cuuint64_t size[3], stride[2];
  cuuint32_t box[3], step[3] = {1, 1, 1};
  for (int i = 0; i < 3; ++i) {
    size[i] = static_cast<cuuint64_t>(t.size[i]);
    box[i] = static_cast<cuuint32_t>(t.box[i]);
  }
  // The stride of a dimension of size 1 may be anything.
  const int64_t row = (t.size[0] * t.element_bytes + 15) / 16 * 16;
  for (int i = 0; i < 2; ++i) stride[i] = static_cast<cuuint64_t>(t.size[i + 1] == 1 ? row : t.stride[i]);
  const CUtensorMapDataType type =
      t.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const CUresult result =
      encode(&map, type, 3, const_cast<void*>(t.data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             t.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

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
  if (begin == 0 && p_.rule == Rule::kDirectional) {
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
  if (p_.mode == MaskMode::kSoft && p_.rule == Rule::kDirectional) {
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
  const bool spreads = soft && p_.rule != Rule::kMean;
  const bool directional = soft && p_.rule == Rule::kDirectional;
  const int64_t grad_stride = int64_t{p_.num_q_heads} * p_.head_dim;
  const int page_size = p_.seqs.page_size;
  auto* stats = at<float2>(plan_.stats);
  auto* page_grads = soft ? at<float>(plan_.page_grads) : nullptr;
  UA_RETURN_IF(launch_row_stats(b, stats, stream_));
  if (directional) UA_RETURN_IF(launch_squares(args(0, 0, 0, 0, 0), at<__nv_bfloat16>(plan_.squares), false, stream_));
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
  return plan_soft_mask(params, backward, device).bytes;
}

bool can_score_on_hopper(const PageBoundaryParams& p, int device) { return on_hopper(p.dtype, p.head_dim, device); }

cudaError_t boundary_scores_hopper(const PageBoundaryParams& b, int begin, int end, int row_pages,
                                   cudaStream_t stream) {
  SoftMaskForwardParams p{};
  p.dtype = b.dtype;
  p.rule = b.rule;
  p.spread = b.spread;
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
