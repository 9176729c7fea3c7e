// Selection of a row's best pages by a cluster of thread blocks, each of which holds the order keys of a stretch of the
// row, in page order. Two rounds of 8 bits find the key of the last page that is selected: every thread block counts
// its keys, all read all counts. No step depends on the order in which threads run, and ties go to the lower page.
#pragma once

#include "core/cuda/order_key.cuh"
#include "core/cuda/sm90/cluster.cuh"

namespace unique_attn {

constexpr int kBins = 256;

template <int kWarps>
struct SelectShared {
  static_assert(kWarps * kWarp >= kBins);
  unsigned counts[2][kBins];  // of a round; read by the whole cluster
  uint2 sums[kWarps];
  uint4 chosen;
};

#ifdef UA_HOPPER

// The bin of the wanted-th largest key of the cluster.
struct ChosenBin {
  int bin;
  int above;         // keys of the cluster in higher bins
  int above_before;  // those of thread blocks before this one
  int equal_before;  // keys in the bin, of thread blocks before this one
};

// All thread blocks have counted in `counts`.
template <int kWarps>
__device__ __forceinline__ ChosenBin choose_bin(SelectShared<kWarps>& shared, unsigned* counts, int wanted) {
  const int tid = threadIdx.x;
  const int lane = tid % kWarp;
  const int bin = kBins - 1 - tid;
  const int rank = cluster_rank(), size = cluster_size();
  uint2 mine = make_uint2(0, 0), upto;  // in this bin: of all thread blocks, and of those before this one
  if (tid < kBins) {
    unsigned there[kMaxCluster];
#pragma unroll
    for (int c = 0; c < kMaxCluster; ++c) there[c] = c < size ? *in_block(counts + bin, c) : 0u;
#pragma unroll
    for (int c = 0; c < kMaxCluster; ++c) {
      mine.x += there[c];
      mine.y += c < rank ? there[c] : 0u;
    }
    upto = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const unsigned x = __shfl_up_sync(kFullMask, upto.x, offset), y = __shfl_up_sync(kFullMask, upto.y, offset);
      if (lane >= offset) upto.x += x, upto.y += y;
    }
    if (lane == kWarp - 1) shared.sums[tid / kWarp] = upto;
  }
  __syncthreads();
  if (tid < kBins) {
#pragma unroll
    for (int w = 0; w < kBins / kWarp; ++w) {
      const uint2 sum = shared.sums[w];
      if (w < tid / kWarp) upto.x += sum.x, upto.y += sum.y;
    }
    const unsigned above = upto.x - mine.x;
    if (above < static_cast<unsigned>(wanted) && upto.x >= static_cast<unsigned>(wanted)) {
      shared.chosen = make_uint4(bin, above, upto.y - mine.y, mine.y);
    }
  }
  __syncthreads();
  const uint4 chosen = shared.chosen;
  return {static_cast<int>(chosen.x), static_cast<int>(chosen.y), static_cast<int>(chosen.z),
          static_cast<int>(chosen.w)};
}

// Of the keys of all thread blocks, of which there are more than `wanted`, the best: emit(place among the selected,
// place in `keys`), in the order of the pages, each by the thread block that holds it. Two barriers of the cluster; the
// first may be taken as one of those that other thread blocks' shared memory has to wait for.
template <int kWarps, typename Emit>
__device__ __forceinline__ void cluster_select(SelectShared<kWarps>& shared, const uint16_t* keys, int count,
                                               int wanted, const Emit& emit) {
  constexpr int kThreads = kWarps * kWarp;
  const int tid = threadIdx.x;
  const int lane = tid % kWarp;
  const int warp = tid / kWarp;
  for (int i = tid; i < 2 * kBins; i += kThreads) (&shared.counts[0][0])[i] = 0u;
  __syncthreads();
  for (int i = tid; i < count; i += kThreads) atomicAdd(&shared.counts[0][keys[i] >> 8], 1u);
  cluster_sync();
  const ChosenBin high = choose_bin(shared, shared.counts[0], wanted);
  for (int i = tid; i < count; i += kThreads) {
    if (keys[i] >> 8 == high.bin) atomicAdd(&shared.counts[1][keys[i] & (kBins - 1)], 1u);
  }
  cluster_sync();
  const ChosenBin low = choose_bin(shared, shared.counts[1], wanted - high.above);
  const int last = high.bin << 8 | low.bin;
  const int ties = wanted - high.above - low.above;  // keys equal to the last that are selected

  // Every warp has a stretch of whole groups of lanes.
  const int per_warp = ((count + kWarps - 1) / kWarps + kWarp - 1) / kWarp * kWarp;
  const int begin = min(warp * per_warp, count), end = min(begin + per_warp, count);
  unsigned num_above = 0, num_equal = 0;
  for (int base = begin; base < end; base += kWarp) {
    const int key = base + lane < end ? keys[base + lane] : -1;
    num_above += __popc(__ballot_sync(kFullMask, key > last));
    num_equal += __popc(__ballot_sync(kFullMask, key == last));
  }
  if (lane == 0) shared.sums[warp] = make_uint2(num_above, num_equal);
  __syncthreads();
  int above = high.above_before + low.above_before, equal = low.equal_before;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint2 sum = shared.sums[w];
    if (w < warp) above += sum.x, equal += sum.y;
  }
  if (num_above + num_equal == 0) return;
  const unsigned lower_lanes = (1u << lane) - 1u;
  for (int base = begin; base < end; base += kWarp) {
    const int key = base + lane < end ? keys[base + lane] : -1;
    const unsigned above_lanes = __ballot_sync(kFullMask, key > last);
    const unsigned equal_lanes = __ballot_sync(kFullMask, key == last);
    const int equal_rank = equal + __popc(equal_lanes & lower_lanes);
    if (key > last || (key == last && equal_rank < ties)) {
      emit(above + __popc(above_lanes & lower_lanes) + min(equal_rank, ties), base + lane);
    }
    above += __popc(above_lanes);
    equal += __popc(equal_lanes);
  }
}

#endif  // UA_HOPPER

}  // namespace unique_attn
