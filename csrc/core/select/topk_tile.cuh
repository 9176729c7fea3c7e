// The scores of one row that the threads of a block hold in registers, in the words they were loaded in. A vector is
// kWidth neighbouring scores; vector v of a thread is number v * kThreads + thread of the block's. NaN, which ranks
// below -inf, stands for what is no candidate too.
#pragma once

#include "core/cuda/order_key.cuh"
#include "core/cuda/vec.cuh"

namespace unique_attn {

// words[index], without a dynamic index, which would need local memory.
template <int kCount>
__device__ __forceinline__ unsigned pick_word(const unsigned (&words)[kCount], int index) {
  if constexpr (kCount == 1) {
    return words[0];
  } else {
    unsigned half[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const unsigned low = words[i], high = words[i + kCount / 2];
      half[i] = index & kCount / 2 ? high : low;
    }
    return pick_word(half, index);
  }
}

// What depends on the type: the scores inside a word. Among the bits of a thread's scores, bit i is that of word i, and
// for bf16 bit 16 + i that of its upper half.
template <typename Score>
struct ScoreWord;

template <>
struct ScoreWord<float> {
  static constexpr int kPerWord = 1;
  using Bound = float;
  static __device__ __forceinline__ Bound bound(unsigned key) { return key_score<float>(key); }
  static __device__ __forceinline__ unsigned least_key(float x) { return order_key(x); }
  static __device__ __forceinline__ unsigned bits_at_least(unsigned word, Bound bound, int i) {
    return unsigned{__uint_as_float(word) >= bound} << i;
  }
  static __device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ unsigned max_key(unsigned word) { return order_key(__uint_as_float(word)); }
  static __device__ __forceinline__ unsigned key(unsigned word, int) { return max_key(word); }
};

template <>
struct ScoreWord<__nv_bfloat16> {
  static constexpr int kPerWord = 2;
  using Bound = __nv_bfloat162;
  static __device__ __forceinline__ __nv_bfloat162 pair(unsigned word) {
    return *reinterpret_cast<const __nv_bfloat162*>(&word);
  }
  static __device__ __forceinline__ Bound bound(unsigned key) {
    return __float2bfloat162_rn(key_score<__nv_bfloat16>(key));
  }
  // Of the scores that are at least x.
  static __device__ __forceinline__ unsigned least_key(float x) { return order_key(__float2bfloat16_ru(x)); }
  static __device__ __forceinline__ unsigned bits_at_least(unsigned word, Bound bound, int i) {
    return __hge2_mask(pair(word), bound) & 0x00010001u << i;
  }
  static __device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
    const __nv_bfloat162 x = __hmax2(pair(a), pair(b));
    return *reinterpret_cast<const unsigned*>(&x);
  }
  static __device__ __forceinline__ unsigned max_key(unsigned word) {
    const __nv_bfloat162 both = pair(word);
    return order_key(__hmax(both.x, both.y));
  }
  static __device__ __forceinline__ unsigned key(unsigned word, int part) {
    return order_key(__ushort_as_bfloat16(static_cast<unsigned short>(word >> 16 * part)));
  }
};

template <typename ScoreT, int kThreadsT, int kWidthT, int kVectorsT>
struct ScoreTile {
  using Score = ScoreT;
  using Word = ScoreWord<Score>;
  static constexpr int kThreads = kThreadsT;
  static constexpr int kWidth = kWidthT;
  static constexpr int kVectors = kVectorsT;
  static constexpr int kScores = kVectors * kWidth;        // of a thread
  static constexpr int kBlockScores = kThreads * kScores;  // of the block
  static constexpr int kVectorWords = kWidth / Word::kPerWord;
  static constexpr int kWords = kVectors * kVectorWords;
  static_assert(kWords * Word::kPerWord <= 32 && kWords <= 16 && (kWords & (kWords - 1)) == 0);

  unsigned words[kWords];

