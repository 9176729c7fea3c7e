// What Hopper has that older GPUs lack: copies by the tensor memory accelerator (TMA), barriers in shared memory that
// count bytes, and warpgroup-wide matrix products (wgmma). Tiles are rows of 64 16-bit channels (128 bytes) in TMA's
// 128-byte swizzle; 128 channels are two such tiles one after the other.
#pragma once

#include <cuda.h>

#include "device_utils.cuh"

// Instructions of sm_90a; kernels have empty bodies elsewhere and are not launched there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define UA_HOPPER 1
#endif

namespace unique_attn {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 8;     // warps that read a buffer: two warpgroups
constexpr int kSwizzleRow = 128;  // bytes
constexpr int kTileChannels = 64;

#ifdef UA_HOPPER

__device__ __forceinline__ unsigned smem_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Bytes to the next multiple of 1024, on which swizzled tiles begin. To be added to the array: a pointer that went
// through an integer is no longer known to point to shared memory.
__device__ __forceinline__ unsigned shared_padding(const char* bytes) { return -smem_address(bytes) & 1023u; }

// ---- Barriers ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals));
}

// After the initializations, before other threads or the TMA use the barriers.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// One arrival for the whole warp: a buffer's readers are warps. compute-sanitizer's racecheck follows no lane that arrives
// for others and would report their reads, so all arrive in a build for it.
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
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(smem_address(barrier)),
      "r"(parity)
      : "memory");
}

// A barrier among the threads of one warpgroup (or any `threads` threads with the same id, 1 to 15).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Ordinary stores to shared memory become visible to wgmma and TMA; before a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Stage and parity of a ring of kStages buffers.
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
};

// ---- TMA ----

__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(smem_address(shared)),
      "l"(&map), "r"(smem_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// `channels` channels of rows that TMA's box holds, as tiles of 64 channels, `tile_bytes` apart.
template <int kChannels>
__device__ __forceinline__ void tma_load_tiles(char* shared, int tile_bytes, const CUtensorMap& map, uint64_t* barrier,
                                               int y, int z) {
#pragma unroll
  for (int i = 0; i < kChannels / kTileChannels; ++i) {
    tma_load(shared + i * tile_bytes, map, barrier, i * kTileChannels, y, z);
  }
}

// ---- Rows past the end of a sequence ----
// Copies take whole tiles. At the end of a sequence these hold rows of the next one, which a product that sums over rows
// weighs with 0; but 0 times NaN or infinity is NaN. So the readers of such a tile turn those rows into zeros first.

// Zeroes the rows [first, rows) of tiles `tile_bytes` apart, by kThreads threads. The swizzle stays within a row.
template <int kTiles, int kThreads>
__device__ __forceinline__ void zero_rows(char* tiles, int tile_bytes, int first, int rows, int thread) {
#pragma unroll 1
  for (int at = first * kSwizzleRow + thread * 16; at < rows * kSwizzleRow; at += kThreads * 16) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      *reinterpret_cast<uint4*>(tiles + tile * tile_bytes + at) = make_uint4(0u, 0u, 0u, 0u);
    }
  }
}

// After the last of them: products of all kThreads threads see the zeros.
template <int kThreads>
__device__ __forceinline__ void finish_zero_rows(int barrier) {
  fence_async_proxy();
  named_barrier(barrier, kThreads);
}

// The warpgroup of this thread, known to be the same for all threads of a warp: addresses that depend on it stay in
// uniform registers, where wgmma and TMA want them.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// ---- Registers ----

