// Selection by one thread block per row that reads the row once. Scores have an order key, and ties go to the lower
// page, so no two candidates are equal. The row comes in chunks, each held in registers while the next one is loaded:
//   1. A running lower bound of the keys that can still be selected lets most of a chunk go at once.
//   2. If more than about 1.5 times the wanted number of threads hold something at the bound or above, as always in the
//      first chunk of a long row, the bound is raised: bisection, over the largest key of each thread, until the number
//      of threads that reach it lies between the wanted number and that limit. That takes few steps, as any such bound
//      will do. Where equal keys do not allow one, it is a key and the place in the chunk up to which that key counts.
//   3. What remains goes to a list of candidates in shared memory, in any order. Before it can overflow, it is narrowed
//      by bisection too.
// At the end a long list is narrowed, the rank of a candidate is the number of better ones, and the selected pages go
// to their rank among themselves. Nothing depends on the order of the list, hence not on that in which threads run.
#include <climits>
#include <type_traits>

#include "core/cuda/launch.cuh"
#include "core/select/topk_candidates.cuh"
#include "core/select/topk_plan.h"
#include "core/select/topk_row.cuh"
#include "core/select/topk_tile.cuh"

namespace unique_attn {
namespace {

constexpr int kMaxRanked = 128;  // for more wanted pages bisection goes on to the end, as ranks cost the square
constexpr int kValueSteps = 6;   // of bisection by values; then by keys

// Scores of a key above `key`, and those equal to it in vectors of the chunk before `tie_end`.
struct Bound {
  unsigned key;
  int tie_end;
};

// A bound that at least `wanted` scores reach, but few: at most `limit` threads, or, where it has ties, about as many
// scores. More than `limit` threads reach range.x. `mine`: the thread's largest key. Every path has a barrier after
// `range` was read.
template <typename Tile, typename S>
__device__ __forceinline__ Bound raise_bound(const Tile& tile, unsigned mine, uint2 range, int wanted, int limit,
                                             S& shared) {
  using Score = typename Tile::Score;
  using Word = typename Tile::Word;
  unsigned low = range.x, high = range.y + 1u;  // more than `limit` threads reach low, fewer than `wanted` high
  // Scores of a usual distribution take few steps by their values, others by their keys, which are far apart around 0.
  const float score = key_score<Score>(mine);
  float least = key_score<Score>(range.x), greatest = key_score<Score>(range.y);
  for (int step = 0; step < kValueSteps; ++step) {
    const float middle = 0.5f * least + 0.5f * greatest;
    if (!(middle > least && middle < greatest)) break;
    const int count = __syncthreads_count(score >= middle);
    if (count > limit) {
      least = middle;
      low = Word::least_key(middle);
    } else if (count < wanted) {
      greatest = middle;
      high = Word::least_key(middle);
    } else {
      return {Word::least_key(middle), INT_MAX};
    }
  }
  while (high - low > 1u) {
    // From -inf the next number is far.
    const unsigned middle = low == kLowestKey<Score> ? low + 1u : low + (high - low) / 2u;
    const int count = __syncthreads_count(mine >= middle);
    if (count > limit) {
      low = middle;
    } else if (count < wanted) {
      high = middle;
    } else {
      return {middle, INT_MAX};
    }
  }
  int above = 0, ties[Tile::kVectors];
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    const int larger = __popc(tile.bits_at_least(v, low + 1u));
    above += larger;
    ties[v] = __popc(tile.bits_at_least(v, low)) - larger;
  }
  int few = -1, many = Tile::kVectors * Tile::kThreads;  // by the tie_end at `many`, more than `limit` scores
  for (int turn = 0, middle = 0;; ++turn) {
    int count = above;
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) count += Tile::vector_start(v) / Tile::kWidth < middle ? ties[v] : 0;
    count = block_sum<Tile::kThreads>(shared, turn % 2, count);
    if (count < wanted) {
      few = middle;
    } else if (count <= limit || middle == 0) {
      return {low, middle};
    } else {
      many = middle;
    }
    middle = (few + many) / 2;
  }
}

// One bit for each score of the thread that reaches `bound` and has a key of at least `lowest`.
template <typename Tile>
__device__ __forceinline__ unsigned reaching_scores(const Tile& tile, unsigned mine, Bound bound, unsigned lowest) {
  unsigned bits = 0;
  if (mine >= max(bound.key, lowest)) {
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) {
      const bool ties = Tile::vector_start(v) / Tile::kWidth < bound.tie_end;
      bits |= tile.bits_at_least(v, max(ties ? bound.key : bound.key + 1u, lowest));
    }
  }
  return bits;
}

