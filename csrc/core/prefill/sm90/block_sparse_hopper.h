// The prefill kernel for Hopper (wgmma, TMA).
#pragma once

#include "core/cuda/device.h"
#include "core/prefill/block_sparse.h"

namespace unique_attn {

// Whether the kernel runs there, and for these shapes. Strides are multiples of 16 bytes, as the ops require.
bool block_sparse_on_hopper(const BlockSparseParams& params, const DeviceFacts& device);

cudaError_t block_sparse_attention_hopper(const BlockSparseParams& params, cudaStream_t stream);

}  // namespace unique_attn
