// Scores as they are ordered: the type that they are rounded to, and their order keys, unsigned integers that order as
// scores do. cpu/order_key.h is the same for the CPU, with signed integers, which its vectors compare faster.
#pragma once

#include "core/cuda/vec.cuh"

namespace unique_attn {

// The score type of inputs of type T.
template <typename T>
using ScoreOf = std::conditional_t<sizeof(T) == 4, float, __nv_bfloat16>;

// Larger score, larger key. -0 counts as +0, NaN is the smallest key of all.
__device__ __forceinline__ unsigned order_key(__nv_bfloat16 x) {
  unsigned bits = __bfloat16_as_ushort(x);
  if ((bits & 0x7fffu) > 0x7f80u) return 0u;
  if (bits == 0x8000u) bits = 0u;
  return bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
}

__device__ __forceinline__ unsigned order_key(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0u;
  if (bits == 0x80000000u) bits = 0u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The score of a key; that of a NaN is -inf.
template <typename Score>
__device__ __forceinline__ float key_score(unsigned key);
template <>
__device__ __forceinline__ float key_score<__nv_bfloat16>(unsigned key) {
  if (key == 0u) return -INFINITY;
  const unsigned bits = key & 0x8000u ? key & 0x7fffu : ~key & 0xffffu;
  return __uint_as_float(bits << 16);
}
template <>
__device__ __forceinline__ float key_score<float>(unsigned key) {
  if (key == 0u) return -INFINITY;
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Order key of -inf, the least of all numbers.
template <typename Score>
constexpr unsigned kLowestKey = sizeof(Score) == 2 ? 0x007fu : 0x007fffffu;

}  // namespace unique_attn
