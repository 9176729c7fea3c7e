// Matrix products of a warpgroup (wgmma) over tiles as tma.cuh describes them.
#pragma once

#include "core/cuda/sm90/tma.cuh"

namespace unique_attn {

#ifdef UA_HOPPER

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

// Keeps registers that a product in flight reads from being given to anything else before this point: ptxas (13.0) has
// been seen to reuse an operand while a product read it. `never` is a condition that the compiler takes for possible.
template <int kCount>
__device__ __forceinline__ void keep_operand(const unsigned (&operand)[kCount], bool never, void* shared) {
  if (never) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) static_cast<volatile unsigned*>(shared)[i] = operand[i];
  }
}

// Descriptor of a tile of swizzled rows. K-major (the product sums along a row): 8 rows are 1024 bytes. Otherwise
// (the product sums over rows, a row holds 64 outputs): `next` bytes lead to the tile with the next 64 outputs.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile, int next = 16) {
  const uint64_t address = shared_address(tile) >> 4;
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

// Accumulators [64 x N] in registers are, rounded, the operand A of a product over their N columns.
template <typename T, int kRegisters>
__device__ __forceinline__ void pack_operand(unsigned (&a)[kRegisters / 2], const float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters / 2; ++i) a[i] = pack2<T>(d[2 * i], d[2 * i + 1]);
}

// A pair of an operand, squared and rounded to bf16, whose range holds the squares of fp16.
template <typename T>
__device__ __forceinline__ unsigned square2(unsigned pair) {
  const float2 x = unpack2<T>(pair);
  return pack2<__nv_bfloat16>(x.x * x.x, x.y * x.y);
}

#endif  // UA_HOPPER

}  // namespace unique_attn
