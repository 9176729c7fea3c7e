// Selection by order keys: the key of the last of the best.
//
// A search counts the keys that reach a pivot, by whole vectors, so that a pass takes the same time whatever the keys
// are. A small sample tells which pivots to try first: few keys are left between them, which are copied and bisected
// alone, or the key that is sought is one of them, however many equal it.
#pragma once

#include "core/cpu/order_key.h"

namespace unique_attn {
namespace UA_ISA {

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

// Bit i is byte i of 64, each 0 or 1.
UA_INLINE uint64_t pack_flags(const uint8_t* flags) {
#if defined(__AVX512BW__)
  const __m512i x = _mm512_loadu_si512(flags);
  return _mm512_test_epi8_mask(x, x);
#else
  uint64_t packed = 0;
#if defined(__x86_64__)
  for (int i = 0; i < 64; i += 16) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags + i));
    packed |= uint64_t(_mm_movemask_epi8(_mm_slli_epi16(x, 7))) << i;  // takes a byte's highest bit
  }
#else
  for (int i = 0; i < 64; i += 8) {
    uint64_t x;
    __builtin_memcpy(&x, flags + i, sizeof(x));
    packed |= (x * 0x0102040810204080 >> 56) << i;  // puts the lowest bits of 8 bytes side by side
  }
#endif
  return packed;
#endif
}

// each(i) for the keys that pass `test`, in ascending order, until it returns false. Keys are tested by whole vectors,
// and 64 results become one number, so that few branches depend on them.
template <typename Key, typename Test, typename Each>
UA_INLINE void each_passing(const Key* keys, int count, const Test& test, const Each& each) {
  constexpr int kBlock = 64;
  alignas(64) uint8_t passes[kBlock];
  for (int base = 0; base < count; base += kBlock) {
    if (count - base >= kBlock) {
      for (int i = 0; i < kBlock; ++i) passes[i] = test(keys[base + i]);
    } else {
      for (int i = 0; i < kBlock; ++i) passes[i] = i < count - base ? test(keys[base + i]) : 0;
    }
    uint64_t found = pack_flags(passes);
    for (; found != 0; found &= found - 1) {
      if (!each(base + __builtin_ctzll(found))) return;
    }
  }
}

// Keys above `bound` are taken, and the first `ties` of those equal to it.
template <typename Key>
struct Threshold {
  Key bound;
  int ties;
};

// Where the `wanted`-th largest of the keys is known to be.
template <typename Key>
struct Bracket {
  Key low;    // at least `wanted` keys reach it
  Key high;   // fewer are above it
  int reach;  // how many reach `low`
  int above;  // and how many are above `high`

  UA_INLINE bool found(int wanted) const { return low == high || reach == wanted; }
  UA_INLINE void narrow(const Key* keys, int count, int wanted, Key pivot) {
    if (pivot <= low || pivot > high) return;
    const int from = count_from(keys, count, pivot);
    if (from >= wanted) {
      low = pivot;
      reach = from;
    } else {
      high = Key(pivot - 1);
      above = from;
    }
  }
  UA_INLINE void bisect(const Key* keys, int count, int wanted) {
    while (!found(wanted)) narrow(keys, count, wanted, Key((low | high) - ((low ^ high) >> 1)));
  }
};

template <typename Key>
UA_INLINE Bracket<Key> any_bracket(int count) {
  return {kLowest<Key>, Key(~kLowest<Key>), count, 0};
}

// Narrows the bracket around the keys of a sample that are expected on either side of the `wanted`-th.
template <typename Key>
UA_INLINE void narrow_by_sample(const Key* keys, int count, int wanted, Bracket<Key>& bracket) {
  alignas(64) Key sample[1024];
  const int bits = count < (1 << 15) ? 8 : 10;  // a long row's larger sample leaves fewer keys to copy
  const int size = 1 << bits;
  // One key of each of `size` parts of the row, at a place in it that looks random: scores may be periodic.
  for (int i = 0; i < size; ++i) sample[i] = keys[(int64_t{i} << 16 | (i * 40503 & 0xffff)) * count >> (16 + bits)];
  const int rank = static_cast<int>((int64_t{wanted} << bits) / count);
  // More than two standard deviations: a row whose sample misleads is bisected as a whole, a pass for each bit.
  const int slack = 3 + static_cast<int>(2 * __builtin_sqrtf(static_cast<float>(rank + 1)));
  const auto of_rank = [&](int r) {
    Bracket<Key> at = any_bracket<Key>(size);
    at.bisect(sample, size, r);
    return at.low;
  };
  // Each key is also told from the next larger one: where many equal it, nothing else is left.
  if (rank > slack) {
    const Key pivot = of_rank(rank - slack);
    bracket.narrow(keys, count, wanted, pivot);
    bracket.narrow(keys, count, wanted, Key(pivot + 1));
  }
  if (rank + slack < size) {
    const Key pivot = of_rank(rank + slack);
    bracket.narrow(keys, count, wanted, Key(pivot + 1));
    bracket.narrow(keys, count, wanted, pivot);
  }
}

// Copies the keys of low .. high, and returns how many; `out` may be `keys`.
template <typename Key>
UA_INLINE int copy_between(const Key* keys, int count, Key low, Key high, Key* out) {
  int copied = 0;
  each_passing(
      keys, count, [&](Key key) { return (key >= low) & (key <= high); },
      [&](int i) {
        out[copied++] = keys[i];
        return true;
      });
  return copied;
}

// The threshold that takes `wanted` keys, at least one and fewer than `count`. `spare`: room for count / 4 keys.
template <typename Key>
UA_INLINE Threshold<Key> find_threshold(const Key* keys, int count, int wanted, Key* spare) {
  constexpr int kSampled = (8 << 10) / static_cast<int>(sizeof(Key));  // a shorter list is bisected as fast
  Bracket<Key> bracket = any_bracket<Key>(count);
  while (count >= kSampled) {
    narrow_by_sample(keys, count, wanted, bracket);
    if (bracket.found(wanted) || bracket.reach - bracket.above > count / 4) break;
    count = copy_between(keys, count, bracket.low, bracket.high, spare);
    keys = spare;
    wanted -= bracket.above;
    bracket.reach = count;
    bracket.above = 0;
  }
  bracket.bisect(keys, count, wanted);
  return {bracket.low, wanted - bracket.above};
}

}  // namespace UA_ISA
}  // namespace unique_attn
