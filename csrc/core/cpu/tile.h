// What the CPU kernels share: dtype dispatch, scratch memory, and the register tile that meets rows of
// queries with rows of keys or index entries.
#pragma once

#include <new>

#include "core/cpu/simd.h"
#include "core/dispatch.h"
#include "core/exec.h"

#define UA_DISPATCH_CPU_DTYPE(dtype, T, ...)                                                 \
  if ((dtype) == ::unique_attn::DType::kFloat64) {                                           \
    using T = double;                                                                        \
    __VA_ARGS__;                                                                             \
  } else {                                                                                   \
    UA_DISPATCH_DTYPE(dtype, T, float, ::unique_attn::BF16, ::unique_attn::F16, __VA_ARGS__) \
  }

namespace unique_attn {
namespace UA_ISA {

// Scratch memory of one range of work, aligned to cache lines.
class Scratch {
 public:
  UA_INLINE explicit Scratch(int64_t bytes)
      : memory_(::operator new(static_cast<size_t>(bytes > 0 ? bytes : 1), std::align_val_t(64))), next_(memory_) {}
  UA_INLINE ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements; the caller's sum of padded sizes must not pass what was allocated.
  template <typename T>
  UA_INLINE T* take(int64_t count) {
    T* taken = static_cast<T*>(next_);
    next_ = static_cast<char*>(next_) + padded<T>(count);
    return taken;
  }
  template <typename T>
  UA_INLINE static int64_t padded(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  void* memory_;
  void* next_;
};

// Items per range, so that starting a thread costs little beside a range. `work`: multiply-adds per item.
UA_INLINE int64_t grain_for(int64_t work) {
  constexpr int64_t kWorkPerRange = 1 << 18;
  return work >= kWorkPerRange ? 1 : kWorkPerRange / (work > 0 ? work : 1);
}

UA_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Channels of a cache line.
template <typename T>
UA_INLINE constexpr int line_channels() {
  return 64 / static_cast<int>(sizeof(T));
}

// Rows to bring into cache while others are worked on, row i with the i-th of those. The list is padded as lists of
// entries are.
template <typename T>
struct Ahead {
  const T* const* rows;
  int count;
  int channels;  // of a row

