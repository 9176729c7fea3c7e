// Page scores of 16-bit inputs on tensor cores, for every rule whose score is a form of products (not `minmax`: a
// query's 0 meets no infinite bound there, which a product does not know): score_products.cuh over the grid of
// page_scores.
#include <algorithm>

#include "core/cuda/launch.cuh"
#include "core/cuda/once.cuh"
#include "core/select/score_products.cuh"

namespace unique_attn {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

// Products side by side for several query tokens: query rows of a thread block / 8.
template <int kSteps>
constexpr int kMaxTiles = kSteps > 8 ? 2 : 8;

// Tiles of a warp under way. With these, no kernel needs more shared memory than every GPU of compute capability 8 has.
template <int kSteps, int kTiles>
constexpr int kStages = kSteps > 8 || kTiles > 1 ? 1 : 2;
template <typename Row, int kSteps, int kTiles>
using Cut = ScoreCut<Row, kTiles, kWarps, kStages<kSteps, kTiles>>;

template <typename T, typename Row, ScoreForm kForm, int kSteps, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles > 1 ? 1 : Row::kResident)
    page_scores_mma_kernel(const PageScoresParams p, const ScoreGrid grid, const EntryPieces pieces) {
  wait_for_previous_kernel();
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Queries<kForm, kSteps, kTiles, kWarps>*>(shared_bytes);
  const ScoreTile tile = score_tile<Cut<Row, kSteps, kTiles>::kStep>(p, grid);
  __nv_bfloat16* out = score_row<__nv_bfloat16>(p, tile, 0);
  score_pages<T, Row, kForm, kSteps, kTiles, kWarps, kStages<kSteps, kTiles>>(
      p, tile, pieces, shared, reinterpret_cast<uint8_t*>(&shared + 1),
      [&](int page, __nv_bfloat16 score) { out[page] = score; });
}

template <typename T, typename Row, ScoreForm kForm, int kSteps, int kTiles>
cudaError_t launch(const PageScoresParams& p, int tokens, const DeviceFacts& device, cudaStream_t stream) {
  using C = Cut<Row, kSteps, kTiles>;
  const auto kernel = page_scores_mma_kernel<T, Row, kForm, kSteps, kTiles>;
  const EntryPieces pieces = entry_pieces(p, C::kPages, C::kStep);
  constexpr int kBytes = sizeof(Queries<kForm, kSteps, kTiles, kWarps>) + kWarps * C::Ring::bytes(Row::kHeadDim);
  static_assert(kBytes <= 99 * 1024, "what every GPU of compute capability 8 has");
  static OncePerDevice once;
  const cudaError_t error =
      once(device, [&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes); });
  if (error != cudaSuccess) return error;
  static ResidentBlocks resident;
  const ScoreGrid grid =
      plan_score_grid(p, tokens, C::kStep, resident.get(device, kernel, kThreads, kBytes) * device.multiprocessors);
  return launch_dependent(kernel, score_blocks(p, grid), kThreads, kBytes, stream, p, grid, pieces);
}

template <typename T, typename Row, ScoreForm kForm, int kSteps>
cudaError_t launch_rows(const PageScoresParams& p, const DeviceFacts& device, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  if (p.num_query_tokens == 1 && group <= kColumns) return launch<T, Row, kForm, kSteps, 1>(p, 1, device, stream);
  const int fitting = kMaxTiles<kSteps> * kColumns / group;
  const int tokens = fitting < p.num_query_tokens ? fitting : p.num_query_tokens;
  return launch<T, Row, kForm, kSteps, kMaxTiles<kSteps>>(p, tokens, device, stream);
}

template <typename T, ScoreForm kForm, int kSteps>
cudaError_t launch_format(const PageScoresParams& p, const DeviceFacts& device, cudaStream_t stream) {
  if (p.index.format == IndexFormat::kExact) {
    return launch_rows<T, ExactRow<T, kForm, kSteps>, kForm, kSteps>(p, device, stream);
  }
  return launch_rows<__nv_bfloat16, CompressedRow<kForm, kSteps>, kForm, kSteps>(p, device, stream);
}

template <typename T, ScoreForm kForm>
cudaError_t launch_depth(const PageScoresParams& p, const DeviceFacts& device, cudaStream_t stream) {
  return p.head_dim <= 64    ? launch_format<T, kForm, 4>(p, device, stream)
         : p.head_dim <= 128 ? launch_format<T, kForm, 8>(p, device, stream)
                             : launch_format<T, kForm, 16>(p, device, stream);
}

template <typename T>
cudaError_t launch_form(const PageScoresParams& p, const DeviceFacts& device, cudaStream_t stream) {
  UA_DISPATCH_FORM(rule_facts(p.rule).form, kForm, return (launch_depth<T, kForm>(p, device, stream)));
  return cudaErrorInvalidValue;
}

}  // namespace

bool page_scores_on_mma(const PageScoresParams& p) {
  if (rule_facts(p.rule).form == ScoreForm::kGeneral || p.dtype == DType::kFloat32) return false;
  // Offsets within a block, and the stride of blocks, are 32-bit factors.
  if (std::max(p.index.stride_block, p.index.stride_page * p.table.block_size) > INT32_MAX) return false;
  if (p.index.format == IndexFormat::kExact) return true;
  return p.dtype == DType::kBFloat16 && (p.head_dim == 64 || p.head_dim == 128 || p.head_dim == 256);
}

cudaError_t page_scores_mma_cuda(const PageScoresParams& params, const DeviceFacts& device, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16 ? launch_form<__nv_bfloat16>(params, device, stream)
                                          : launch_form<__half>(params, device, stream);
}

}  // namespace unique_attn
