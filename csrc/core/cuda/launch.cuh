// How kernels are launched: with overlap, and over any number of sequences.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "core/cuda/device.h"

namespace unique_attn {

// ---- Dependent launches ----
// Their start overlaps the end of the kernel before (programmatic dependent launch, Hopper): thread blocks may start
// while the other kernel's last ones run, and wait where they begin to use memory. docs/kernels.md has what a chain
// gains.

// First thing in a kernel that is launched by launch_dependent: everything before it in the stream is done and visible.
// Its own successor may be brought in from here on; it will wait in the same place.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches a kernel that waits for the one before it by itself, in clusters of thread blocks.
template <typename... Params, typename... Args>
cudaError_t launch_cluster(void (*kernel)(Params...), dim3 grid, int cluster, dim3 block, size_t shared_bytes,
                           cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  DeviceFacts facts;
  if (device_facts(facts) == cudaSuccess && facts.overlaps_launches) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Launches a kernel that begins with wait_for_previous_kernel().
template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                             Args... args) {
  return launch_cluster(kernel, grid, 1, block, shared_bytes, stream, args...);
}

// ---- Grids with a sequence of the packed batch for every z ----

// launch(first, count) for the sequences first .. first + count - 1, all of them in turn: a grid has no more than
// 65,535 thread blocks in z, and a packed batch may have more sequences.
template <typename Launch>
cudaError_t launch_sequences(int batch, const Launch& launch) {
  constexpr int kMostBlocks = 65535;
  for (int first = 0; first < batch; first += kMostBlocks) {
    launch(first, static_cast<unsigned>(batch - first < kMostBlocks ? batch - first : kMostBlocks));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// ---- Residency ----

// Thread blocks of a kernel that a multiprocessor of each device holds: a question to the runtime the first time.
class ResidentBlocks {
 public:
  template <typename Kernel>
  int get(const DeviceFacts& device, Kernel* kernel, int threads, size_t shared_bytes) {
    const bool keeps = device.index < kDevices;
    int blocks = keeps ? known_[device.index].load(std::memory_order_relaxed) : 0;
    if (blocks > 0) return blocks;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
    if (error != cudaSuccess || blocks < 1) return 1;
    if (keeps) known_[device.index].store(blocks, std::memory_order_relaxed);
    return blocks;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices] = {};
};

}  // namespace unique_attn
