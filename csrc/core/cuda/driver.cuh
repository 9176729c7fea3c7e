// Functions of the CUDA driver, without linking it: the library loads where there is none.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

namespace unique_attn {

// A function of the driver by name, in the version of CUDA 12.0. It is asked for until there is one, so that a failure
// is not remembered.
template <class Function>
class DriverFunction {
 public:
  explicit constexpr DriverFunction(const char* name) : name_(name) {}

  cudaError_t find(Function& function) {
    function = known_.load(std::memory_order_relaxed);
    if (function != nullptr) return cudaSuccess;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name_, &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name_, &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess || found == nullptr) return cudaErrorNotSupported;
    function = reinterpret_cast<Function>(found);
    known_.store(function, std::memory_order_relaxed);
    return cudaSuccess;
  }

 private:
  const char* name_;
  std::atomic<Function> known_{nullptr};
};

}  // namespace unique_attn
