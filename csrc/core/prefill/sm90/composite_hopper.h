// The Hopper kernel of composite_blocks.
#pragma once

#include "core/cuda/device.h"
#include "core/prefill/composite_blocks.h"

namespace unique_attn {

// Whether it can: 16-bit inputs of 64 or 128 channels on a Hopper GPU.
bool composite_on_hopper(const CompositeBlocksParams& params, const DeviceFacts& device);
// After composite_pages_cuda.
cudaError_t composite_blocks_hopper(const CompositeBlocksParams& params, const DeviceFacts& device,
                                    cudaStream_t stream);

}  // namespace unique_attn
