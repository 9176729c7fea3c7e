// Runs a core function on the tensors' device: PyTorch's thread pool, or the current CUDA stream of that device.
#pragma once

#include "arguments.h"
#include "core/cuda_fwd.h"

// The CUDA half of a pair of core functions; absent from a build without CUDA.
#ifdef UNIQUE_ATTN_WITH_CUDA
#define UA_CUDA(function) function
#else
#define UA_CUDA(function) static_cast<decltype(&function)>(nullptr)
#endif

namespace unique_attn {

class Runner {
 public:
  Runner(const char* op, const Tensor& first);

  template <typename Params>
  void run(const Params& params, void (*cpu)(const Params&, const CpuExecutor&),
           cudaError_t (*cuda)(const Params&, cudaStream_t)) const {
    if (cuda_) {
      check(cuda(params, stream_));
    } else {
      cpu(params, torch_executor());
    }
  }

 private:
  void check(cudaError_t error) const;

  const char* op_;
  bool cuda_;
  cudaStream_t stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Multiprocessors of the tensor's device; 1 on the CPU.
int multiprocessor_count(const Tensor& tensor);

}  // namespace unique_attn
