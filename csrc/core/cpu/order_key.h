// Order keys: integers that order as scores do. cuda/order_key.cuh is the same for CUDA.
#pragma once

#include "core/cpu/tile.h"

namespace unique_attn {
namespace UA_ISA {

// The integer of a score type's width and the bits of +inf in it.
template <typename Score>
struct ScoreBits;
template <>
struct ScoreBits<BF16> {
  using Key = int16_t;
  static constexpr Key kInf = 0x7f80;
};
template <>
struct ScoreBits<F16> {
  using Key = int16_t;
  static constexpr Key kInf = 0x7c00;
};
template <>
struct ScoreBits<float> {
  using Key = int32_t;
  static constexpr Key kInf = 0x7f800000;
};
template <>
struct ScoreBits<double> {
  using Key = int64_t;
  static constexpr Key kInf = 0x7ff0000000000000;
};

template <typename Score>
using OrderKey = typename ScoreBits<Score>::Key;

template <typename Key>
constexpr Key kLowest = Key(Key(1) << (sizeof(Key) * 8 - 1));

// Keys order as scores do, with -0 equal to +0 and NaN the smallest of all.
template <typename Score, typename Key = OrderKey<Score>>
UA_INLINE void order_keys(const Score* scores, int count, Key* keys) {
  constexpr Key kMagnitude = Key(~kLowest<Key>);
  __builtin_memcpy(keys, scores, count * sizeof(Key));
  for (int i = 0; i < count; ++i) {
    const Key magnitude = Key(keys[i] & kMagnitude);
    const Key key = keys[i] < 0 ? Key(-magnitude) : magnitude;
    keys[i] = magnitude > ScoreBits<Score>::kInf ? kLowest<Key> : key;
  }
}

}  // namespace UA_ISA
}  // namespace unique_attn
