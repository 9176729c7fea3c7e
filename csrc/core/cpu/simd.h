// Vectors of accumulators: one register of the instruction set that this source is being compiled for.
//
// Every *_cpu.cpp is compiled once per instruction set (macro UA_ISA), and isa.cpp picks one at run time. So
// that code made for AVX-512 never serves a machine without it, everything here is in namespace UA_ISA and always
// inlined, and the sources keep their own functions in anonymous namespaces: no object shares a symbol with another.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/half.h"

#ifndef UA_ISA
#define UA_ISA baseline
#endif

#define UA_INLINE inline __attribute__((always_inline))

#if defined(__clang__)
#pragma clang fp contract(fast)  // GCC's default: a * b + c may become one fused operation
#define UA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define UA_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define UA_SHUFFLE(Bits, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UA_SHUFFLE(Bits, a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

namespace unique_attn {
namespace UA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
constexpr __mmask16 kAllLanes = 0xffff;  // GCC's unmasked intrinsics warn of uninitialized values
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif
#endif

// The accumulator type of a stored type, and the integers of an accumulator's width.
template <typename T>
struct TypeInfo {
  using Acc = float;
};
template <>
struct TypeInfo<float> {
  using Acc = float;
  using Bits = int32_t;
};
template <>
struct TypeInfo<double> {
  using Acc = double;
  using Bits = int64_t;
};
template <typename T>
using AccOf = typename TypeInfo<T>::Acc;

// The score type of inputs of type T: what scores are rounded to and ordered by.
template <typename T>
using ScoreOf = std::conditional_t<sizeof(T) == 2, BF16, T>;

template <typename Scalar, int kBytes>
struct RawVector {
  typedef Scalar Type __attribute__((vector_size(kBytes)));
};

template <typename Acc>
struct Vec {
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));
  using Raw = typename RawVector<Acc, kVectorBytes>::Type;
  using Bits = typename RawVector<typename TypeInfo<Acc>::Bits, kVectorBytes>::Type;
  Raw v;

  Vec() = default;
  UA_INLINE explicit Vec(Raw raw) : v(raw) {}
  UA_INLINE explicit Vec(Acc x) : v(x - Raw{}) {}
};

template <typename Acc>
UA_INLINE Vec<Acc> operator+(Vec<Acc> a, Vec<Acc> b) {
  return Vec<Acc>(a.v + b.v);
}
template <typename Acc>
UA_INLINE Vec<Acc> operator-(Vec<Acc> a, Vec<Acc> b) {
  return Vec<Acc>(a.v - b.v);
}
template <typename Acc>
UA_INLINE Vec<Acc> operator*(Vec<Acc> a, Vec<Acc> b) {
  return Vec<Acc>(a.v * b.v);
}
template <typename Acc>
UA_INLINE Vec<Acc> operator/(Vec<Acc> a, Vec<Acc> b) {
  return Vec<Acc>(a.v / b.v);
}
template <typename Acc>
UA_INLINE void operator+=(Vec<Acc>& a, Vec<Acc> b) {
  a.v += b.v;
}
// A comparison has all bits of a lane set where it holds.
template <typename Acc>
UA_INLINE auto operator>(Vec<Acc> a, Vec<Acc> b) {
  return a.v > b.v;
}
template <typename Acc>
UA_INLINE auto is_nan(Vec<Acc> a) {
  return a.v != a.v;
}
template <typename Mask, typename Acc>
UA_INLINE Vec<Acc> select(Mask mask, Vec<Acc> a, Vec<Acc> b) {
  return Vec<Acc>(mask ? a.v : b.v);
}

// max that ignores a NaN in x, and max that keeps one in either.
template <typename Acc>
UA_INLINE Vec<Acc> max_number(Vec<Acc> m, Vec<Acc> x) {
  return select(x > m, x, m);
}
template <typename Acc>
UA_INLINE Vec<Acc> max_or_nan(Vec<Acc> m, Vec<Acc> x) {
  return select((x > m) | is_nan(x), x, m);
}
template <typename Acc>
UA_INLINE Vec<Acc> min_or_nan(Vec<Acc> m, Vec<Acc> x) {
  return select((m > x) | is_nan(x), x, m);
}

UA_INLINE Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__)
  return Vec<float>(Vec<float>::Raw(_mm512_maskz_sqrt_ps(kAllLanes, __m512(x.v))));
#elif defined(__AVX2__)
  return Vec<float>(Vec<float>::Raw(_mm256_sqrt_ps(__m256(x.v))));
#elif defined(__x86_64__)
  return Vec<float>(Vec<float>::Raw(_mm_sqrt_ps(__m128(x.v))));
