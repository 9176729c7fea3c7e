// Launches whose start overlaps the end of the kernel before (programmatic dependent launch, Hopper): thread blocks may
// start while the other kernel's last ones run, and wait where they begin to use memory. docs/kernels.md has what a chain
// gains.
#pragma once

#include <cuda_runtime.h>

namespace unique_attn {

// First thing in a kernel that is launched by launch_dependent: everything before it in the stream is done and visible.
// Its own successor may be brought in from here on; it will wait in the same place.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether this build and this device overlap launches. Older drivers cannot capture such launches in a graph.
inline bool overlaps_launches() {
#ifdef UNIQUE_ATTN_SM90A
  int device = 0, major = 0, driver = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9 &&
         cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12040;
#else
  return false;
#endif
}

// Launches a kernel that begins with wait_for_previous_kernel().
template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                             Args... args) {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  if (overlaps_launches()) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace unique_attn
