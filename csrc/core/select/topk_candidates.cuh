// A list of candidates in shared memory: more of them than are wanted, in any order, no two equal. What is computed
// from it does not depend on the order. Every function here is called by all threads of the block.
#pragma once

#include "core/cuda/vec.cuh"

namespace unique_attn {

// A candidate as one integer, larger if better. 32 bits hold a bf16 score and one of 2^16 pages.
template <typename Entry>
struct Packing {
  int page_bits;

  __device__ __forceinline__ explicit Packing(int row_pages) { page_bits = 32 - __clz(row_pages - 1); }
  __device__ __forceinline__ unsigned last_page() const { return (1u << page_bits) - 1u; }
  __device__ __forceinline__ Entry pack(unsigned key, unsigned page) const {
    return static_cast<Entry>(key) << page_bits | (last_page() - page);
  }
  __device__ __forceinline__ unsigned key(Entry entry) const { return static_cast<unsigned>(entry >> page_bits); }
  __device__ __forceinline__ unsigned page(Entry entry) const {
    return last_page() - (static_cast<unsigned>(entry) & last_page());
  }
};

constexpr int smaller(int a, int b) { return a < b ? a : b; }

template <typename Tile, typename EntryT>
struct Candidates {
  using Entry = EntryT;
  static constexpr int kMaxWanted = smaller(Tile::kThreads / 2, 2048 / Tile::kScores);
  static constexpr int kLimit = kMaxWanted * 3 / 2;  // of threads that reach the bound; of candidates when narrowed
  static constexpr int kCapacity = kLimit * (Tile::kScores + 1);
  alignas(16) Entry candidates[kCapacity];
  alignas(16) Entry best[kLimit];
  alignas(16) unsigned pages[kMaxWanted];  // bitwise not of the selected ones
  uint2 warps[Tile::kThreads / kWarp];
  int sums[3][Tile::kThreads / kWarp];
  int num_candidates, num_best;
};

// Smallest and largest key of the block, in two parts with a barrier between. Threads without a key give (~0, 0).
template <typename S>
__device__ __forceinline__ void put_key_range(S& shared, unsigned low, unsigned high) {
  low = __reduce_min_sync(kFullMask, low);
  high = __reduce_max_sync(kFullMask, high);
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = make_uint2(low, high);
}
template <int kThreads, typename S>
__device__ __forceinline__ uint2 get_key_range(const S& shared) {
  const int lane = threadIdx.x % kWarp;
  const uint2 range = lane < kThreads / kWarp ? shared.warps[lane] : make_uint2(~0u, 0u);
  return make_uint2(__reduce_min_sync(kFullMask, range.x), __reduce_max_sync(kFullMask, range.y));
}

// Sum over the block. Between two calls with the same of the three slots there must be a barrier, if only that of
// another call.
template <int kThreads, typename S>
__device__ __forceinline__ int block_sum(S& shared, int slot, int x) {
  const int lane = threadIdx.x % kWarp;
  x = __reduce_add_sync(kFullMask, x);
  if (lane == 0) shared.sums[slot][threadIdx.x / kWarp] = x;
  __syncthreads();
  return __reduce_add_sync(kFullMask, lane < kThreads / kWarp ? shared.sums[slot][lane] : 0);
}

struct Narrowed {
  int count;
  unsigned next_key;  // least key by which a later page can still be selected
};

// Copies the best of the candidates to shared.best: at least `wanted`, at most `limit`. There are more than that.
template <int kThreads, typename S>
__device__ Narrowed narrow(S& shared, Packing<typename S::Entry> packing, int num_candidates, int wanted, int limit) {
  using Entry = typename S::Entry;
  const int tid = threadIdx.x;
  unsigned low_key = ~0u, high_key = 0u;
#pragma unroll 1
  for (int i = tid; i < num_candidates; i += kThreads) {
    const unsigned key = packing.key(shared.candidates[i]);
    low_key = min(low_key, key);
    high_key = max(high_key, key);
  }
  put_key_range(shared, low_key, high_key);
  if (tid == 0) shared.num_best = 0;
  __syncthreads();
  const uint2 range = get_key_range<kThreads>(shared);
  Entry low = packing.pack(range.x, packing.last_page()), high = packing.pack(range.y, 0u) + 1u, middle;
  for (int turn = 0;; ++turn) {  // ends, as candidates differ
    middle = low + (high - low) / 2u;
    int count = 0;
#pragma unroll 1
    for (int i = tid; i < num_candidates; i += kThreads) count += shared.candidates[i] >= middle;
    count = block_sum<kThreads>(shared, turn % 2, count);
    if (count > limit) {
      low = middle;
    } else if (count < wanted) {
      high = middle;
    } else {
      break;
    }
  }
#pragma unroll 1
  for (int i = tid; i < num_candidates; i += kThreads) {
    const Entry entry = shared.candidates[i];
    if (entry >= middle) shared.best[atomicAdd(&shared.num_best, 1)] = entry;
  }
  __syncthreads();
  return {shared.num_best, packing.key(middle) + 1u};
}

// How many of values[0, n) are greater than values[element], n <= kThreads. Teams of up to 4 threads count for one
// element; `element` is -1 in all but one thread of a team.
template <int kThreads, typename T>
__device__ __forceinline__ int count_greater(const T* values, int n, int& element) {
  constexpr int kPack = 16 / sizeof(T);
  struct alignas(16) Pack {
    T values[kPack];
  };
  const int shift = 4 * n <= kThreads ? 2 : 2 * n <= kThreads ? 1 : 0;
  const int team = 1 << shift;
  const int tid = threadIdx.x;
  const int part = tid & (team - 1);
  element = tid >> shift;
  int greater = 0;
  if (element < n) {
    const T mine = values[element];
    const int packs = n / kPack;
#pragma unroll 2
    for (int i = part; i < packs; i += team) {
      const Pack pack = reinterpret_cast<const Pack*>(values)[i];
#pragma unroll
      for (int j = 0; j < kPack; ++j) greater += pack.values[j] > mine;
    }
    for (int i = packs * kPack + part; i < n; i += team) greater += values[i] > mine;
  }
  if (shift >= 1) greater += __shfl_xor_sync(kFullMask, greater, 1);
  if (shift >= 2) greater += __shfl_xor_sync(kFullMask, greater, 2);
  if (element >= n || part != 0) element = -1;
  return greater;
}

}  // namespace unique_attn
