// Entries of the page index as operands of page_scores' matrix products: what a lane reads of an entry in shared
// memory, and how it becomes 16-bit numbers in registers.
#pragma once

#include "core/cuda/mma.cuh"
#include "core/index/format.h"

namespace unique_attn {

template <ScoreForm kForm>
constexpr bool kHasScalar = kForm == ScoreForm::kScalarSpread;
template <ScoreForm kForm>
constexpr bool kHasVector = kForm == ScoreForm::kVectorSpread;

__device__ __forceinline__ __nv_bfloat162 as_pair(unsigned word) {
  return *reinterpret_cast<const __nv_bfloat162*>(&word);
}
__device__ __forceinline__ unsigned as_word(__nv_bfloat162 pair) { return *reinterpret_cast<const unsigned*>(&pair); }

template <typename T>
__device__ __forceinline__ unsigned square2(unsigned pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 x = as_pair(pair);
    return as_word(__hmul2(x, x));
  } else {
    const T* x = reinterpret_cast<const T*>(&pair);
    const float low = to_float(x[0]), high = to_float(x[1]);
    return pack2<__nv_bfloat16>(low * low, high * high);
  }
}

// Both compile to one instruction each; as expressions they would be two.
__device__ __forceinline__ unsigned and_xor(unsigned a, unsigned b, unsigned c) {
  unsigned x;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}
__device__ __forceinline__ unsigned pick_bytes(unsigned low, unsigned high, unsigned nibbles) {
  unsigned x;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(low), "r"(high), "r"(nibbles));
  return x;
}

// A lane of a quad has kSteps * 4 channels of a page, in chunks of 8. `chunk_lane` says which; `pair(step, i)` is half
// i (of two) of what the lane gives to a k-step, two channels, for a query in the same order (`query_words`).
// kProducts: products of 16 pages that a warp does at a time for one query token. kResident: thread blocks that a
// multiprocessor must hold, or registers would be spent on fewer.

template <int kCount>
__device__ __forceinline__ void load_words(unsigned (&words)[kCount], const void* source) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const uint4 raw = static_cast<const uint4*>(source)[i];
      words[4 * i] = raw.x, words[4 * i + 1] = raw.y, words[4 * i + 2] = raw.z, words[4 * i + 3] = raw.w;
    }
  } else if constexpr (kCount == 2) {
    const uint2 raw = *static_cast<const uint2*>(source);
    words[0] = raw.x, words[1] = raw.y;
  } else {
    words[0] = *static_cast<const unsigned*>(source);
  }
}

// Vectors in the keys' dtype: chunk after chunk goes round the lanes, so that they read neighbouring 16 bytes.
template <typename T, ScoreForm kForm, int kSteps>
struct ExactRow {
  static constexpr int kHeadDim = kSteps * 16;  // at most
  static constexpr int kChunks = kSteps / 2;
  static constexpr int kProducts = 1;
  static constexpr int kResident = kSteps > 8 ? 1 : 3;
  static UA_HD constexpr int entry_bytes(int head_dim) {
    constexpr DType kDType = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
    return exact_entry_bytes(1 + kHasVector<kForm>, kHasScalar<kForm>, kDType, head_dim);
  }
  unsigned mean[kChunks][4], std[kHasVector<kForm> ? kChunks : 1][4];
  float scalar;  // kScalarSpread

  static __device__ __forceinline__ int chunk_lane(int chunk) { return chunk % 4; }
  static __device__ __forceinline__ int chunk_of_lane(int chunk) { return chunk / 4; }
  static __device__ __forceinline__ void query_words(unsigned (&)[4]) {}

  __device__ __forceinline__ void load(const uint8_t* entry, int head_dim) {
    const T* vectors = reinterpret_cast<const T*>(entry);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int channel = (j * 4 + static_cast<int>(threadIdx.x) % 4) * 8;
      const bool valid = channel < head_dim;
#pragma unroll
      for (int i = 0; i < 4; ++i) mean[j][i] = 0u;
      if (valid) load_words(mean[j], vectors + channel);
      if constexpr (kHasVector<kForm>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) std[j][i] = 0u;
        if (valid) load_words(std[j], vectors + head_dim + channel);
      }
    }
    scalar = kHasScalar<kForm> ? to_float(vectors[head_dim]) : 0.f;
  }
  __device__ __forceinline__ void decode() {}
  __device__ __forceinline__ unsigned mean_pair(int step, int i) const { return mean[step / 2][step % 2 * 2 + i]; }
  __device__ __forceinline__ unsigned var_pair(int step, int i) const {
    return square2<T>(std[step / 2][step % 2 * 2 + i]);
  }
};

