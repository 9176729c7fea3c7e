// Page-scoring rules (UNIQUE section 3; `minmax` is Quest's bound). A rule is a small type with three parts:
//   phi     what the index entry of a page holds: up to two vectors and one scalar (encode)
//   psi     how one channel of a query meets one channel of an entry (accumulate)
//   h       how the two accumulated sums become a score (finish)
// index/format.h says how an entry is stored.
// Every kernel, CPU and CUDA, is a template over this type: a new rule is a new struct here, a case
// in dispatch.h and a name in csrc/ops/arguments.h. Acc is a number or a SIMD vector of them (simd.h), so the
// parts use only + * sqrt, comparisons and select.
#pragma once

#include <cmath>

#include "core/types.h"

namespace unique_attn {

// Statistics of one channel over the tokens of one page.
template <typename Acc>
struct ChannelStats {
  Acc mean;
  Acc var;  // (1/n) sum (k - mean)^2, two-pass
  Acc min;
  Acc max;
};

// The branch-free `condition ? a : b`; SIMD vectors overload it lane by lane.
template <typename Acc>
UA_HD Acc select(bool condition, Acc a, Acc b) {
  return condition ? a : b;
}

struct MeanRule {
  static constexpr int kVectors = 1;
  static constexpr int kSums = 1;  // u, or u and v
  static constexpr bool kScalar = false;
  static constexpr bool kCompressible = true;
  template <typename Acc>
  UA_HD static void encode(const ChannelStats<Acc>& s, Acc& a, Acc&) {
    a = s.mean;
  }
  template <typename Acc>
  UA_HD static void accumulate(Acc q, Acc a, Acc, Acc& u, Acc&) {
    u += q * a;
  }
  template <typename Acc>
  UA_HD static Acc finish(Acc u, Acc, Acc, Acc, Acc) {
    return u;
  }
};

// q . mean + lambda * norm(q) * std, with std = sqrt(sum_d var_d).
struct UniqueRule {
  static constexpr int kVectors = 1;
  static constexpr int kSums = 1;
  static constexpr bool kScalar = true;
  static constexpr bool kCompressible = true;
  template <typename Acc>
  UA_HD static void encode(const ChannelStats<Acc>& s, Acc& a, Acc&) {
    a = s.mean;
  }
  template <typename Acc>
  UA_HD static void accumulate(Acc q, Acc a, Acc, Acc& u, Acc&) {
    u += q * a;
  }
  template <typename Acc>
  UA_HD static Acc finish(Acc u, Acc, Acc scalar, Acc q_norm, Acc spread) {
    return u + spread * q_norm * scalar;
  }
};

// q . mean + c * sqrt(sum_d q_d^2 var_d). The entry holds std_d, not var_d: squaring a 16-bit key
// with an outlier channel would leave the range of fp16.
struct DirectionalRule {
  static constexpr int kVectors = 2;
  static constexpr int kSums = 2;
  static constexpr bool kScalar = false;
  static constexpr bool kCompressible = true;
  template <typename Acc>
  UA_HD static void encode(const ChannelStats<Acc>& s, Acc& a, Acc& b) {
    a = s.mean;
    b = sqrt(s.var);
  }
  template <typename Acc>
  UA_HD static void accumulate(Acc q, Acc a, Acc b, Acc& u, Acc& v) {
    u += q * a;
    const Acc qb = q * b;
    v += qb * qb;
  }
  template <typename Acc>
  UA_HD static Acc finish(Acc u, Acc v, Acc, Acc, Acc spread) {
    return u + spread * sqrt(v);
  }
};

// relu(q) . max - relu(-q) . min: an upper bound on q . k over the page.
struct MinMaxRule {
  static constexpr int kVectors = 2;
  static constexpr int kSums = 1;
  static constexpr bool kScalar = false;
  static constexpr bool kCompressible = false;
  template <typename Acc>
  UA_HD static void encode(const ChannelStats<Acc>& s, Acc& a, Acc& b) {
    a = s.max;
    b = s.min;
  }
  template <typename Acc>
  UA_HD static void accumulate(Acc q, Acc a, Acc b, Acc& u, Acc&) {
    u += q * select(q > Acc(0), a, b);
  }
  template <typename Acc>
  UA_HD static Acc finish(Acc u, Acc, Acc, Acc, Acc) {
    return u;
  }
};

}  // namespace unique_attn
