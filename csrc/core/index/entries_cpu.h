// Index entries on the CPU: exact ones from keys; compressed ones written channel by channel, read vector by vector.
#pragma once

#include "core/cpu/tile.h"
#include "core/index/format.h"

namespace unique_attn {
namespace UA_ISA {

// Exact entry, as numbers of type Out, of a page whose keys start at `keys` and lie `stride` elements apart.
template <typename RuleT, typename T, typename Out>
UA_INLINE void encode_page(const T* keys, int64_t stride, int count, int head_dim, Out* entry) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  const V tokens(static_cast<Acc>(count));
  V terms(Acc(0));
  each_vector<Acc>(head_dim, [&](int d, auto part) __attribute__((always_inline)) {
    const T* column = keys + d;
    ChannelStats<V> stats;
    stats.min = stats.max = load(column, part);
    V sum(Acc(0));
    for (int j = 0; j < count; ++j) {
      const V x = load(column + j * stride, part);
      sum += x;
      stats.min = min_or_nan(stats.min, x);
      stats.max = max_or_nan(stats.max, x);
    }
    stats.mean = sum / tokens;
    V squares(Acc(0));
    for (int j = 0; j < count; ++j) {
      const V diff = load(column + j * stride, part) - stats.mean;
      squares += diff * diff;
    }
    stats.var = squares / tokens;
    terms += RuleT::term(stats);
    V a, b(Acc(0));
    RuleT::encode(stats, a, b);
    store(entry + d, a, part);
    if constexpr (RuleT::kVectors > 1) store(entry + head_dim + d, b, part);
  });
  if constexpr (RuleT::kScalar) {
    // The whole slot is written, so that equal pages have equal bytes.
    alignas(64) Acc lanes[V::kLanes];
    store(lanes, RuleT::total(V(sum_lanes(terms))), Full());
    Out* slot = entry + RuleT::kVectors * head_dim;
    __builtin_memset(slot, 0, kScalarBytes);
    from_scalar(stored_scalar(lanes[0], Acc(largest_number(Out()))), *slot);
  }
}

// The compressed entry of a page with these means and standard deviations `[head_dim]`.
template <typename RuleT, typename Acc>
UA_INLINE void compress_entry(const Acc* means, const Acc* stds, int head_dim, uint8_t* entry) {
  constexpr bool kSpreads = RuleT::kVectors > 1;
  const int channels = group_channels(head_dim);
  // All of it is written, so that equal pages have equal bytes.
  __builtin_memset(entry, 0, compressed_entry_bytes(kSpreads, head_dim));
  uint8_t* mean_codes = entry + means_offset(head_dim);
  uint8_t* std_codes = entry + spreads_offset(head_dim);
  for (int first = 0; first < head_dim; first += channels) {
    const int end = min_of(first + channels, head_dim);
    float outlier = 0.f, rest = 0.f, spread = 0.f, checked = 0.f;
    for (int d = first; d < end; ++d) {
      const float x = static_cast<float>(means[d]), y = static_cast<float>(stds[d]);
      checked += x * 0.f + y * 0.f;  // NaN if one of them is not finite
      if (d == first) {
        outlier = x;
      } else if (__builtin_fabsf(x) > __builtin_fabsf(outlier)) {
        rest = __builtin_fabsf(outlier);
        outlier = x;
      } else if (__builtin_fabsf(x) > rest) {
        rest = __builtin_fabsf(x);
      }
      if (RuleT::kScalar) spread += y * y;
      if (kSpreads && y > spread) spread = y;
    }
    if (RuleT::kScalar) spread = __builtin_sqrtf(spread);
    const bool finite = checked == checked && spread * 0.f == 0.f;
    const GroupScales scales = group_scales(finite, outlier, rest, spread, RuleT::kScalar);
    __builtin_memcpy(entry + first / channels * sizeof(scales), &scales, sizeof(scales));
    const GroupValues values(scales);
    for (int d = first; d < end; ++d) {
      const int code = values.mean_code(static_cast<float>(means[d]));
      mean_codes[d / 2] |= static_cast<uint8_t>((code & 15) << d % 2 * 4);
      if (kSpreads) std_codes[d / 4] |= static_cast<uint8_t>(values.std_code(static_cast<float>(stds[d])) << d % 4 * 2);
    }
  }
}

// Lane i: bits [i * kWidth, (i + 1) * kWidth) of the bytes at `codes`, of which a vector's worth (or half) is read.
template <int kWidth, typename Part, int... I>
UA_INLINE Raw32 unpack_codes(const uint8_t* codes, Part, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I);
  constexpr int kBytes = kLanes * kWidth / 8 / (std::is_same_v<Part, Half> ? 2 : 1);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, codes, kBytes);
  Raw32 each = Raw32{} + static_cast<uint32_t>(bits);
  if constexpr (kLanes * kWidth > 32) {
    const Raw32 second = {(I * kWidth >= 32 ? ~0u : 0u)...};
    each = second ? Raw32{} + static_cast<uint32_t>(bits >> 32) : each;
  }
  const Raw32 shifts = {(I * kWidth % 32)...};
  return each >> shifts & ((1u << kWidth) - 1);
}