  // The place of vector v in the block's scores.
  static __device__ __forceinline__ int vector_start(int v) {
    return (v * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
  }

  // row[origin, stop), where `row` and `origin` are those of whole vectors; nothing at `readable` or after is touched.
  __device__ __forceinline__ void load(const Score* row, int origin, int stop, int readable) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = origin + vector_start(v);
      if (at >= stop) {
#pragma unroll
        for (int i = 0; i < kVectorWords; ++i) words[v * kVectorWords + i] = ~0u;  // NaN
      } else if (at + kWidth <= readable) {
        load_vector(v, row + at);
      } else {
        load_part(v, row + at, readable - at);
      }
    }
  }

  // What lies outside [low, high) becomes NaN.
  __device__ __forceinline__ void keep(int origin, int low, int high) {
    constexpr unsigned kPart = Word::kPerWord == 1 ? ~0u : 0xffffu;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = origin + vector_start(v);
      if (at >= low && at + kWidth <= high) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (at + i < low || at + i >= high) {
          words[v * kVectorWords + i / Word::kPerWord] |= kPart << 16 * (i % Word::kPerWord);
        }
      }
    }
  }

  // Order key of the largest score of the thread, or of its vector v; 0 if all are NaN.
  __device__ __forceinline__ unsigned max_key() const { return Word::max_key(largest<kWords>(0)); }
  __device__ __forceinline__ unsigned vector_max_key(int v) const {
    return Word::max_key(largest<kVectorWords>(v * kVectorWords));
  }

  // One bit for each score of vector v whose key is at least `key`.
  __device__ __forceinline__ unsigned bits_at_least(int v, unsigned key) const {
    const typename Word::Bound bound = Word::bound(key);
    unsigned bits = 0;
#pragma unroll
    for (int i = v * kVectorWords; i < (v + 1) * kVectorWords; ++i) bits |= Word::bits_at_least(words[i], bound, i);
    return bits;
  }

  // Of the score of bit `bit`: its key, and its place in the block's scores.
  __device__ __forceinline__ unsigned key(int bit) const { return Word::key(pick_word(words, bit % 16), bit / 16); }
  static __device__ __forceinline__ int place(int bit) {
    const int word = bit % 16;
    return vector_start(word / kVectorWords) + word % kVectorWords * Word::kPerWord + bit / 16;
  }

 private:
  static __device__ __forceinline__ unsigned raw_bits(float x) { return __float_as_uint(x); }
  static __device__ __forceinline__ unsigned raw_bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }

  __device__ __forceinline__ void load_vector(int v, const Score* p) {
    unsigned* to = words + v * kVectorWords;
    if constexpr (kVectorWords == 2) {
      const uint2 raw = *reinterpret_cast<const uint2*>(p);
      to[0] = raw.x, to[1] = raw.y;
    } else {
#pragma unroll
      for (int i = 0; i < kVectorWords; i += 4) {
        const uint4 raw = reinterpret_cast<const uint4*>(p)[i / 4];
        to[i] = raw.x, to[i + 1] = raw.y, to[i + 2] = raw.z, to[i + 3] = raw.w;
      }
    }
  }

  // The first `count` scores of a vector; NaN for the others. A loop, as code that hardly ever runs should be short.
  __device__ __forceinline__ void load_part(int v, const Score* p, int count) {
    unsigned part[kVectorWords] = {};
#pragma unroll 1
    for (int element = kWidth - 1; element >= 0; --element) {
      const unsigned bits = element < count ? raw_bits(p[element]) : ~0u;
#pragma unroll
      for (int i = kVectorWords - 1; i >= 0; --i) {
        const unsigned before = i > 0 ? part[i - 1] : Word::kPerWord == 1 ? bits : bits << 16;
        part[i] = Word::kPerWord == 1 ? before : part[i] << 16 | before >> 16;
      }
    }
#pragma unroll
    for (int i = 0; i < kVectorWords; ++i) words[v * kVectorWords + i] = part[i];
  }

  template <int kCount>
  __device__ __forceinline__ unsigned largest(int first) const {
    if constexpr (kCount == 1) {
      return words[first];
    } else {
      return Word::larger(largest<kCount / 2>(first), largest<kCount / 2>(first + kCount / 2));
    }
  }
};

}  // namespace unique_attn
