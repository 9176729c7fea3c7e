// Log-gates of the hard mode: -inf on the candidate pages that are not selected, else 0.
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

constexpr int kThreads = 256;

// One warp per token and KV head.
__global__ void __launch_bounds__(kThreads) hard_gates_kernel(const HopperArgs a, __half* log_gates) {
  const int num_tokens = a.chunk.token_end - a.chunk.token_begin;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (row >= int64_t{num_tokens} * a.p.num_kv_heads) return;
  const int lane = threadIdx.x % kWarp;
  const int token = a.chunk.token_begin + static_cast<int>(row / a.p.num_kv_heads);
  const int sequence = sequence_of(a.p.seqs, token);
  const int start = a.p.seqs.cu_seqlens[sequence];
  const int first_page = first_chunk_page(a, start);
  const PageRange range = candidate_pages(token - start, a.p.seqs.page_size, a.p.sink_pages, a.p.recent_pages);
  // The attention kernels read whole tiles of keys.
  const int own = (token - start) >> a.page_shift;
  const int end = min((own / kScorePages + 1) * kScorePages - first_page, a.chunk.width);
  __half* gates = log_gates + row * a.chunk.width;
  for (int i = lane; i < end; i += kWarp) {
    const int page = first_page + i;
    gates[i] = page >= range.first && page < range.end ? __ushort_as_half(0xfc00) : __ushort_as_half(0);
  }
  __syncwarp();
  const int32_t* pages = a.p.pages + (int64_t{token} * a.p.num_kv_heads + row % a.p.num_kv_heads) * a.p.num_selected;
  for (int i = lane; i < a.p.num_selected; i += kWarp) {
    const int at = pages[i] - first_page;
    if (pages[i] >= 0 && at >= 0 && at < end) gates[at] = __ushort_as_half(0);
  }
}

}  // namespace

cudaError_t launch_hard_gates(const HopperArgs& args, __half* log_gates, cudaStream_t stream) {
  const int64_t rows = int64_t{args.chunk.token_end - args.chunk.token_begin} * args.p.num_kv_heads;
  const auto blocks = static_cast<unsigned>((rows * kWarp + kThreads - 1) / kThreads);
  hard_gates_kernel<<<blocks, kThreads, 0, stream>>>(args, log_gates);
  return cudaGetLastError();
}

}  // namespace unique_attn
