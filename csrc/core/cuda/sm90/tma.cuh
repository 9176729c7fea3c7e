// Copies by the tensor memory accelerator (TMA). Tiles are rows of 64 16-bit channels (128 bytes) in its 128-byte
// swizzle; 128 channels are two such tiles one after the other.
#pragma once

#include <cuda.h>

#include "core/cuda/sm90/barrier.cuh"

namespace unique_attn {

constexpr int kSwizzleRow = 128;  // bytes
constexpr int kTileChannels = 64;

// A tensor [z, y, x] or [w, z, y, x] with unit stride in x, and the box of it that one copy takes.
struct TensorBox {
  const void* data;
  int element_bytes;  // 1, 2
  int64_t size[4];    // x, y, z, w; w 0: there is none
  int64_t stride[3];  // of y, z and w, in bytes, multiples of 16 and not 0
  int box[4];
  bool swizzle;  // 128 bytes; else none
};
cudaError_t encode_tensor_map(CUtensorMap& map, const TensorBox& box);

#ifdef UA_HOPPER

// Bytes to the next multiple of 1024, on which swizzled tiles begin. To be added to the array: a pointer that went
// through an integer is no longer known to point to shared memory.
__device__ __forceinline__ unsigned shared_padding(const char* bytes) { return -shared_address(bytes) & 1023u; }

__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, uint64_t* barrier, int x, int y, int z,
                                         int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// `channels` channels of rows that TMA's box holds, as tiles of 64 channels, `tile_bytes` apart. What lies outside the
// tensor is zeros.
template <int kChannels, typename... At>
__device__ __forceinline__ void tma_load_tiles(char* shared, int tile_bytes, const CUtensorMap& map, uint64_t* barrier,
                                               At... at) {
#pragma unroll
  for (int i = 0; i < kChannels / kTileChannels; ++i) {
    tma_load(shared + i * tile_bytes, map, barrier, i * kTileChannels, at...);
  }
}

// ---- Rows past the end of a sequence ----
// Copies take whole tiles. At the end of a sequence these hold rows of the next one, which a product that sums over
// rows weighs with 0; but 0 times NaN or infinity is NaN. So the readers of such a tile turn those rows into zeros
// first.

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

// Zeroes the rows [first, rows) of the kTiles tiles of every stage of a ring: those that no copy fills.
template <int kStages, int kTiles, int kThreads>
__device__ __forceinline__ void zero_unused_rows(char* tiles, int tile_bytes, int first, int rows) {
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    zero_rows<kTiles, kThreads>(tiles + stage * kTiles * tile_bytes, tile_bytes, first, rows, threadIdx.x);
  }
}

// After the last of them: products of all kThreads threads see the zeros.
template <int kThreads>
__device__ __forceinline__ void finish_zero_rows(int barrier) {
  fence_async_proxy();
  named_barrier(barrier, kThreads);
}

#endif  // UA_HOPPER

}  // namespace unique_attn
