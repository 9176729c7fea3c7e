// Tiles of matrix products for the kernels of training and prefill. A warp owns 16 rows of an accumulator whose layout
// is that of mma.sync m16n8k16: lane l holds rows l/4 and l/4 + 8 and, of every 8 columns, columns 2 (l % 4) and the
// next. 16-bit types multiply on the tensor cores from shared memory; fp32 has no tensor cores of its own precision and
// takes fused multiply-adds in the same layout.
#pragma once

#include "core/cuda/async_copy.cuh"
#include "core/cuda/vec.cuh"

namespace unique_attn {

// Rows of a tile in shared memory are padded by 16 bytes, so that the 8 rows of a matrix fragment fall into
// different banks.
template <typename T>
UA_HD constexpr int tile_stride(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}

// Rows [0, num_rows) of `rows(r)` (a pointer to D channels, or null for zeros) into a tile of DP columns.
template <int DP, int kThreads, typename T, typename Rows>
__device__ __forceinline__ void load_tile(T* tile, int num_rows, int head_dim, const Rows& rows) {
  constexpr int kChannels = 16 / static_cast<int>(sizeof(T));
  constexpr int kChunks = DP / kChannels;
  for (int i = threadIdx.x; i < num_rows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int channel = i % kChunks * kChannels;
    const T* source = rows(row);
    const bool valid = source != nullptr && channel < head_dim;
    copy_async16(tile + row * tile_stride<T>(DP) + channel, valid ? source + channel : tile, valid);
  }
}

__device__ __forceinline__ void load_matrix4(unsigned (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)));
}
__device__ __forceinline__ void load_matrix4_transposed(unsigned (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)));
}

template <typename T>
__device__ __forceinline__ void mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void mma16816<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                        unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma16816<__half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The A fragment of rows [0, 16) and columns [k, k + 16) of a tile in shared memory.
template <typename T>
__device__ __forceinline__ void load_a(unsigned (&a)[4], const T* tile, int stride, int k) {
  const int lane = threadIdx.x % kWarp;
  load_matrix4(a, tile + (lane % 16) * stride + k + lane / 16 * 8);
}

// A fragment of 16-bit values, squared and rounded to bf16 (whose range holds the squares of fp16).
template <typename T>
__device__ __forceinline__ void square_to_bf16(unsigned (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T* x = reinterpret_cast<const T*>(&a[i]);
    const float lo = to_float(x[0]), hi = to_float(x[1]);
    a[i] = pack2<__nv_bfloat16>(lo * lo, hi * hi);
  }
}

// acc[16 x 8 NT] += A[16 x K] * B[8 NT x K]^T, both row-major tiles in shared memory. With `Square`, A is squared
// element by element first, and B is bf16 (fp32 for fp32).
template <int NT, bool Square, typename T, typename B>
__device__ __forceinline__ void multiply_rows(float (&acc)[NT][4], const T* a_tile, int a_stride, const B* b_tile,
                                              int b_stride, int depth) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 4) {
    const T* a0 = a_tile + lane / 4 * a_stride;
    const T* a1 = a0 + 8 * a_stride;
    for (int k = 0; k < depth; ++k) {
      const float x0 = Square ? a0[k] * a0[k] : a0[k];
      const float x1 = Square ? a1[k] * a1[k] : a1[k];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const B* b = b_tile + (n * 8 + lane % 4 * 2) * b_stride + k;
        const float y0 = b[0], y1 = b[b_stride];
        acc[n][0] += x0 * y0;
        acc[n][1] += x0 * y1;
        acc[n][2] += x1 * y0;
        acc[n][3] += x1 * y1;
      }
    }
  } else {
    for (int k = 0; k < depth; k += 16) {
      unsigned a[4];
      load_a(a, a_tile, a_stride, k);
      if constexpr (Square) square_to_bf16<T>(a);
      if constexpr (NT == 1) {
        const B* row = b_tile + (lane % 8) * b_stride + k + (lane / 8 % 2) * 8;
        unsigned b[4];
        load_matrix4(b, row);
        mma16816<B>(acc[0], a, b[0], b[1]);
      } else {
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
          // Matrices: columns n * 8 at k, at k + 8, columns (n + 1) * 8 at k, at k + 8.
          unsigned b[4];
          load_matrix4(b, b_tile + (n * 8 + lane / 16 * 8 + lane % 8) * b_stride + k + lane / 8 % 2 * 8);
          mma16816<B>(acc[n], a, b[0], b[1]);
          mma16816<B>(acc[n + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

template <int NT, typename T>
__device__ __forceinline__ void multiply_abt(float (&acc)[NT][4], const T* a_tile, int a_stride, const T* b_tile,
                                             int b_stride, int depth) {
  multiply_rows<NT, false>(acc, a_tile, a_stride, b_tile, b_stride, depth);
}

template <int NT, typename T, typename B>
__device__ __forceinline__ void multiply_squared_abt(float (&acc)[NT][4], const T* a_tile, int a_stride,
                                                     const B* b_tile, int b_stride, int depth) {
  multiply_rows<NT, true>(acc, a_tile, a_stride, b_tile, b_stride, depth);
}

// acc[16 x 8 NT] += P[16 x 8 KT] * B[8 KT x 8 NT], P in registers in accumulator layout (rounded to T for the product),
// B a row-major tile in shared memory. `scratch` (fp32 only): 16 x 8 KT floats of this warp. KT is even.
template <int NT, int KT, typename T>
__device__ __forceinline__ void multiply_pb(float (&acc)[NT][4], const float (&p)[KT][4], const T* b_tile, int b_stride,
                                            float* scratch) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 4) {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < KT; ++k) {
      float* at = scratch + lane / 4 * (KT * 8) + k * 8 + lane % 4 * 2;
      at[0] = p[k][0], at[1] = p[k][1];
      at[8 * KT * 8] = p[k][2], at[8 * KT * 8 + 1] = p[k][3];
    }
    __syncwarp();
    const float* p0 = scratch + lane / 4 * (KT * 8);
    const float* p1 = p0 + 8 * KT * 8;
    for (int k = 0; k < KT * 8; ++k) {
      const float x0 = p0[k], x1 = p1[k];
      const T* b = b_tile + k * b_stride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float y0 = b[n * 8], y1 = b[n * 8 + 1];
        acc[n][0] += x0 * y0;
        acc[n][1] += x0 * y1;
        acc[n][2] += x1 * y0;
        acc[n][3] += x1 * y1;
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < KT; k += 2) {
      const unsigned a[4] = {pack2<T>(p[k][0], p[k][1]), pack2<T>(p[k][2], p[k][3]), pack2<T>(p[k + 1][0], p[k + 1][1]),
                             pack2<T>(p[k + 1][2], p[k + 1][3])};
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        // Matrices: rows k * 8 and k * 8 + 8 of columns n * 8, then of columns (n + 1) * 8.
        unsigned b[4];
        load_matrix4_transposed(b, b_tile + (k * 8 + lane % 16) * b_stride + n * 8 + lane / 16 * 8);
        mma16816<T>(acc[n], a, b[0], b[1]);
        mma16816<T>(acc[n + 1], a, b[2], b[3]);
      }
    }
  }
}

}  // namespace unique_attn