// Compressed entries (index/format.h) of 64, 128 or 256 channels: a lane has neighbouring channels, one or two whole
// groups. Codes become bf16 numbers without a loss: a step has 4 significant bits, a code 3. Of an outlier 8 of 11 bits
// are kept, as of a mean in a bf16 index. Integer operations run at half the rate of 16-bit fused multiply-adds, so as
// much as possible is done by those.
template <ScoreForm kForm, int kSteps>
struct CompressedRow {
  static constexpr int kHeadDim = kSteps * 16;
  static constexpr int kChunks = kSteps / 2;
  static constexpr int kGroups = kSteps > 8 ? kSteps / 8 : 1;  // of a lane
  static constexpr int kProducts = kSteps > 4 ? 1 : 2;
  static constexpr int kResident = kSteps > 8 ? 1 : kSteps > 4 ? 7 : 5;
  static UA_HD constexpr int entry_bytes(int) { return compressed_entry_bytes(kHasVector<kForm>, kHeadDim); }
  unsigned means[kChunks];                               // 8 codes of 4 bits
  unsigned spreads[kHasVector<kForm> ? kSteps / 4 : 1];  // 16 codes of 2 bits
  unsigned scales[kGroups];
  __nv_bfloat162 step[kGroups], offset[kGroups];  // a code's value is (136 + code) * step + offset
  __nv_bfloat162 outlier[kGroups];                // added to the value of code -8
  unsigned variances[kGroups][2];                 // of the 4 codes
  float scalar;

  static __device__ __forceinline__ int chunk_lane(int chunk) { return chunk / kChunks; }
  static __device__ __forceinline__ int chunk_of_lane(int chunk) { return chunk % kChunks; }
  // Channels 4 apart lie in one word: their codes come out of a word of codes together.
  static __device__ __forceinline__ void query_words(unsigned (&w)[4]) {
    const unsigned x[4] = {w[0], w[1], w[2], w[3]};
    w[0] = __byte_perm(x[0], x[2], 0x5410);
    w[1] = __byte_perm(x[0], x[2], 0x7632);
    w[2] = __byte_perm(x[1], x[3], 0x5410);
    w[3] = __byte_perm(x[1], x[3], 0x7632);
  }

  __device__ __forceinline__ void load(const uint8_t* entry, int) {
    const int lane = threadIdx.x % 4;
    load_words(scales, entry + lane * kGroups * sizeof(GroupScales));
    load_words(means, entry + means_offset(kHeadDim) + lane * kHeadDim / 8);
    if constexpr (kHasVector<kForm>) load_words(spreads, entry + spreads_offset(kHeadDim) + lane * kHeadDim / 16);
  }
  __device__ __forceinline__ void decode() {
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      // E5M3 numbers, moved to the places of a bf16's fields, are 2^112 times too small.
      const unsigned codes = pick_bytes(scales[g], 0u, 0x4342) << 4;
      const __nv_bfloat162 step_spread = __hmul2(as_pair(codes), __float2bfloat162_rn(0x1p112f));
      step[g] = __low2bfloat162(step_spread);
      offset[g] = __hmul2(step[g], __float2bfloat162_rn(-136.f));  // 17 times 4 bits: exact
      const float big = __half2float(__ushort_as_half(static_cast<unsigned short>(scales[g])));
      const float small = __low2float(step_spread);
      outlier[g] = __float2bfloat162_rn(fmaf(-static_cast<float>(kOutlierCode), small, big));
      if constexpr (kHasVector<kForm>) {
        const __nv_bfloat162 stds = __hmin2(step_spread, __high2bfloat162(step_spread));  // of code 0; the spread
        const __nv_bfloat162 squares = __hmul2(stds, stds);
        variances[g][0] = as_word(__hmul2(squares, as_pair(0x40803f80u)));                    // 1 and 4 times
        variances[g][1] = as_word(__hmul2(__high2bfloat162(squares), as_pair(0x41804110u)));  // 9 and 16 times
      }
      const float spread = __high2float(step_spread);
      sum += spread * spread;
    }
    if constexpr (kHasScalar<kForm>) {
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
    }
    scalar = sqrtf(sum);
  }
  __device__ __forceinline__ unsigned mean_pair(int k, int i) const {
    const int group = k / 2 * kGroups / kChunks;
    // 4 bits in the last places of bf16's 128 are 128 + bits; with the sign bit turned that is 136 + code.
    const unsigned bits = and_xor(means[k / 2] >> (k % 2 * 2 + i) * 4, 0x000f000fu, 0x43084308u);
    const __nv_bfloat162 code = as_pair(bits);
    // 1 for the outlier's code, whose bits are 128, and 0 for the others.
    const __nv_bfloat162 is_outlier = __hfma2_relu(code, __float2bfloat162_rn(-1.f), __float2bfloat162_rn(129.f));
    const __nv_bfloat162 value = __hfma2(is_outlier, outlier[group], __hfma2(code, step[group], offset[group]));
    return as_word(value);
  }
  __device__ __forceinline__ unsigned var_pair(int k, int i) const {
    const int chunk = k / 2;
    const int group = chunk * kGroups / kChunks;
    // Codes of channels 4 apart, a byte each, of two chunks; bytes 2 code and 2 code + 1 of the table for each.
    const unsigned codes = spreads[chunk / 2] >> (k % 2 * 2 + i) * 2 & 0x03030303u;
    const unsigned bytes = codes * 0x22u + 0x10101010u;
    return pick_bytes(variances[group][0], variances[group][1], chunk % 2 == 0 ? bytes : bytes >> 16);
  }
};

}  // namespace unique_attn