#else
  for (int i = 0; i < Vec<float>::kLanes; ++i) x.v[i] = __builtin_sqrtf(x.v[i]);
  return x;
#endif
}
UA_INLINE Vec<double> sqrt(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = __builtin_sqrt(x.v[i]);
  return x;
}

// exp for x <= 0 (-inf included) or NaN: all that a softmax needs. Below -87 the result is 0.
UA_INLINE Vec<float> exp_negative(Vec<float> x) {
  using V = Vec<float>;
  // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits.
  const V magic(12582912.f);
  const V shifted = x * V(1.44269504088896341f) + magic;
  const V n = shifted - magic;
  V r = x - n * V(0.693359375f);
  r = r - n * V(-2.12194440e-4f);
  // The polynomial of Cephes' expf.
  V p = V(1.9875691500e-4f) * r + V(1.3981999507e-3f);
  p = p * r + V(8.3334519073e-3f);
  p = p * r + V(4.1665795894e-2f);
  p = p * r + V(1.6666665459e-1f);
  p = p * r + V(5.0000001201e-1f);
  p = p * (r * r) + r + V(1.f);
  // 2^n. A NaN makes this factor arbitrary, but p is NaN then and stays it.
  const V::Bits exponent = ((V::Bits)shifted.v - (V::Bits)magic.v + 127) << 23;
  return select(V(-87.f) > x, V(0.f), p * V((V::Raw)exponent));
}
UA_INLINE Vec<double> exp_negative(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = __builtin_exp(x.v[i]);
  return x;
}

// ---- Memory. Head dims are multiples of 8, so a row is full vectors and, where a vector holds 16, maybe a half. ----

struct Full {};
struct Half {};

// f(channel, Full or Half) for the vectors that cover `head_dim` channels.
template <typename Acc, typename F>
UA_INLINE void each_vector(int head_dim, const F& f) {
  constexpr int kLanes = Vec<Acc>::kLanes;
  const int full = head_dim / kLanes * kLanes;
  for (int d = 0; d < full; d += kLanes) f(d, Full());
  if constexpr (kLanes > 8) {
    if (full < head_dim) f(full, Half());
  }
}

template <typename Raw>
UA_INLINE Raw load_raw(const void* p) {
  Raw raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return raw;
}
template <typename Raw>
UA_INLINE void store_raw(void* p, Raw raw) {
  __builtin_memcpy(p, &raw, sizeof(raw));
}

using Raw16 = RawVector<uint16_t, kVectorBytes / 2>::Type;  // 16-bit numbers of one float vector
using Raw32 = RawVector<uint32_t, kVectorBytes>::Type;

// Zero extension; __builtin_convertvector takes three times the instructions in GCC 12.
UA_INLINE Raw32 extend(Raw16 x) {
#if defined(__AVX512F__)
  return Raw32(_mm512_maskz_cvtepu16_epi32(kAllLanes, __m256i(x)));
#elif defined(__AVX2__)
  return Raw32(_mm256_cvtepu16_epi32(__m128i(x)));
#elif defined(__SSE2__)
  return Raw32(_mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&x)), _mm_setzero_si128()));
#else
  return __builtin_convertvector(x, Raw32);
#endif
}

UA_INLINE Vec<float> widen(Raw16 x, BF16) { return Vec<float>((Vec<float>::Raw)(extend(x) << 16)); }

UA_INLINE Vec<float> widen(Raw16 x, F16) {
#if defined(__AVX512F__)
  return Vec<float>(Vec<float>::Raw(_mm512_maskz_cvtph_ps(kAllLanes, __m256i(x))));
#elif defined(__F16C__) && defined(__AVX2__)
  return Vec<float>(Vec<float>::Raw(_mm256_cvtph_ps(__m128i(x))));
#elif defined(__aarch64__)
  return Vec<float>(Vec<float>::Raw(vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)x))));
#else  // as to_scalar(F16)
  using V = Vec<float>;
  const Raw32 bits = extend(x);
  const Raw32 magnitude = (bits & 0x7fffu) << 13;
  const V small = V((V::Raw)(magnitude + (113u << 23))) - V((V::Raw)(Raw32{} + (113u << 23)));
  Raw32 result = magnitude + (112u << 23);
  result = magnitude >= 0x0f800000u ? magnitude + (224u << 23) : result;
  result = magnitude < 0x00800000u ? (Raw32)small.v : result;
  return V((V::Raw)(result | (bits & 0x8000u) << 16));
#endif
}

template <typename Acc>
UA_INLINE Vec<Acc> load(const Acc* p, Full) {
  return Vec<Acc>(load_raw<typename Vec<Acc>::Raw>(p));
}
UA_INLINE Vec<float> load(const BF16* p, Full) { return widen(load_raw<Raw16>(p), BF16()); }
UA_INLINE Vec<float> load(const F16* p, Full) { return widen(load_raw<Raw16>(p), F16()); }

