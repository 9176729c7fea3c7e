// What the runtime is told of a kernel the first time that the kernel is launched on a device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "core/cuda/device.h"

namespace unique_attn {

// A static one belongs to each kernel. Threads that come first at once all tell it, which does no harm.
class OncePerDevice {
 public:
  // tell() until it has succeeded for the device; a failure is not remembered.
  template <typename Tell>
  cudaError_t operator()(const DeviceFacts& device, const Tell& tell) {
    const bool keeps = device.index < kDevices;
    if (keeps && told_[device.index].load(std::memory_order_acquire)) return cudaSuccess;
    const cudaError_t error = tell();
    if (keeps && error == cudaSuccess) told_[device.index].store(true, std::memory_order_release);
    return error;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<bool> told_[kDevices] = {};
};

}  // namespace unique_attn
