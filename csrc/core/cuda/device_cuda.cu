// The facts of each device, kept for the life of the process.
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

#include "core/cuda/device.h"

namespace unique_attn {
namespace {

cudaError_t ask(DeviceFacts& facts, int device) {
  int major = 0, minor = 0, driver = 0;
  facts.index = device;
  cudaError_t error = cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
#ifdef UNIQUE_ATTN_SM90A
  facts.runs_sm90 = major == 9 && minor == 0;
  facts.overlaps_launches = major == 9 && driver >= 12040;  // older drivers cannot capture such launches in a graph
#endif
  return error;
}

// Every launch asks: what is known is read without a lock.
constexpr int kDevices = 64;
struct Known {
  std::atomic<bool> ready{false};
  DeviceFacts facts;
};
Known known[kDevices];
std::mutex mutex;  // of what is not yet known

}  // namespace

cudaError_t device_facts(DeviceFacts& facts, int device) {
  if (device < 0 || device >= kDevices) return ask(facts, device);
  Known& entry = known[device];
  if (!entry.ready.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!entry.ready.load(std::memory_order_relaxed)) {
      const cudaError_t error = ask(facts, device);
      if (error != cudaSuccess) return error;  // and is not remembered
      entry.facts = facts;
      entry.ready.store(true, std::memory_order_release);
    }
  }
  facts = entry.facts;
  return cudaSuccess;
}

cudaError_t device_facts(DeviceFacts& facts) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? device_facts(facts, device) : error;
}

}  // namespace unique_attn