#if defined(__AVX512F__)
UA_INLINE Vec<float> load(const float* p, Half) { return Vec<float>(Vec<float>::Raw(_mm512_maskz_loadu_ps(0xff, p))); }
template <typename T>
UA_INLINE Vec<float> load(const T* p, Half) {
  return widen(Raw16(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))), T());
}
#endif

UA_INLINE Raw16 narrow(Vec<float> x, BF16) {  // as from_scalar
  const Raw32 bits = (Raw32)x.v;
  const Raw32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector(is_nan(x) ? (bits >> 16 | 0x40u) : rounded, Raw16);
}

UA_INLINE Raw16 narrow(Vec<float> x, F16) {
#if defined(__AVX512F__)
  return Raw16(_mm512_maskz_cvtps_ph(kAllLanes, __m512(x.v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  return Raw16(_mm256_cvtps_ph(__m256(x.v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  return Raw16(vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x.v)));
#else
  Raw16 raw;
  for (int i = 0; i < Vec<float>::kLanes; ++i) {
    F16 half;
    from_scalar(x.v[i], half);
    raw[i] = half.bits;
  }
  return raw;
#endif
}

template <typename Acc>
UA_INLINE void store(Acc* p, Vec<Acc> x, Full) {
  store_raw(p, x.v);
}
UA_INLINE void store(BF16* p, Vec<float> x, Full) { store_raw(p, narrow(x, BF16())); }
UA_INLINE void store(F16* p, Vec<float> x, Full) { store_raw(p, narrow(x, F16())); }
template <typename T>
UA_INLINE void store(T* p, Vec<float> x, Half) {
  T buffer[Vec<float>::kLanes];
  store(buffer, x, Full());
  __builtin_memcpy(p, buffer, 8 * sizeof(T));
}

// ---- Sums over lanes, in an order that is fixed for an instruction set. ----

// Lanes in groups of W: the even groups of a and b added to the odd ones, a's and b's results alternating.
template <int W, typename Acc, int... I>
UA_INLINE Vec<Acc> merge(Vec<Acc> a, Vec<Acc> b, std::integer_sequence<int, I...>) {
  using Bits [[maybe_unused]] = typename Vec<Acc>::Bits;
  constexpr int kLanes = sizeof...(I);
  return Vec<Acc>(UA_SHUFFLE(Bits, a.v, b.v, (I % (2 * W) < W ? I : I - W + kLanes)...)) +
         Vec<Acc>(UA_SHUFFLE(Bits, a.v, b.v, (I % (2 * W) < W ? I + W : I + kLanes)...));
}

// Lane i of the result is the sum of all lanes of x[i * kStride]; as many vectors as lanes.
template <int kCount, int kStride, typename Acc>
UA_INLINE Vec<Acc> sum_each(const Vec<Acc>* x) {
  constexpr int kLanes = Vec<Acc>::kLanes;
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    const Vec<Acc> even = sum_each<kCount / 2, kStride * 2>(x);
    const Vec<Acc> odd = sum_each<kCount / 2, kStride * 2>(x + kStride);
    return merge<kLanes / kCount>(even, odd, std::make_integer_sequence<int, kLanes>());
  }
}

template <int W, typename Acc, int... I>
UA_INLINE Vec<Acc> swap_groups(Vec<Acc> x, std::integer_sequence<int, I...>) {
  using Bits [[maybe_unused]] = typename Vec<Acc>::Bits;
  return Vec<Acc>(UA_SHUFFLE(Bits, x.v, x.v, (I ^ W)...));
}

template <typename Acc, int W = Vec<Acc>::kLanes / 2>
UA_INLINE Acc sum_lanes(Vec<Acc> x) {
  if constexpr (W == 0) {
    return x.v[0];
  } else {
    return sum_lanes<Acc, W / 2>(x + swap_groups<W>(x, std::make_integer_sequence<int, Vec<Acc>::kLanes>()));
  }
}

// Ignores NaN, as long as one lane is a number.
template <typename Acc, int W = Vec<Acc>::kLanes / 2>
UA_INLINE Acc max_lanes(Vec<Acc> x) {
  if constexpr (W == 0) {
    return x.v[0];
  } else {
    const Vec<Acc> other = swap_groups<W>(x, std::make_integer_sequence<int, Vec<Acc>::kLanes>());
    return max_lanes<Acc, W / 2>(max_number(x, other));
  }
}

}  // namespace UA_ISA
}  // namespace unique_attn
