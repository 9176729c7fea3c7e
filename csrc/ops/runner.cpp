#include "runner.h"

#include "core/cuda/device.h"

#ifdef UNIQUE_ATTN_WITH_CUDA
#include <cuda_runtime.h>

// Weak, because torch's CPU packages do not have it: the library loads there too, and never calls it.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace unique_attn {

Runner::Runner(const char* op, const Tensor& first) : op_(op), cuda_(first.is_cuda()) {
#ifdef UNIQUE_ATTN_WITH_CUDA
  if (cuda_) {
    const int32_t device = first.get_device_index();
    int current = -1;  // where it is the tensors' device already, there is nothing to set and to set back
    if (cudaGetDevice(&current) != cudaSuccess || current != device) guard_.emplace(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
}

void Runner::check([[maybe_unused]] cudaError_t error) const {
#ifdef UNIQUE_ATTN_WITH_CUDA
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op_) + ": CUDA launch failed: " + cudaGetErrorString(error));
  }
#endif
}

int multiprocessor_count([[maybe_unused]] const Tensor& tensor) {
#ifdef UNIQUE_ATTN_WITH_CUDA
  DeviceFacts facts;
  if (device_facts(facts, tensor.get_device_index()) == cudaSuccess) return facts.multiprocessors;
#endif
  return 1;
}

}  // namespace unique_attn
