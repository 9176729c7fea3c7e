// 16-bit floating-point types of the CPU code and of the index format, and their scalar conversions: round to nearest
// even, NaN stays NaN. A GPU has instructions for fp16.
#pragma once

#include <cstdint>

#ifdef __CUDA_ARCH__
#include <cuda_fp16.h>
#endif

#include "core/types.h"

namespace unique_attn {

struct BF16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

UA_HD uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

UA_HD float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

UA_HD float to_scalar(float x) { return x; }
UA_HD double to_scalar(double x) { return x; }
UA_HD float to_scalar(BF16 x) { return bits_float(uint32_t{x.bits} << 16); }
UA_HD float to_scalar(F16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_float(sign | (magnitude + (224u << 23)));  // inf and NaN
  if (magnitude >= 0x00800000u) return bits_float(sign | (magnitude + (112u << 23)));
  // Subnormal: its bits are the fraction of a number in [2^-14, 2^-13).
  const float value = bits_float(magnitude + (113u << 23)) - bits_float(113u << 23);
  return bits_float(sign | float_bits(value));
#endif
}

// The largest finite number of a stored type.
UA_HD constexpr float largest_number(F16) { return 65504.f; }
UA_HD constexpr float largest_number(BF16) { return 0x1.fep127f; }
UA_HD constexpr float largest_number(float) { return 0x1.fffffep127f; }
UA_HD constexpr double largest_number(double) { return 0x1.fffffffffffffp1023; }

UA_HD void from_scalar(float x, float& y) { y = x; }
UA_HD void from_scalar(double x, double& y) { y = x; }
UA_HD void from_scalar(float x, BF16& y) {
  const uint32_t bits = float_bits(x);
  // The rounding carry could turn a NaN into inf, or into -0.
  y.bits = x != x ? uint16_t(bits >> 16 | 0x40u) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
UA_HD void from_scalar(float x, F16& y) {
#ifdef __CUDA_ARCH__
  y.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    magnitude = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to inf
    magnitude = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves 2^-24 units in the low bits, rounded
    magnitude = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    magnitude = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  y.bits = uint16_t(sign | magnitude);
#endif
}

}  // namespace unique_attn
