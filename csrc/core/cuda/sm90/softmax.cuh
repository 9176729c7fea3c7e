// The online softmax of attention over tiles, on accumulators of wgmma.
#pragma once

#include "core/cuda/math.cuh"
#include "core/cuda/sm90/wgmma.cuh"

namespace unique_attn {

#ifdef UA_HOPPER

// Logits of a tile in base 2 become weights relative to the largest logit so far, `m` of this thread's two rows; `l` is
// the sum of the weights of this thread's columns. What was summed before is to be multiplied by `correction`. Nothing
// seen yet: weights of 0, not NaN.
template <int kRegisters>
__device__ __forceinline__ void online_softmax(float (&s)[kRegisters], float (&m)[2], float (&l)[2],
                                               float (&correction)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = m[half];
#pragma unroll
    for (int n = 0; n < kRegisters / 4; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
    const float offset = top == -INFINITY ? 0.f : top;
    correction[half] = exp2_fast(m[half] - offset);
    m[half] = top;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kRegisters / 4; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = 4 * n + 2 * half + c;
        s[i] = exp2_fast(s[i] - offset);
        sum += s[i];
      }
    }
    l[half] = l[half] * correction[half] + sum;
  }
}

#endif  // UA_HOPPER

}  // namespace unique_attn