// Appends the scores whose bits are set in `left`.
template <typename Tile, typename S>
__device__ __forceinline__ void append(const Tile& tile, unsigned left, int first_page,
                                       Packing<typename S::Entry> packing, S& shared) {
  const int lane = threadIdx.x % kWarp;
  const int sum = __reduce_add_sync(kFullMask, __popc(left));
  if (sum == 0) return;
  int at = lane == 0 ? atomicAdd(&shared.num_candidates, sum) : 0;
  at = __shfl_sync(kFullMask, at, 0);
  while (true) {
    const unsigned lanes = __ballot_sync(kFullMask, left != 0u);
    if (lanes == 0u) break;
    if (left != 0u) {
      const int bit = __ffs(left) - 1;
      left &= left - 1u;
      shared.candidates[at + __popc(lanes & ((1u << lane) - 1u))] =
          packing.pack(tile.key(bit), static_cast<unsigned>(first_page + Tile::place(bit)));
    }
    at += __popc(lanes);
  }
}

// Rows with fewer numbers than wanted pages: all of them, and the first `ties` of the NaN.
template <int kThreads, typename Score, typename S>
__device__ void select_with_nan(const Score* scores, int low, int high, int wanted, int ties, const RowOutput& output,
                                int at, S& shared) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const unsigned lower_lanes = (1u << lane) - 1u;
  int numbers = 0, nans = 0;  // so far
  for (int base = low; base < high && numbers + min(nans, ties) < wanted; base += kThreads) {
    const int page = base + static_cast<int>(threadIdx.x);
    const bool is_number = page < high && order_key(scores[page]) != 0u;
    const bool is_nan = page < high && !is_number;
    const unsigned number_lanes = __ballot_sync(kFullMask, is_number);
    const unsigned nan_lanes = __ballot_sync(kFullMask, is_nan);
    __syncthreads();
    if (lane == 0) shared.warps[warp] = make_uint2(__popc(number_lanes), __popc(nan_lanes));
    __syncthreads();
    int numbers_before = numbers + __popc(number_lanes & lower_lanes),
        nans_before = nans + __popc(nan_lanes & lower_lanes);
#pragma unroll 1
    for (int w = 0; w < kThreads / kWarp; ++w) {
      const uint2 sum = shared.warps[w];
      numbers += sum.x, nans += sum.y;
      if (w < warp) numbers_before += sum.x, nans_before += sum.y;
    }
    if (is_number || (is_nan && nans_before < ties)) output.emit(at + numbers_before + min(nans_before, ties), page);
  }
}

