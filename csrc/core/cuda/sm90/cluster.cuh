// Thread blocks of a cluster: their barrier, and each other's shared memory.
#pragma once

#include "core/cuda/sm90/barrier.cuh"

namespace unique_attn {

constexpr int kMaxCluster = 16;  // thread blocks; more than 8 must be allowed for a kernel

#ifdef UA_HOPPER

__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// All threads of the cluster take part. What was written before, to any of its shared memory, is seen after.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where a thread block of the cluster has what this one has at p, in shared memory.
template <typename T>
__device__ __forceinline__ T* in_block(T* p, int rank) {
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
}

#endif  // UA_HOPPER

}  // namespace unique_attn
