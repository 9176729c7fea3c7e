// Barriers in shared memory that count arrivals and bytes, rings of buffers behind them, and warpgroups with roles.
#pragma once

#include "core/cuda/async_copy.cuh"
#include "core/cuda/vec.cuh"

// Instructions of sm_90a; kernels have empty bodies elsewhere and are not launched there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define UA_HOPPER 1
#endif

namespace unique_attn {

constexpr int kWarpgroup = 128;

#ifdef UA_HOPPER

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// After the initializations, before other threads or the TMA use the barriers.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival for the whole warp: a buffer's readers are warps. compute-sanitizer's racecheck follows no lane that
// arrives for others and would report their reads, so all arrive in a build for it.
#ifdef UNIQUE_ATTN_RACECHECK
constexpr int kArrivals = kWarp;  // of a warp
#else
constexpr int kArrivals = 1;
#endif
__device__ __forceinline__ void barrier_init_warps(uint64_t* barrier, int warps) {
  barrier_init(barrier, warps * kArrivals);
}
__device__ __forceinline__ void barrier_arrive_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarp < kArrivals) barrier_arrive(barrier);
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A barrier among the threads of one warpgroup (or any `threads` threads with the same id, 1 to 15).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as these threads' share of such a barrier without waiting for it.
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Ordinary stores to shared memory become visible to wgmma and TMA; before a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The warpgroup of this thread, known to be the same for all threads of a warp: addresses that depend on it stay in
// uniform registers, where wgmma and TMA want them.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// Registers of a thread, from and to the pool of its thread block.
template <int kRegisters>
__device__ __forceinline__ void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif  // UA_HOPPER

}  // namespace unique_attn
