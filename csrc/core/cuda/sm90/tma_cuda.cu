// How the TMA learns of a tensor, on the host.
#include <atomic>

#include "core/cuda/sm90/tma.cuh"

namespace unique_attn {
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
  const int rank = t.size[3] == 0 ? 3 : 4;
  cuuint64_t size[4], stride[3];
  cuuint32_t box[4], step[4] = {1, 1, 1, 1};
  for (int i = 0; i < rank; ++i) {
    size[i] = static_cast<cuuint64_t>(t.size[i]);
    box[i] = static_cast<cuuint32_t>(t.box[i]);
  }
  // The stride of a dimension of size 1 may be anything.
  const int64_t row = (t.size[0] * t.element_bytes + 15) / 16 * 16;
  for (int i = 0; i + 1 < rank; ++i) stride[i] = static_cast<cuuint64_t>(t.size[i + 1] == 1 ? row : t.stride[i]);
  const CUtensorMapDataType type =
      t.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const CUresult result =
      encode(&map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(t.data), size, stride, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace unique_attn
