// Squares in bf16, whose range holds them: std^2 of every page's entry, and of a chunk of queries.
#include "core/train/sm90/common.cuh"

namespace unique_attn {
namespace {

constexpr int kThreads = 256;

// out[row, :] = in[row / inner, row % inner, :]^2, 8 channels per thread; strides in bytes.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const uint8_t* in, int64_t stride_outer, int64_t stride_inner, int inner, int chunks, int64_t count,
                   __nv_bfloat16* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / chunks;
  const uint8_t* source = in + row / inner * stride_outer + row % inner * stride_inner + i % chunks * 16;
  Vec8<T> vector;
  vector.load(reinterpret_cast<const T*>(source));
  float x[8];
  vector.unpack(x);
#pragma unroll
  for (float& value : x) value *= value;
  store8(out + i * 8, x);
}

}  // namespace

cudaError_t launch_squares(const HopperArgs& args, __nv_bfloat16* out, bool of_queries, cudaStream_t stream) {
  const SoftMaskForwardParams& p = args.p;
  const int element = 2;
  const int64_t outer = of_queries ? args.chunk.token_end - args.chunk.token_begin
                                   : num_page_slots(p.seqs.total_tokens, p.seqs.batch, p.seqs.page_size);
  const int inner = of_queries ? p.num_q_heads : p.num_kv_heads;
  const uint8_t* in = of_queries
                          ? static_cast<const uint8_t*>(p.q) + args.chunk.token_begin * p.q_stride_token * element
                          : p.index.data + p.head_dim * element;
  const int64_t stride_outer = of_queries ? p.q_stride_token * element : p.index.stride_block;
  const int64_t stride_inner = of_queries ? p.q_stride_head * element : p.index.stride_head;
  const int chunks = p.head_dim / 8;
  const int64_t count = outer * inner * chunks;
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  const auto kernel = p.dtype == DType::kBFloat16 ? squares_kernel<__nv_bfloat16> : squares_kernel<__half>;
  kernel<<<blocks, kThreads, 0, stream>>>(in, stride_outer, stride_inner, inner, chunks, count, out);
  return cudaGetLastError();
}

}  // namespace unique_attn
