// The Hopper kernel of block_sparse_attention.
#pragma once

#include "core/cuda/device.h"
#include "core/prefill/block_sparse.h"

namespace unique_attn {

// Whether it can: 16-bit inputs of 64, 128 or more channels, which are filled up to 256, in query blocks of 128, on a
// Hopper GPU; a paged cache in blocks of 16, 32 or a multiple of 64 tokens, and no memory that stands for more than one.
bool block_sparse_on_hopper(const BlockSparseParams& params, const DeviceFacts& device);
cudaError_t block_sparse_attention_hopper(const BlockSparseParams& params, const DeviceFacts& device,
                                          cudaStream_t stream);

}  // namespace unique_attn
