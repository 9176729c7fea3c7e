// Selection by keys: integers that order as scores do, and the key of the last of the best.
#pragma once

#include "cpu_tile.h"

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

template <typename Key>
constexpr Key kLowest = Key(Key(1) << (sizeof(Key) * 8 - 1));

// Keys order as scores do, with -0 equal to +0 and NaN the smallest of all.
template <typename Score, typename Key = typename ScoreBits<Score>::Key>
UA_INLINE void order_keys(const Score* scores, int count, Key* keys) {
  constexpr Key kMagnitude = Key(~kLowest<Key>);
  __builtin_memcpy(keys, scores, count * sizeof(Key));
  for (int i = 0; i < count; ++i) {
    const Key magnitude = Key(keys[i] & kMagnitude);
    const Key key = keys[i] < 0 ? Key(-magnitude) : magnitude;
    keys[i] = magnitude > ScoreBits<Score>::kInf ? kLowest<Key> : key;
  }
}

// How many of the keys are at least `bound`.
template <typename Key>
UA_INLINE int count_from(const Key* keys, int count, Key bound) {
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Key));
  constexpr int kRun = 1 << 14;  // vectors, so that a lane's count stays in range
  using Raw = typename RawVector<Key, kVectorBytes>::Type;
  const Raw bounds = bound - Raw{};
  const int full = count / kLanes * kLanes;
  int64_t total = 0;
  for (int base = 0; base < full;) {
    const int end = full - base > kRun * kLanes ? base + kRun * kLanes : full;
    Raw even{}, odd{};
    for (; base + 2 * kLanes <= end; base += 2 * kLanes) {
      even -= load_raw<Raw>(keys + base) >= bounds;
      odd -= load_raw<Raw>(keys + base + kLanes) >= bounds;
    }
    if (base < end) {
      even -= load_raw<Raw>(keys + base) >= bounds;
      base += kLanes;
    }
    for (int i = 0; i < kLanes; ++i) total += int64_t{even[i]} + odd[i];
  }
  for (int i = full; i < count; ++i) total += keys[i] >= bound;
  return static_cast<int>(total);
}

// Keys above `bound` are taken, and the first `ties` of those equal to it.
template <typename Key>
struct Threshold {
  Key bound;
  int ties;
};

// The threshold that takes `wanted` keys, at least one and fewer than `count`.
template <typename Key>
UA_INLINE Threshold<Key> find_threshold(const Key* keys, int count, int wanted) {
  Key bound = kLowest<Key>;  // the largest key so far that `wanted` keys reach
  int above = 0;             // keys that reach the smallest key so far that fewer reach
  for (int bit = static_cast<int>(sizeof(Key)) * 8 - 1; bit >= 0; --bit) {
    const Key candidate = Key(bound ^ Key(Key(1) << bit));
    const int reach = count_from(keys, count, candidate);
    if (reach < wanted) {
      above = reach;
      continue;
    }
    bound = candidate;
    if (reach == wanted) return {bound, wanted};
  }
  return {bound, wanted - above};
}

}  // namespace UA_ISA
}  // namespace unique_attn
