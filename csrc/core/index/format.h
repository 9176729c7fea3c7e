// How an index entry is stored: the one place that knows the bytes. An entry is what a rule's encode (rules.h) made of
// the keys of one page and KV head; its size is a multiple of 16 bytes, and so is the offset of each of its parts at
// the usual head dims (64, 128, 256).
//
// Exact:       vector a [D], vector b [D] (if the rule has it), the scalar in a 16-byte slot (if the rule has it), all
//              in the keys' dtype. Means, bounds and standard deviations of channels are never larger than the largest
//              key; the scalar of `unique` may be, by sqrt(D), and is at most the largest number of the dtype: as
//              infinity it would make all pages equal.
// Compressed:  for groups of 16 neighbouring channels (32 if D > 64; the last group may be shorter):
//                group scales [groups][4 bytes]   outlier fp16, step and spread as 8-bit floats
//                means        [D][4 bits]         channel d in byte d / 2, even channels in the low half
//                spreads      [D][2 bits]         `directional`; channel d in byte d / 4, from the low bits
//              then zeros to a multiple of 16. 64 bytes at D = 64 and 112 at D = 128 for `directional`; no other state.
//
// A group's mean of largest magnitude, m0, is its outlier v: it has the code -8 and is kept in fp16. So it neither
// wastes the codes of the others nor hides them, however large it is: models with a key bias have channels a hundred
// times as large as the rest. The others are -7..7 times the step s. A channel that v fits better than its own multiple
// of s has the code -8 as well. Spreads (standard deviations) are 2, 3 or 4 times the spread scale t, or, with code 0,
// the smaller of t and s: where one channel spreads far more than the others, t says nothing about them, and s is their
// size.
//   v = fp16(m0), nearest even, at most 65504 in magnitude    s = E5M3(largest other |mean| / 7), nearest even
//   t = E5M3(largest spread / 4), rounded up, so that none is cut; `unique` has one spread per group instead of codes,
//       t = E5M3(sqrt(sum of the group's variances)), nearest even, and the page's std is sqrt(sum of t^2)
//   code of a mean x = x / s rounded to nearest even, within -7..7 (0 if s = 0), or -8 if |x - v| < |x - code * s|
//   code of a spread y = y / t rounded so, within 2..4, less 1 (0 if t = 0), or 0 if
//       |y - min(s, t)| < |y - (code + 1) * t|
// A group with a mean or spread that is no finite number has v = NaN, s = t = 0, -8 for every mean and 0 for every
// spread. All of it is computed in fp32 from the statistics rounded to fp32; ties for m0 go to the lowest channel.
#pragma once

#include <math.h>

#include "core/half.h"
#include "core/rules.h"

namespace unique_attn {

// ---- Exact. ----

constexpr size_t kScalarBytes = 16;

// The scalar as it is stored in a type whose largest number is `most`; NaN stays NaN.
template <typename Acc>
UA_HD Acc stored_scalar(Acc x, Acc most) {
  return x > most ? most : x;
}

// ---- Compressed. ----

constexpr int kOutlierCode = -8;

UA_HD constexpr int group_channels(int head_dim) { return head_dim <= 64 ? 16 : 32; }
UA_HD constexpr int num_groups(int head_dim) {
  return (head_dim + group_channels(head_dim) - 1) / group_channels(head_dim);
}

// An 8-bit float is the upper half of a positive fp16 without its sign bit: 5 bits of exponent, 3 of fraction.
struct GroupScales {
  uint16_t outlier;
  uint8_t step;
  uint8_t spread;
};
static_assert(sizeof(GroupScales) == 4, "the entry's layout");

UA_HD constexpr int means_offset(int head_dim) { return num_groups(head_dim) * static_cast<int>(sizeof(GroupScales)); }
UA_HD constexpr int spreads_offset(int head_dim) { return means_offset(head_dim) + head_dim / 2; }

UA_HD float decode_float8(uint8_t code) { return to_scalar(F16{static_cast<uint16_t>(code << 7)}); }

constexpr uint8_t kLargestFloat8 = 0xf7;  // 61440

// x >= 0 and finite. Adding `bias` to the bits below those that stay rounds; a carry moves to the next exponent.
UA_HD uint8_t encode_float8(float x, bool up) {
  if (x >= 61440.f) return kLargestFloat8;
  if (x < 6.103515625e-05f) {  // 2^-14: subnormal, in units of 2^-17
    const float units = x * 131072.f;
    return static_cast<uint8_t>(up ? ceilf(units) : rintf(units));
  }
  const uint32_t bits = float_bits(x) - (112u << 23);
  const uint32_t code = (bits + (up ? 0xfffffu : 0x7ffffu + (bits >> 20 & 1u))) >> 20;
  return static_cast<uint8_t>(code < kLargestFloat8 ? code : kLargestFloat8);
}

// What the codes of a group stand for.
struct GroupValues {
  float outlier;
  float step;
  float low_spread;  // of code 0
  float spread;