template <int kRegisters>
__device__ __forceinline__ void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Warpgroup products ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last kPending groups are done. Registers of theirs that are used next go through `pin`.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads or writes of these registers across this point.
template <typename R, int kCount>
__device__ __forceinline__ void pin(R (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(R) == 4 && std::is_same_v<R, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// Descriptor of a tile of swizzled rows. K-major (the product sums along a row): 8 rows are 1024 bytes. Otherwise
// (the product sums over rows, a row holds 64 outputs): `next` bytes lead to the tile with the next 64 outputs.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile, int next = 16) {
  const uint64_t address = smem_address(tile) >> 4;
  return address | static_cast<uint64_t>(next >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
constexpr int kStepAlongRow = 32 >> 4;        // descriptor units between k-steps of 16 channels
constexpr int kStepOverRows = 2 * 1024 >> 4;  // and between k-steps of 16 rows

// clang-format off
#define UA_REGISTERS32 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define UA_REGISTERS64 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define UA_OUT8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define UA_OUT32(d, i) UA_OUT8(d, i), UA_OUT8(d, i + 8), UA_OUT8(d, i + 16), UA_OUT8(d, i + 24)
// clang-format on

// %0.. accumulators, then A (descriptor or 4 registers), B's descriptor, accumulate, transposition of B.
#define UA_WGMMA_SHARED(shape, type, registers, a, b, accumulate, trans)                                             \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type \
  " " registers ", %" #a ", %" #b ", p, 1, 1, 0, %" #trans ";\n}\n"
#define UA_WGMMA_REGISTERS(shape, type, registers, a0, a1, a2, a3, b, accumulate, trans)                             \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type \
  " " registers ", {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1, %" #trans ";\n}\n"

// One k-step of 16: d[64 x N] (+)= A B. Accumulators have N / 2 registers: thread t of the warpgroup holds rows
// 16 (t / 32) + t % 32 / 4 (registers 4 n, 4 n + 1) and 8 further (4 n + 2, 4 n + 3), columns 8 n + 2 (t % 4) and the
// next. kOverRows: B's tile has the summed dimension in rows.
template <typename T, bool kOverRows>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(UA_WGMMA_SHARED("m64n64k16", "f16", UA_REGISTERS32, 32, 33, 34, 35)
                 : UA_OUT32(d, 0)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kOverRows)));
  } else {
    asm volatile(UA_WGMMA_SHARED("m64n64k16", "bf16", UA_REGISTERS32, 32, 33, 34, 35)
                 : UA_OUT32(d, 0)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kOverRows)));
  }
}
template <typename T, bool kOverRows>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(UA_WGMMA_SHARED("m64n128k16", "f16", UA_REGISTERS64, 64, 65, 66, 67)
                 : UA_OUT32(d, 0), UA_OUT32(d, 32)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kOverRows)));
  } else {
    asm volatile(UA_WGMMA_SHARED("m64n128k16", "bf16", UA_REGISTERS64, 64, 65, 66, 67)
                 : UA_OUT32(d, 0), UA_OUT32(d, 32)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kOverRows)));
  }
}
template <typename T, bool kOverRows>
__device__ __forceinline__ void wgmma(float (&d)[32], const unsigned* a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(UA_WGMMA_REGISTERS("m64n64k16", "f16", UA_REGISTERS32, 32, 33, 34, 35, 36, 37, 38)
                 : UA_OUT32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kOverRows)));
  } else {
    asm volatile(UA_WGMMA_REGISTERS("m64n64k16", "bf16", UA_REGISTERS32, 32, 33, 34, 35, 36, 37, 38)
                 : UA_OUT32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kOverRows)));
  }
}
template <typename T, bool kOverRows>
__device__ __forceinline__ void wgmma(float (&d)[64], const unsigned* a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(UA_WGMMA_REGISTERS("m64n128k16", "f16", UA_REGISTERS64, 64, 65, 66, 67, 68, 69, 70)
                 : UA_OUT32(d, 0), UA_OUT32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kOverRows)));
  } else {
    asm volatile(UA_WGMMA_REGISTERS("m64n128k16", "bf16", UA_REGISTERS64, 64, 65, 66, 67, 68, 69, 70)
                 : UA_OUT32(d, 0), UA_OUT32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kOverRows)));
  }
}

// d = A B^T over D channels: `a` is 64 rows, `b` is N rows; tiles of 64 channels lie a_next and b_next bytes apart.
template <typename T, int D, int kRegisters>
__device__ __forceinline__ void product_abt(float (&d)[kRegisters], const char* a, int a_next, const char* b,
                                            int b_next) {
#pragma unroll
  for (int tile = 0; tile < D / kTileChannels; ++tile) {
    const uint64_t a_tile = tile_descriptor(a + tile * a_next);
    const uint64_t b_tile = tile_descriptor(b + tile * b_next);
#pragma unroll
    for (int step = 0; step < kTileChannels / 16; ++step) {
      wgmma<T, false>(d, a_tile + step * kStepAlongRow, b_tile + step * kStepAlongRow, tile + step > 0);
    }
  }
}

// The same with A in registers, 4 for each 16 channels.
template <typename T, int D, int kRegisters>
__device__ __forceinline__ void product_abt(float (&d)[kRegisters], const unsigned (&a)[D / 4], const char* b,
                                            int b_next) {
#pragma unroll
  for (int tile = 0; tile < D / kTileChannels; ++tile) {
    const uint64_t b_tile = tile_descriptor(b + tile * b_next);
#pragma unroll
    for (int step = 0; step < kTileChannels / 16; ++step) {
      wgmma<T, false>(d, a + (tile * kTileChannels / 16 + step) * 4, b_tile + step * kStepAlongRow, tile + step > 0);
    }
  }
}

// d += A B over 16 * kSteps rows of `b`: A in registers, 4 for each 16 rows; `b` holds rows of D outputs.
template <typename T, int kSteps, int kRegisters, int kA>
__device__ __forceinline__ void product_ab(float (&d)[kRegisters], const unsigned (&a)[kA], const char* b, int b_next) {
  static_assert(kA >= kSteps * 4);
  const uint64_t b_tile = tile_descriptor(b, b_next);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma<T, true>(d, a + step * 4, b_tile + step * kStepOverRows, true);
  }
}

// ---- Accumulators as operands ----

template <typename T>
__device__ __forceinline__ unsigned pack2(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack2(unsigned pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

// Accumulators [64 x N] in registers are, rounded, the operand A of a product over their N columns.
template <typename T, int kRegisters>
__device__ __forceinline__ void pack_operand(unsigned (&a)[kRegisters / 2], const float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters / 2; ++i) a[i] = pack2<T>(d[2 * i], d[2 * i + 1]);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif  // UA_HOPPER

}  // namespace unique_attn
