// Radix select over the scores of one row by one thread block: the order key of the k-th largest score. Exact, and
// independent of the order in which threads run.
#pragma once

#include "core/cuda/order_key.cuh"

namespace unique_attn {

constexpr int kRadixBins = 256;

struct RadixScratch {
  unsigned histogram[kRadixBins];
  unsigned bin, wanted, count;
};

struct RadixSelection {
  unsigned key;    // of the k-th largest score
  unsigned ties;   // how many of the scores with this key are among the k largest
  unsigned equal;  // how many scores have this key
};

// The k-th largest of scores[low, high), 1 <= k <= high - low. Every thread of the block calls it and gets the result.
template <int kThreads, typename Score>
__device__ RadixSelection radix_select(const Score* scores, int low, int high, unsigned k, RadixScratch& shared) {
  constexpr int kKeyBits = sizeof(Score) * 8;
  const int tid = threadIdx.x;
  const int lane = tid % kWarp;
  unsigned prefix = 0;  // leading bits of the k-th largest key
  unsigned remaining = k;
#pragma unroll
  for (int shift = kKeyBits - 8; shift >= 0; shift -= 8) {
    for (int i = tid; i < kRadixBins; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    for (int base = low; base < high; base += kThreads) {
      const int i = base + tid;
      bool counts = i < high;
      unsigned key = 0;
      if (counts) {
        key = order_key(scores[i]);
        counts = shift == kKeyBits - 8 || (key >> (shift + 8)) == prefix;
      }
      const unsigned bin = key >> shift & 0xffu;
      // Scores share their leading bits, so a warp mostly hits one bin: one atomic for all lanes with the same bin.
      const unsigned lanes = __ballot_sync(kFullMask, counts);
      if (counts) {
        const unsigned same = __match_any_sync(lanes, bin);
        if (lane == __ffs(same) - 1) atomicAdd(&shared.histogram[bin], __popc(same));
      }
    }
    __syncthreads();
    if (tid < kWarp) {
      // Lane l sums the bins from the top: 255 - 8 l down to 248 - 8 l.
      unsigned sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += shared.histogram[kRadixBins - 1 - (lane * 8 + i)];
      unsigned inclusive = sum;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const unsigned other = __shfl_up_sync(kFullMask, inclusive, offset);
        if (lane >= offset) inclusive += other;
      }
      unsigned before = inclusive - sum;  // keys in higher bins
      if (before < remaining && inclusive >= remaining) {
        for (int i = 0; i < 8; ++i) {
          const int bin = kRadixBins - 1 - (lane * 8 + i);
          if (before + shared.histogram[bin] >= remaining) {
            shared.bin = bin;
            shared.wanted = remaining - before;
            shared.count = shared.histogram[bin];
            break;
          }
          before += shared.histogram[bin];
        }
      }
    }
    __syncthreads();
    prefix = prefix << 8 | shared.bin;
    remaining = shared.wanted;
  }
  return {prefix, remaining, shared.count};
}

}  // namespace unique_attn
