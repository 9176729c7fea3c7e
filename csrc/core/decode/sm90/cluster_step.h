// A decode step in one kernel, on Hopper: a cluster of thread blocks for each sequence and KV head.
#pragma once

#include "core/decode/decode_step.h"

namespace unique_attn {

// Thread blocks per row: as many as fill the device, a power of 2. Less than 2: rows fill it by themselves, and kernels
// that cut them by their lengths are faster.
int plan_cluster_size(int64_t rows, int multiprocessors);

// cudaErrorNotSupported, with nothing launched, for steps that are left to the three kernels.
cudaError_t cluster_step_cuda(const DecodeStepParams& params, cudaStream_t stream);

}  // namespace unique_attn
