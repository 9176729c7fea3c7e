// Address space of a CUDA device that memory is put behind piece by piece: tensors in it grow without moving.
#pragma once

#include <cstdint>

#include "core/cuda_fwd.h"

namespace unique_attn {

// Sizes and addresses are multiples of the granularity that `reserve_addresses` tells; it rounds `num_bytes` up.
cudaError_t reserve_addresses(int device, int64_t& num_bytes, int64_t& address, int64_t& granularity);

// Puts memory of the device behind [address, address + num_bytes); cudaErrorMemoryAllocation if it has none left.
cudaError_t back_addresses(int device, int64_t address, int64_t num_bytes);

// Gives that memory back. Nothing may be using it any more.
cudaError_t unback_addresses(int64_t address, int64_t num_bytes);

// Gives the addresses back, behind which there is no memory.
cudaError_t free_addresses(int64_t address, int64_t num_bytes);

}  // namespace unique_attn