  UA_HD explicit GroupValues(GroupScales scales)
      : outlier(to_scalar(F16{scales.outlier})),
        step(decode_float8(scales.step)),
        spread(decode_float8(scales.spread)) {
    low_spread = step < spread ? step : spread;
  }
  UA_HD float mean(int code) const { return code == kOutlierCode ? outlier : static_cast<float>(code) * step; }
  UA_HD float std(int code) const { return code == 0 ? low_spread : static_cast<float>(code + 1) * spread; }

  UA_HD int mean_code(float x) const {
    if (outlier != outlier) return kOutlierCode;
    const float rounded = step > 0.f ? rintf(x / step) : 0.f;
    const float code = rounded < -7.f ? -7.f : rounded > 7.f ? 7.f : rounded;
    return fabsf(x - outlier) < fabsf(x - code * step) ? kOutlierCode : static_cast<int>(code);
  }
  UA_HD int std_code(float y) const {
    if (!(spread > 0.f)) return 0;
    const float rounded = rintf(y / spread);
    const float multiple = rounded < 2.f ? 2.f : rounded > 4.f ? 4.f : rounded;
    return fabsf(y - low_spread) < fabsf(y - multiple * spread) ? 0 : static_cast<int>(multiple) - 1;
  }
};

// Scales of a group from its mean of largest magnitude, the largest magnitude of the others, and its largest spread
// (for `unique`: its whole spread).
UA_HD GroupScales group_scales(bool finite, float outlier, float rest, float spread, bool whole) {
  if (!finite) return {0x7e00, 0, 0};
  F16 half;
  from_scalar(outlier > 65504.f ? 65504.f : outlier < -65504.f ? -65504.f : outlier, half);
  return {half.bits, encode_float8(rest / 7.f, false), encode_float8(whole ? spread : spread * 0.25f, !whole)};
}

// ---- Sizes. ----

// Bytes of an entry with so many vectors and perhaps a scalar; `dtype` is that of the keys.
UA_HD constexpr int exact_entry_bytes(int vectors, bool scalar, DType dtype, int head_dim) {
  return static_cast<int>(vectors * head_dim * dtype_size(dtype) + (scalar ? kScalarBytes : 0));
}

// What is used of a compressed entry, and its bytes. Only a vector of spreads has codes of its own.
UA_HD constexpr int compressed_entry_end(bool spread_codes, int head_dim) {
  return spreads_offset(head_dim) + (spread_codes ? head_dim / 4 : 0);
}
UA_HD constexpr int compressed_entry_bytes(bool spread_codes, int head_dim) {
  return (compressed_entry_end(spread_codes, head_dim) + 15) / 16 * 16;
}

inline int index_entry_bytes(Rule rule, IndexFormat format, DType dtype, int head_dim) {
  const RuleFacts& facts = rule_facts(rule);
  return format == IndexFormat::kExact ? exact_entry_bytes(facts.vectors, facts.scalar, dtype, head_dim)
                                       : compressed_entry_bytes(facts.vectors > 1, head_dim);
}

}  // namespace unique_attn