// The `wanted` best of scores[low, high), of which there are more. `tile` holds the row from `origin` on, counted like
// `shift`, by which the row begins after the first of its vectors.
template <bool kOneChunk, typename Tile, typename S>
__device__ __forceinline__ void select_row(Tile& tile, const typename Tile::Score* row, int origin, int shift,
                                           int readable, int low, int high, int wanted, const RowOutput& output, int at,
                                           S& shared) {
  using Score = typename Tile::Score;
  using Entry = typename S::Entry;
  constexpr int kThreads = Tile::kThreads;
  const int tid = threadIdx.x;
  const int limit = min(S::kLimit, wanted + wanted / 2 + 8);
  if (tid == 0) shared.num_candidates = 0;
  const Packing<Entry> packing(high);
  int count = 0;  // of candidates
  unsigned lowest = kLowestKey<Score>;
  while (true) {
    [[maybe_unused]] Tile next;
    const int next_origin = origin + Tile::kBlockScores;
    const bool more = !kOneChunk && next_origin < high + shift;
    if constexpr (!kOneChunk) {
      if (more) next.load(row, next_origin, high + shift, readable);
    }
    tile.keep(origin, low + shift, high + shift);
    const unsigned mine = tile.max_key();
    const bool reaches = mine >= lowest;
    put_key_range(shared, reaches ? mine : ~0u, reaches ? mine : 0u);
    const int threads = __syncthreads_count(reaches);
    if (threads > 0) {
      Bound bound{lowest, INT_MAX};
      if (threads > limit) {
        bound = raise_bound(tile, mine, get_key_range<kThreads>(shared), wanted, limit, shared);
      }
      const unsigned bits = reaching_scores(tile, mine, bound, lowest);
      if (threads > limit) lowest = bound.key + 1u;  // enough reach it, on lower pages than what follows
      if constexpr (!kOneChunk) {
        if (count + min(threads, limit) * Tile::kScores > S::kCapacity &&
            count + block_sum<kThreads>(shared, 2, __popc(bits)) > S::kCapacity) {
          const Narrowed narrowed = narrow<kThreads>(shared, packing, count, wanted, limit);
          for (int i = tid; i < narrowed.count; i += kThreads) shared.candidates[i] = shared.best[i];
          if (tid == 0) shared.num_candidates = narrowed.count;
          lowest = max(lowest, narrowed.next_key);
          __syncthreads();
        }
      }
      append(tile, bits, origin - shift, packing, shared);
      __syncthreads();
      count = shared.num_candidates;
    }
    if (!more) break;
    if constexpr (!kOneChunk) tile = next;
    origin = next_origin;
  }
  if (count < wanted) {
    select_with_nan<kThreads>(row + shift, low, high, wanted, wanted - count, output, at, shared);
    return;
  }

  const bool ranked = wanted <= kMaxRanked;
  const Entry* list = shared.candidates;
  if (count > (ranked ? min(2 * wanted + 32, kThreads) : wanted)) {
    count = narrow<kThreads>(shared, packing, count, wanted, ranked ? limit : wanted).count;
    list = shared.best;
  }
  int element;
  if (count > wanted) {
    const int rank = count_greater<kThreads>(list, count, element);
    if (element >= 0 && rank < wanted) shared.pages[rank] = ~packing.page(list[element]);
  } else if (tid < wanted) {
    shared.pages[tid] = ~packing.page(list[tid]);
  }
  __syncthreads();
  const int rank = count_greater<kThreads>(shared.pages, wanted, element);
  if (element >= 0) output.emit(at + rank, static_cast<int>(~shared.pages[element]));
}

// Of thread blocks per multiprocessor: as many as the registers of a thread (40 to 64) allow.
template <typename Tile, bool kOneChunk>
constexpr int kMinBlocks =
    (kOneChunk && Tile::kWords <= 8 ? (Tile::kThreads == 256 ? 1280 : 1536) : 1024) / Tile::kThreads;

// A row of scores where it lies. Vectors begin on their size, before the row's first score if that does not.
template <typename Score>
struct ScoreRow {
  const Score* vectors;
  int shift;     // of the first score
  int readable;  // scores from `vectors` on
};

// One row, by the first threads of the block, as many as `Tile` has.
template <bool kOneChunk, typename Tile, typename S>
__device__ __forceinline__ void select_pages(const TopkPagesParams& p, int b, int t,
                                             const ScoreRow<typename Tile::Score>& scores, int origin, S& shared) {
  Tile tile;
  tile.load(scores.vectors, origin, p.row_pages + scores.shift, scores.readable);
  const RowOutput output{p, b, p.pages + int64_t{blockIdx.x} * p.k};
  const RowPlan row = plan_row(p, b, t);
  const int wanted = row.k - row.sinks - row.recents;
  if (row.end - row.first > row.k && wanted > 0) {
    select_row<kOneChunk>(tile, scores.vectors, origin, scores.shift, scores.readable, row.first + row.sinks,
                          row.end - row.recents, wanted, output, row.sinks, shared);
  }
  output.emit_forced(row, Tile::kThreads - 1 - static_cast<int>(threadIdx.x), Tile::kThreads);
}

template <typename Tile, typename Entry, bool kOneChunk>
__global__ void __launch_bounds__(Tile::kThreads, kMinBlocks<Tile, kOneChunk>)
    topk_stream_kernel(const TopkPagesParams p, int64_t num_scores) {
  using Score = typename Tile::Score;
  wait_for_previous_kernel();
  const int head_rows = p.num_query_tokens * p.num_kv_heads;
  const int b = blockIdx.x / head_rows;
  const int t = blockIdx.x % head_rows / p.num_kv_heads;
  const int64_t begin = int64_t{blockIdx.x} * p.row_pages;
  const Score* first = static_cast<const Score*>(p.scores) + begin;
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(first) / sizeof(Score) % Tile::kWidth);
  const ScoreRow<Score> scores{first - shift, shift,
                               static_cast<int>(min(num_scores - begin, int64_t{INT_MAX} - Tile::kWidth)) + shift};
  const auto vector_of = [&](int page) { return (page + shift) / Tile::kWidth * Tile::kWidth; };
  if constexpr (kOneChunk) {
    __shared__ Candidates<Tile, Entry> shared;
    // The scores are on their way before the sequence's length is known, unless the row's beginning depends on it.
    select_pages<true, Tile>(p, b, t, scores, p.window == 0 ? 0 : vector_of(plan_row(p, b, t).first), shared);
  } else {
    // The row of a table with room for much more than there is: few threads have less to do in all.
    using Few = ScoreTile<Score, 256, Tile::kWidth, 1>;
    __shared__ union {
      Candidates<Tile, Entry> all;
      Candidates<Few, Entry> few;
    } shared;
    const RowPlan row = plan_row(p, b, t);
    const int origin = vector_of(row.first);
    if (row.end + shift - origin <= Few::kBlockScores && p.k <= Candidates<Few, Entry>::kMaxWanted) {
      if (threadIdx.x < Few::kThreads) select_pages<true, Few>(p, b, t, scores, origin, shared.few);
    } else {
      select_pages<false, Tile>(p, b, t, scores, origin, shared.all);
    }
  }
}

