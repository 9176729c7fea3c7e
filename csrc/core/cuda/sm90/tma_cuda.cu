// How the TMA learns of a tensor, on the host.
#include "core/cuda/driver.cuh"
#include "core/cuda/sm90/tma.cuh"

namespace unique_attn {
namespace {

DriverFunction<decltype(&cuTensorMapEncodeTiled)> driver_encode("cuTensorMapEncodeTiled");

}  // namespace

cudaError_t encode_tensor_map(CUtensorMap& map, const TensorBox& t) {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  const cudaError_t error = driver_encode.find(encode);
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
