// What launches need to know of a device.
#pragma once

#include "core/cuda_fwd.h"

namespace unique_attn {

struct DeviceFacts {
  int index = 0;
  int multiprocessors = 1;
  bool runs_sm90 = false;          // kernels for sm_90a run there, and this build has them
  bool overlaps_launches = false;  // see launch.cuh
};

// Of a device, or of the current one; the runtime is asked once for each.
cudaError_t device_facts(DeviceFacts& facts, int device);
cudaError_t device_facts(DeviceFacts& facts);

}  // namespace unique_attn
