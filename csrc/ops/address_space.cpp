// Address space that grows in place, for unique_attn/memory.py: addresses and sizes are plain integers there.
#include "core/memory/address_space.h"

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <tuple>

#ifdef UNIQUE_ATTN_WITH_CUDA
#include <cuda_runtime.h>
#endif

namespace unique_attn {
namespace {

#ifdef UNIQUE_ATTN_WITH_CUDA

void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

std::tuple<int64_t, int64_t, int64_t> reserve_addresses_op(int64_t device, int64_t num_bytes) {
  int64_t address = 0, granularity = 1;  // address 0: there are not so many left
  const cudaError_t error = reserve_addresses(static_cast<int>(device), num_bytes, address, granularity);
  if (error != cudaErrorMemoryAllocation) check("reserve_addresses", error);
  return {address, num_bytes, granularity};
}

bool back_addresses_op(int64_t device, int64_t address, int64_t num_bytes) {
  const cudaError_t error = back_addresses(static_cast<int>(device), address, num_bytes);
  if (error == cudaErrorMemoryAllocation) return false;
  check("back_addresses", error);
  return true;
}

void unback_addresses_op(int64_t address, int64_t num_bytes) {
  check("unback_addresses", unback_addresses(address, num_bytes));
}

void free_addresses_op(int64_t address, int64_t num_bytes) {
  check("free_addresses", free_addresses(address, num_bytes));
}

#else

[[noreturn]] void absent() { throw std::runtime_error("address space: this build of unique_attn has no CUDA"); }

std::tuple<int64_t, int64_t, int64_t> reserve_addresses_op(int64_t, int64_t) { absent(); }
bool back_addresses_op(int64_t, int64_t, int64_t) { absent(); }
void unback_addresses_op(int64_t, int64_t) { absent(); }
void free_addresses_op(int64_t, int64_t) { absent(); }

#endif

}  // namespace
}  // namespace unique_attn

// Names with an underscore: no ops for users.
STABLE_TORCH_LIBRARY_FRAGMENT(unique_attn, m) {
  m.def("_reserve_addresses(int device, int num_bytes) -> (int, int, int)");
  m.def("_back_addresses(int device, int address, int num_bytes) -> bool");
  m.def("_unback_addresses(int address, int num_bytes) -> ()");
  m.def("_free_addresses(int address, int num_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(unique_attn, CompositeExplicitAutograd, m) {
  m.impl("_reserve_addresses", TORCH_BOX(&unique_attn::reserve_addresses_op));
  m.impl("_back_addresses", TORCH_BOX(&unique_attn::back_addresses_op));
  m.impl("_unback_addresses", TORCH_BOX(&unique_attn::unback_addresses_op));
  m.impl("_free_addresses", TORCH_BOX(&unique_attn::free_addresses_op));
}