  // The rows from `begin` on, or null.
  UA_INLINE const T* const* from(int begin) const { return begin < count ? rows + begin : nullptr; }
  // Fetches the rows from `begin` on at once, and is done.
  UA_INLINE void finish(int begin) {
    for (int i = begin; i < count; ++i) {
      for (int d = 0; d < channels; d += line_channels<T>()) __builtin_prefetch(rows[i] + d);
    }
    count = 0;
  }
};

// Rows of q as accumulators, each padded with zeros to whole vectors. `stride`: elements between rows of q.
template <typename T>
UA_INLINE void widen_rows(const T* q, int64_t stride, int rows, int head_dim, AccOf<T>* out, int out_stride) {
  for (int row = 0; row < rows; ++row) {
    each_vector<AccOf<T>>(head_dim, [&](int d, auto part) __attribute__((always_inline)) {
      store(out + int64_t{row} * out_stride + d, load(q + row * stride + d, part), Full());
    });
  }
}

// A tile keeps this many sums in registers; the rest of them hold operands.
constexpr int kTileSums = kVectorRegisters / 2;

// sums[s][row][entry] (s: u and, if the rule has it, v) of kRows rows of q and kTileSums / (kSums * kRows) entries.
// `ahead` (or null) is prefetched line by line, because a burst of prefetches would stall the sums.
template <typename RuleT, int kRows, typename T>
UA_INLINE void tile_sums(const T* const* entries, const AccOf<T>* q, int q_stride, int head_dim, const T* const* ahead,
                         AccOf<T>* sums) {
  using V = Vec<AccOf<T>>;
  constexpr int kEntries = kTileSums / (RuleT::kSums * kRows);
  constexpr int kCells = kRows * kEntries;
  V acc[kTileSums];
  UA_UNROLL
  for (int i = 0; i < kTileSums; ++i) acc[i] = V(AccOf<T>(0));
  each_vector<AccOf<T>>(head_dim, [&](int d, auto part) __attribute__((always_inline)) {
    V query[kRows];
    UA_UNROLL
    for (int row = 0; row < kRows; ++row) query[row] = load(q + row * q_stride + d, Full());
    if (ahead != nullptr && d % line_channels<T>() == 0) {
      UA_UNROLL
      for (int e = 0; e < kEntries; ++e) {
        __builtin_prefetch(ahead[e] + d);
        if constexpr (RuleT::kVectors > 1) __builtin_prefetch(ahead[e] + head_dim + d);
      }
    }
    UA_UNROLL
    for (int e = 0; e < kEntries; ++e) {
      const V a = load(entries[e] + d, part);
      V b(AccOf<T>(0));
      if constexpr (RuleT::kVectors > 1) b = load(entries[e] + head_dim + d, part);
      UA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        V unused(AccOf<T>(0));
        const int cell = row * kEntries + e;
        RuleT::accumulate(query[row], a, b, acc[cell],
                          RuleT::kSums > 1 ? acc[kCells * (RuleT::kSums - 1) + cell] : unused);
      }
    }
  });
  static_assert(kTileSums % V::kLanes == 0, "sums leave the tile as whole vectors");
  UA_UNROLL
  for (int i = 0; i < kTileSums; i += V::kLanes) store(sums + i, sum_each<V::kLanes, 1>(acc + i), Full());
}

// Most entries of a tile. Lists of entries are padded to a multiple of it with anything readable.
constexpr int kMaxTile = 16;

// Where sums go: at data[s * rule_stride + row * row_stride + entry].
template <typename Acc>
struct Sums {
  Acc* data;
  int64_t row_stride;
  int64_t rule_stride;
};

// Sums of kRows rows of q with `count` entries; those past `count` up to a multiple of kMaxTile are arbitrary.
template <typename RuleT, int kRows, typename T>
UA_INLINE void sum_rows(const T* const* entries, int count, const AccOf<T>* q, int q_stride, int head_dim,
                        Ahead<T>& ahead, Sums<AccOf<T>> sums) {
  using Acc = AccOf<T>;
  constexpr int kEntries = kTileSums / (RuleT::kSums * kRows);
  static_assert(kEntries <= kMaxTile, "entries are padded to whole tiles");
  for (int e = 0; e < count; e += kEntries) {
    alignas(64) Acc tile[kTileSums];
    tile_sums<RuleT, kRows>(entries + e, q, q_stride, head_dim, ahead.from(e), tile);
    UA_UNROLL
    for (int s = 0; s < RuleT::kSums; ++s) {
      UA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        __builtin_memcpy(sums.data + s * sums.rule_stride + row * sums.row_stride + e,
                         tile + (s * kRows + row) * kEntries, kEntries * sizeof(Acc));
      }
    }
  }
  ahead.finish(count);
}

// Rows are met in fours, so buffers of rows hold this many; the last ones may be arbitrary.
UA_INLINE int padded_rows(int rows) { return rows < 3 ? rows : static_cast<int>(round_up(rows, 4)); }

// sum_rows for any number of rows.
template <typename RuleT, typename T>
UA_INLINE void sum_all_rows(const T* const* entries, int count, const AccOf<T>* q, int rows, int q_stride, int head_dim,
                            Ahead<T> ahead, Sums<AccOf<T>> sums) {
  for (int row = 0; row < rows;) {
    if (rows - row >= 3) {
      sum_rows<RuleT, 4>(entries, count, q, q_stride, head_dim, ahead, sums);
      row += 4;
      q += 4 * q_stride;
      sums.data += 4 * sums.row_stride;
    } else if (rows - row == 2) {
      sum_rows<RuleT, 2>(entries, count, q, q_stride, head_dim, ahead, sums);
      row += 2;
    } else {
      sum_rows<RuleT, 1>(entries, count, q, q_stride, head_dim, ahead, sums);
      row += 1;
    }
  }
}

}  // namespace UA_ISA
}  // namespace unique_attn