UA_INLINE Vec<float> to_floats(Raw32 codes) {
  return Vec<float>(__builtin_convertvector((Vec<float>::Bits)codes, Vec<float>::Raw));
}

// Elements between decoded entries: each has the parts of an exact entry.
template <typename RuleT, typename Acc>
UA_INLINE int64_t decoded_stride(int head_dim) {
  return round_up(RuleT::kVectors * head_dim + RuleT::kScalar, 64 / sizeof(Acc));
}

// What a compressed entry says, as the exact entry's vectors. Returns the squared scalar.
template <typename RuleT>
UA_INLINE double decode_vectors(const uint8_t* entry, int head_dim, float* row) {
  using V = Vec<float>;
  const std::make_integer_sequence<int, V::kLanes> lanes;
  const int channels = group_channels(head_dim);
  const uint8_t* mean_codes = entry + means_offset(head_dim);
  const uint8_t* std_codes = entry + spreads_offset(head_dim);
  double squares = 0;
  GroupValues values(GroupScales{0, 0, 0});
  each_vector<float>(head_dim, [&](int d, auto part) __attribute__((always_inline)) {
    if (d % channels == 0) {  // a group is whole vectors
      GroupScales scales;
      __builtin_memcpy(&scales, entry + d / channels * sizeof(scales), sizeof(scales));
      values = GroupValues(scales);
      if (RuleT::kScalar) squares += double{values.spread} * values.spread;
    }
    const Raw32 codes = unpack_codes<4>(mean_codes + d / 2, part, lanes);
    const V means = (to_floats(codes ^ 8u) - V(8.f)) * V(values.step);
    store(row + d, select(codes == 8u, V(values.outlier), means), part);
    if constexpr (RuleT::kVectors > 1) {
      const Raw32 spreads = unpack_codes<2>(std_codes + d / 4, part, lanes);
      const V stds = (to_floats(spreads) + V(1.f)) * V(values.spread);
      store(row + head_dim + d, select(spreads == 0u, V(values.low_spread), stds), part);
    }
  });
  return squares;
}

template <typename RuleT>
UA_INLINE void decode_entry(const uint8_t* entry, int head_dim, float* row) {
  const double squares = decode_vectors<RuleT>(entry, head_dim, row);
  if constexpr (RuleT::kScalar) row[head_dim] = static_cast<float>(__builtin_sqrt(squares));
}

template <typename RuleT>
UA_INLINE void decode_entry(const uint8_t* entry, int head_dim, double* row) {
  float single[2 * kMaxHeadDim];
  const double squares = decode_vectors<RuleT>(entry, head_dim, single);
  for (int i = 0; i < RuleT::kVectors * head_dim; ++i) row[i] = single[i];
  if constexpr (RuleT::kScalar) row[head_dim] = __builtin_sqrt(squares);
}

}  // namespace UA_ISA
}  // namespace unique_attn