template <bool kOneChunk, typename Score, int kThreads, int kWidth, int kVectors>
cudaError_t launch(const TopkPagesParams& p, int64_t rows, cudaStream_t stream) {
  using Tile = ScoreTile<Score, kThreads, kWidth, kVectors>;
  using Entry = std::conditional_t<kOneChunk && sizeof(Score) == 2, unsigned, unsigned long long>;
  static_assert(!kOneChunk || Tile::kBlockScores <= 65536);
  return launch_dependent(topk_stream_kernel<Tile, Entry, kOneChunk>, dim3(static_cast<unsigned>(rows)), dim3(kThreads),
                          0, stream, p, rows * int64_t{p.row_pages});
}

template <typename Score>
cudaError_t launch(const TopkPagesParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t{p.batch} * p.num_query_tokens * p.num_kv_heads;
  const bool aligned = p.row_pages % 8 == 0 && reinterpret_cast<uintptr_t>(p.scores) % (8 * sizeof(Score)) == 0;
  DeviceFacts device;
  const cudaError_t error = device_facts(device);
  if (error != cudaSuccess) return error;
  constexpr bool kHalf = sizeof(Score) == 2;
  const StreamPlan plan = plan_topk_stream(p.k, p.row_pages + (aligned ? 0 : 7), kHalf, rows, device.multiprocessors);
  if (plan.threads == 0) return cudaErrorNotSupported;
  const auto is = [&](int threads, int width, int vectors, bool one_chunk) {
    return plan.threads == threads && plan.width == width && plan.vectors == vectors && plan.one_chunk == one_chunk;
  };
  if (is(256, 4, 1, true)) return launch<true, Score, 256, 4, 1>(p, rows, stream);
  if (is(256, 8, 1, true)) return launch<true, Score, 256, 8, 1>(p, rows, stream);
  if (is(512, 8, 2, true)) return launch<true, Score, 512, 8, 2>(p, rows, stream);
  if (is(512, 8, 1, false)) return launch<false, Score, 512, 8, 1>(p, rows, stream);
  if (is(512, 8, 2, false)) return launch<false, Score, 512, 8, 2>(p, rows, stream);
  if (is(1024, 4, 1, false)) return launch<false, Score, 1024, 4, 1>(p, rows, stream);
  if constexpr (kHalf) {
    if (is(128, 8, 1, true)) return launch<true, Score, 128, 8, 1>(p, rows, stream);
    if (is(256, 8, 2, true)) return launch<true, Score, 256, 8, 2>(p, rows, stream);
    if (is(256, 8, 4, true)) return launch<true, Score, 256, 8, 4>(p, rows, stream);
    if (is(512, 8, 4, false)) return launch<false, Score, 512, 8, 4>(p, rows, stream);
    if (is(1024, 8, 4, false)) return launch<false, Score, 1024, 8, 4>(p, rows, stream);
  } else {
    if (is(512, 8, 1, true)) return launch<true, Score, 512, 8, 1>(p, rows, stream);
    if (is(1024, 8, 2, false)) return launch<false, Score, 1024, 8, 2>(p, rows, stream);
  }
  return cudaErrorInvalidValue;  // a plan without a kernel
}

}  // namespace

cudaError_t topk_stream_cuda(const TopkPagesParams& params, cudaStream_t stream) {
  return params.dtype == DType::kFloat32 ? launch<float>(params, stream) : launch<__nv_bfloat16>(params, stream);
}

}  // namespace unique_attn
