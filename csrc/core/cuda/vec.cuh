// Numbers and vectors of the CUDA kernels: conversions, pairs in a word, 8 channels at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "core/dispatch.h"
#include "core/half.h"
#include "core/types.h"

#define UA_DISPATCH_CUDA_DTYPE(dtype, T, ...) UA_DISPATCH_DTYPE(dtype, T, float, __nv_bfloat16, __half, __VA_ARGS__)

namespace unique_attn {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

__device__ __forceinline__ constexpr float largest_number(__nv_bfloat16) { return largest_number(BF16()); }
__device__ __forceinline__ constexpr float largest_number(__half) { return largest_number(F16()); }

// Two 16-bit numbers in a word, the first in its lower half.
template <typename T>
__device__ __forceinline__ unsigned pack2(float low, float high) {
  __align__(4) T pair[2] = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<const unsigned*>(pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack2(unsigned pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

// 8 channels, the unit of every vector load: 16 bytes for 16-bit types, 32 for fp32. Kept raw until used, so that
// many loads can be in flight at once.
template <typename T>
struct Vec8;

template <>
struct Vec8<float> {
  float4 lo, hi;
  __device__ __forceinline__ void load(const float* p) {
    lo = *reinterpret_cast<const float4*>(p);
    hi = *reinterpret_cast<const float4*>(p + 4);
  }
  __device__ __forceinline__ void zero() { lo = hi = make_float4(0.f, 0.f, 0.f, 0.f); }
  __device__ __forceinline__ void unpack(float (&x)[8]) const {
    x[0] = lo.x, x[1] = lo.y, x[2] = lo.z, x[3] = lo.w, x[4] = hi.x, x[5] = hi.y, x[6] = hi.z, x[7] = hi.w;
  }
};

template <>
struct Vec8<__nv_bfloat16> {
  uint4 raw;
  __device__ __forceinline__ void load(const __nv_bfloat16* p) { raw = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void zero() { raw = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void unpack(float (&x)[8]) const {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a bf16 is the upper half of an fp32
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
};

template <>
struct Vec8<__half> {
  uint4 raw;
  __device__ __forceinline__ void load(const __half* p) { raw = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void zero() { raw = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void unpack(float (&x)[8]) const {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 pair = *reinterpret_cast<const __half2*>(&words[i]);
      x[2 * i] = __low2float(pair);
      x[2 * i + 1] = __high2float(pair);
    }
  }
};

template <typename T>
__device__ __forceinline__ void store8(T* p, const float (&x)[8]) {
  __align__(16) T packed[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) packed[i] = from_float<T>(x[i]);
  const uint4* words = reinterpret_cast<const uint4*>(packed);
#pragma unroll
  for (int i = 0; i < static_cast<int>(8 * sizeof(T) / 16); ++i) reinterpret_cast<uint4*>(p)[i] = words[i];
}

}  // namespace unique_attn
