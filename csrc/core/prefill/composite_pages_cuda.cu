// Pages of keys: their mean and their variance by channel, 8 channels a thread. The second pass of the variance reads its
// keys from L1.
#include "core/cuda/vec.cuh"
#include "core/prefill/composite_cuda.cuh"

namespace unique_attn {
namespace {

constexpr int kThreads = 128;
constexpr int kRun = 8;  // keys of a page that lie in one block of a cache, if the first of them does
static_assert(kPools[0] % kRun == 0 && kBlockAlign % kRun == 0);

// take(x): 8 channels from `d` on of each of the `count` keys from `first` on.
template <bool kPaged, typename T, typename Take>
__device__ __forceinline__ void each_key(const HeadKeys<T, kPaged>& keys, int first, int count, int d,
                                         const Take& take) {
  const auto take_row = [&](const T* row) {
    Vec8<T> raw;
    float x[8];
    if (!kPaged || row != nullptr) {
      raw.load(row);
    } else {
      raw.zero();
    }
    raw.unpack(x);
    take(x);
  };
  if constexpr (kPaged) {
    for (int done = 0; done < count; done += kRun) {
      const T* rows = keys.row(first + done);
      const int some = min(kRun, count - done);
      for (int j = 0; j < some; ++j) take_row(rows == nullptr ? nullptr : rows + j * keys.stride() + d);
    }
  } else {
    const T* rows = keys.row(first) + d;
    for (int j = 0; j < count; ++j) take_row(rows + j * keys.stride());
  }
}

template <typename T, bool kPaged>
__global__ void __launch_bounds__(kThreads) composite_pages_kernel(const CompositeBlocksParams p, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= items) return;
  const int chunks = p.head_dim / 8;
  const int d = static_cast<int>(item % chunks) * 8;
  const int head = static_cast<int>(item / chunks % p.num_kv_heads);
  const int slot = static_cast<int>(item / chunks / p.num_kv_heads);
  const BlockOfSlot at = block_of_slot(p.cu_seqlens_k, p.batch, p.pool_k, slot);
  const int start = p.cu_seqlens_k[at.sequence];
  const int first = at.block * p.pool_k;
  const int count = min(p.cu_seqlens_k[at.sequence + 1] - start - first, p.pool_k);
  if (count <= 0) return;
  const HeadKeys<T, kPaged> keys(p.k, p.table, start, at.sequence, head);

  float mean[8] = {};
  each_key(keys, first, count, d, [&](const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) mean[i] += x[i];
  });
  const float number = static_cast<float>(count);
#pragma unroll
  for (int i = 0; i < 8; ++i) mean[i] /= number;
  const int64_t row = int64_t{slot} * p.num_kv_heads + head;
  T* page = static_cast<T*>(p.pages) + row * composite_vectors(p.form) * p.head_dim + d;
  store8(page, mean);
  if (p.form != ScoreForm::kVectorSpread) return;

  float var[8] = {};
  each_key(keys, first, count, d, [&](const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) var[i] += (x[i] - mean[i]) * (x[i] - mean[i]);
  });
#pragma unroll
  for (int i = 0; i < 8; ++i) var[i] /= number;
  store8(reinterpret_cast<VarianceType<T>*>(page + p.head_dim), var);
}

}  // namespace

cudaError_t composite_pages_cuda(const CompositeBlocksParams& p, cudaStream_t stream) {
  const int64_t slots = num_block_slots(p.total_keys, p.batch, p.pool_k);
  const int64_t items = slots * p.num_kv_heads * (p.head_dim / 8);
  if (items == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((items + kThreads - 1) / kThreads);
  UA_DISPATCH_CUDA_DTYPE(p.dtype, T, {
    const auto kernel = is_paged(p.table) ? composite_pages_kernel<T, true> : composite_pages_kernel<T, false>;
    kernel<<<blocks, kThreads, 0, stream>>>(p, items);
  });
  return cudaGetLastError();
}

}  // namespace unique_attn
