#include "core/cuda/driver.cuh"
#include "core/memory/address_space.h"

namespace unique_attn {
namespace {

cudaError_t as_runtime(CUresult result) {
  switch (result) {
    case CUDA_SUCCESS:
      return cudaSuccess;
    case CUDA_ERROR_OUT_OF_MEMORY:
      return cudaErrorMemoryAllocation;
    case CUDA_ERROR_NOT_SUPPORTED:
      return cudaErrorNotSupported;
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls a function of the driver, which is found first.
#define UA_DRIVER(function, ...)                                         \
  [&]() -> cudaError_t {                                                 \
    static DriverFunction<decltype(&function)> driver(#function);        \
    decltype(&function) call = nullptr;                                  \
    const cudaError_t error = driver.find(call);                         \
    return error == cudaSuccess ? as_runtime(call(__VA_ARGS__)) : error; \
  }()

CUmemAllocationProp memory_of(int device) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  return prop;
}

CUdeviceptr pointer(int64_t address) { return static_cast<CUdeviceptr>(address); }

}  // namespace

cudaError_t reserve_addresses(int device, int64_t& num_bytes, int64_t& address, int64_t& granularity) {
  const CUmemAllocationProp prop = memory_of(device);
  size_t unit = 0;
  cudaError_t error = UA_DRIVER(cuMemGetAllocationGranularity, &unit, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  if (error != cudaSuccess) return error;
  granularity = static_cast<int64_t>(unit);
  num_bytes = (num_bytes + granularity - 1) / granularity * granularity;
  CUdeviceptr begin = 0;
  error = UA_DRIVER(cuMemAddressReserve, &begin, static_cast<size_t>(num_bytes), 0, 0, 0);
  address = static_cast<int64_t>(begin);
  return error;
}

cudaError_t back_addresses(int device, int64_t address, int64_t num_bytes) {
  const CUmemAllocationProp prop = memory_of(device);
  const size_t size = static_cast<size_t>(num_bytes);
  CUmemGenericAllocationHandle memory{};
  cudaError_t error = UA_DRIVER(cuMemCreate, &memory, size, &prop, 0);
  if (error != cudaSuccess) return error;
  error = UA_DRIVER(cuMemMap, pointer(address), size, 0, memory, 0);
  // What is mapped keeps the memory; if nothing is, it is gone with this.
  const cudaError_t released = UA_DRIVER(cuMemRelease, memory);
  if (error != cudaSuccess) return error;
  CUmemAccessDesc access{};
  access.location = prop.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  error = UA_DRIVER(cuMemSetAccess, pointer(address), size, &access, 1);
  if (error != cudaSuccess) {
    static_cast<void>(unback_addresses(address, num_bytes));
    return error;
  }
  return released;
}

cudaError_t unback_addresses(int64_t address, int64_t num_bytes) {
  return UA_DRIVER(cuMemUnmap, pointer(address), static_cast<size_t>(num_bytes));
}

cudaError_t free_addresses(int64_t address, int64_t num_bytes) {
  return UA_DRIVER(cuMemAddressFree, pointer(address), static_cast<size_t>(num_bytes));
}

}  // namespace unique_attn
