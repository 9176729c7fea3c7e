// The frame of a Hopper kernel with roles: the last warpgroup copies by TMA into rings of buffers, the others multiply
// what is there. A kernel is its two loops:
//
//   auto& shared = shared_storage<Shared>(shared_bytes);
//   const int warpgroup = enter_roles<Roles>([&] { shared.ring.init(readers); }, [&] { ... });
//   if (Roles::copies(warpgroup)) {
//     if (Roles::one_copies()) for (Ring<kStages> ring; ...; ring.advance()) {
//       uint64_t* full = ring.acquire(shared.ring, bytes);   // waits for the readers
//       tma_load(..., full, ...);
//     }
//     return;
//   }
//   for (Ring<kStages> ring; ...; ring.advance()) {
//     ring.wait(shared.ring);                                // for the copies
//     ... products of shared.x[ring.stage] ...
//     shared.ring.release(stage);                            // a warp has read it
//   }
#pragma once

#include "core/cuda/sm90/wgmma.cuh"

namespace unique_attn {

// Warpgroups that multiply and one that copies, with the registers that a thread of each has.
template <int kMultiplyingT, int kCopyRegistersT, int kRegistersT>
struct WarpRoles {
  static constexpr int kMultiplying = kMultiplyingT;
  static constexpr int kCopyRegisters = kCopyRegistersT;
  static constexpr int kRegisters = kRegistersT;
  static constexpr int kThreads = (kMultiplying + 1) * kWarpgroup;
  static constexpr int kReaders = kMultiplying * kWarpgroup / kWarp;  // warps
  static_assert(kWarpgroup * (kMultiplying * kRegisters + kCopyRegisters) <= 65536, "a multiprocessor's registers");

  static __device__ __forceinline__ bool copies(int warpgroup) { return warpgroup == kMultiplying; }
  static __device__ __forceinline__ bool one_copies() { return threadIdx.x == kMultiplying * kWarpgroup; }
};

// Bytes of shared memory for a kernel's Shared, which begins on 1024 as swizzled tiles do.
template <typename Shared>
constexpr int kSharedBytes = sizeof(Shared) + 1024;

// Barriers of a ring of buffers, in shared memory: a stage is full when its copies have landed, and empty when its
// readers have read it.
template <int kStages>
struct StageBarriers {
  uint64_t full[kStages], empty[kStages];

#ifdef UA_HOPPER
  // `readers` warps release a stage; `writers` threads arrive for it, one of them with the copies' bytes.
  __device__ __forceinline__ void init(int readers, int writers = 1) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], writers);
      barrier_init_warps(&empty[i], readers);
    }
  }
  __device__ __forceinline__ void release(int stage) { barrier_arrive_warp(&empty[stage]); }
#endif
};

#ifdef UA_HOPPER

template <typename Shared>
__device__ __forceinline__ Shared& shared_storage(char* shared_bytes) {
  return *reinterpret_cast<Shared*>(shared_bytes + shared_padding(shared_bytes));
}

// A place in a ring of buffers, of one that writes or one that reads.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // The stage is free.
  __device__ __forceinline__ void wait_free(StageBarriers<kStages>& barriers) const {
    barrier_wait(&barriers.empty[stage], parity ^ 1);
  }
  // The same, and `bytes` bytes will come; returns the barrier to copy by.
  __device__ __forceinline__ uint64_t* acquire(StageBarriers<kStages>& barriers, int bytes) const {
    wait_free(barriers);
    barrier_expect(&barriers.full[stage], bytes);
    return &barriers.full[stage];
  }
  // What was copied is there.
  __device__ __forceinline__ void wait(StageBarriers<kStages>& barriers) const {
    barrier_wait(&barriers.full[stage], parity);
  }
};

// Sets up barriers (by one thread) and shared memory (`prepare`, by all threads: what no copy fills), then splits the
// block into roles. Returns the warpgroup; the branch on Roles::copies must follow at once, or the compiler has one number
// of registers for what both roles run and ignores that they differ.
template <typename Roles, typename Barriers, typename Prepare>
__device__ __forceinline__ int enter_roles(const Barriers& barriers, const Prepare& prepare) {
  const int warpgroup = warpgroup_index();
  if (threadIdx.x == 0) {
    barriers();
    barrier_init_fence();
  }
  prepare();
  __syncthreads();
  if (Roles::copies(warpgroup)) {
    registers_give<Roles::kCopyRegisters>();
  } else {
    registers_take<Roles::kRegisters>();
  }
  return warpgroup;
}
template <typename Roles, typename Barriers>
__device__ __forceinline__ int enter_roles(const Barriers& barriers) {
  return enter_roles<Roles>(barriers, [] {});
}

// Two multiplying warpgroups that issue their products in turns, so that one multiplies while the other computes. Left
// alone, they alternate or fall into step as the machine code happens to be. kBarrier and the next are the named
// barriers of the two.
template <int kBarrier>
struct Turns {
  int warpgroup;
  __device__ __forceinline__ explicit Turns(int warpgroup) : warpgroup(warpgroup) {
    if (warpgroup == 1) pass();  // the first warpgroup begins
  }
  __device__ __forceinline__ void wait() const { named_barrier(kBarrier + warpgroup, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass() const { named_arrive(kBarrier + 1 - warpgroup, 2 * kWarpgroup); }
};

#endif  // UA_HOPPER

}  // namespace unique_attn
