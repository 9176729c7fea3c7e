// Functions in base 2, which the hardware has: logits and gates are scaled by log2(e) once.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace unique_attn {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Within one place of the last bit; subnormal numbers are 0.
__device__ __forceinline__ float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp2(x - m) where m is the maximum so far; -inf - (-inf) counts as "no weight".
__device__ __forceinline__ float softmax_weight(float x, float m) { return x == -INFINITY ? 0.f : exp2f(x - m); }

}  // namespace unique_attn
