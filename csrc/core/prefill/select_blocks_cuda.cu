// One warp serves a row of shares. Where all that a threshold asks for is kept, two passes over the row do; else the
// cut is found by halving the range of keys, a pass each, in the cache.
#include "core/cuda/vec.cuh"
#include "core/prefill/select_blocks.h"

namespace unique_attn {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

__global__ void __launch_bounds__(kThreads) select_blocks_kernel(const SelectBlocksParams p, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (item >= items) return;
  const int lane = threadIdx.x % kWarp;
  const SelectRow row = select_row(p, p.first_slot + static_cast<int>(item / p.num_heads));
  const float* shares = static_cast<const float*>(p.shares) + item * p.key_blocks;
  const auto key_of = [&](int block) { return row.forces(block) ? kForcedKey : share_key(shares[block]); };
  const auto units_of = [&](int block) { return fixed_share(share_key(shares[block])); };

  const uint32_t threshold = share_key(p.threshold);
  uint64_t total = 0;
  int at_threshold = 0;
  for (int block = lane; block < row.visible; block += kWarp) {
    total += units_of(block);
    at_threshold += p.threshold <= 1.f && key_of(block) >= threshold;
  }
  total = warp_sum(total);
  at_threshold = __reduce_add_sync(kFullMask, at_threshold);

  const SelectGoal goal = select_goal(p, row, at_threshold, total);
  SelectCut cut{threshold, INT32_MAX};
  if (p.threshold > 1.f || at_threshold != goal.count || at_threshold > goal.most) {
    cut = select_cut(goal, [&](uint32_t key) {
      CountAndSum sum{0, 0};
      for (int block = lane; block < row.visible; block += kWarp) {
        const bool in = key_of(block) >= key;
        sum.count += in;
        sum.sum += in ? units_of(block) : 0;
      }
      return CountAndSum{static_cast<int>(__reduce_add_sync(kFullMask, sum.count)), warp_sum(sum.sum)};
    });
  }

  uint32_t* mask = p.mask + item * p.mask_words;
  uint64_t sum = 0;
  int ties = cut.ties;  // still to come
  for (int word = 0; word < p.mask_words; ++word) {
    const int block = word * kMaskBits + lane;
    const bool visible = block < row.visible;
    const uint32_t key = visible ? key_of(block) : 0u;
    const unsigned equal = __ballot_sync(kFullMask, visible && key == cut.key);
    const bool tied = (equal >> lane & 1u) != 0 && __popc(equal & ((1u << lane) - 1u)) < ties;
    const bool keeps = visible && (key > cut.key || tied);
    const unsigned bits = __ballot_sync(kFullMask, keeps);
    ties -= min(ties, __popc(equal));
    if (keeps) sum += units_of(block);
    if (lane == 0) mask[word] = bits;
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    p.kept[item] = total == 0 ? 1.f : static_cast<float>(static_cast<double>(sum) / static_cast<double>(total));
  }
}

}  // namespace

cudaError_t select_blocks_cuda(const SelectBlocksParams& params, cudaStream_t stream) {
  const int64_t items = int64_t{params.end_slot - params.first_slot} * params.num_heads;
  if (items == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((items + kWarps - 1) / kWarps);
  select_blocks_kernel<<<blocks, kThreads, 0, stream>>>(params, items);
  return cudaGetLastError();
}

}  // namespace unique_attn
