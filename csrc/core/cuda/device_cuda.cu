// The facts of each device, kept for the life of the process.
#include <cuda_runtime.h>

#include <map>
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

}  // namespace

cudaError_t device_facts(DeviceFacts& facts, int device) {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    facts = found->second;
    return cudaSuccess;
  }
  const cudaError_t error = ask(facts, device);
  if (error == cudaSuccess) known.emplace(device, facts);  // a failure is not remembered
  return error;
}

cudaError_t device_facts(DeviceFacts& facts) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? device_facts(facts, device) : error;
}

}  // namespace unique_attn
