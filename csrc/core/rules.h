// Page-scoring rules (UNIQUE section 3; `minmax` is Quest's bound): the one table of them. A rule is a type that says
//   what it is called, and what its weight (lambda, c) is called and defaults to        kName, kWeightName, kWeight
//   what an index entry holds: one or two vectors of channels, perhaps one number       kVectors, kScalar
//     a, b of each channel (encode), and the number (total, of the sum of term)
//   how a channel of a query meets one of an entry, in one or two sums                  kSums, accumulate
//   how the sums become a score                                                         finish
//   which kernels beside the general ones know it                                  kForm, kCompressible, kTrainable
// Kernels are templates over the type, or look at these facts, and name no rule. A new rule is a type here with its
// place in AllRules: the ops, their checks and messages, and Python's table (build_info) follow. index/format.h says
// how entries are stored. Acc is a number or a SIMD vector of them (simd.h), so functions use only + * sqrt,
// comparisons and select.
#pragma once

#include <cmath>
#include <type_traits>

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

// What most rules share: one vector, one sum, no number.
struct RuleBase {
  static constexpr const char* kWeightName = "";
  static constexpr double kWeight = 0;
  static constexpr int kVectors = 1;
  static constexpr bool kScalar = false;
  static constexpr int kSums = 1;
  static constexpr ScoreForm kForm = ScoreForm::kGeneral;
  static constexpr bool kCompressible = false;
  static constexpr bool kTrainable = false;
  template <typename Acc>
  UA_HD static Acc term(const ChannelStats<Acc>&) {
    return Acc(0);
  }
  template <typename Acc>
  UA_HD static Acc total(Acc sum) {
    return sum;
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

// q . mean + weight * spread: matrix products give its sums, 4-bit and 2-bit codes its entry, and gradients reach the
// keys through mean and spread.
template <ScoreForm kFormT>
struct MeanAndSpread : RuleBase {
  static constexpr ScoreForm kForm = kFormT;
  static constexpr bool kScalar = kForm == ScoreForm::kScalarSpread;
  static constexpr int kVectors = kForm == ScoreForm::kVectorSpread ? 2 : 1;
  static constexpr int kSums = kVectors;
  static constexpr bool kCompressible = true;
  static constexpr bool kTrainable = true;
  // The entry holds std_d, not var_d: squaring a 16-bit key with an outlier channel would leave the range of fp16.
  template <typename Acc>
  UA_HD static void encode(const ChannelStats<Acc>& s, Acc& a, Acc& b) {
    a = s.mean;
    if constexpr (kVectors > 1) b = sqrt(s.var);
  }
  template <typename Acc>
  UA_HD static Acc term(const ChannelStats<Acc>& s) {
    return s.var;
  }
  template <typename Acc>
  UA_HD static Acc total(Acc sum) {
    return sqrt(sum);
  }
  template <typename Acc>
  UA_HD static void accumulate(Acc q, Acc a, Acc b, Acc& u, Acc& v) {
    u += q * a;
    if constexpr (kVectors > 1) {
      const Acc qb = q * b;
      v += qb * qb;
    }
  }
  template <typename Acc>
  UA_HD static Acc finish(Acc u, Acc v, Acc scalar, Acc q_norm, Acc weight) {
    if constexpr (kForm == ScoreForm::kScalarSpread) return u + weight * q_norm * scalar;
    if constexpr (kForm == ScoreForm::kVectorSpread) return u + weight * sqrt(v);
    return u;
  }
};

// What kernels that only need q . a, of any rows, are written with.
using DotProduct = MeanAndSpread<ScoreForm::kMean>;

struct MeanRule : MeanAndSpread<ScoreForm::kMean> {
  static constexpr const char* kName = "mean";
};

// q . mean + lambda * norm(q) * std, with std = sqrt(sum_d var_d).
struct UniqueRule : MeanAndSpread<ScoreForm::kScalarSpread> {
  static constexpr const char* kName = "unique";
  static constexpr const char* kWeightName = "lambda_";
  static constexpr double kWeight = 0.5;
};

// q . mean + c * sqrt(sum_d q_d^2 var_d).
struct DirectionalRule : MeanAndSpread<ScoreForm::kVectorSpread> {
  static constexpr const char* kName = "directional";
  static constexpr const char* kWeightName = "c";
  static constexpr double kWeight = 2;
};

// relu(q) . max - relu(-q) . min: an upper bound on q . k over the page.
struct MinMaxRule : RuleBase {
  static constexpr const char* kName = "minmax";
  static constexpr int kVectors = 2;
  template <typename Acc>
  UA_HD static void encode(const ChannelStats<Acc>& s, Acc& a, Acc& b) {
    a = s.max;
    b = s.min;
  }
  template <typename Acc>
  UA_HD static void accumulate(Acc q, Acc a, Acc b, Acc& u, Acc&) {
    u += q * select(q > Acc(0), a, b);
  }
};

// ---- The table. ----

// Facts of a rule as data, for code that runs once per call.
struct RuleFacts {
  const char* name;
  const char* weight_name;  // "" if it has no weight
  double weight;            // its default
  int vectors;
  bool scalar;
  ScoreForm form;
  bool compressible;
  bool trainable;
};

template <typename RuleT>
struct RuleTag {
  using Type = RuleT;
};

template <typename... RuleTs>
struct RuleTable {
  // Kernels that are written for a form know the family's functions, not a rule's own.
  static_assert(((RuleTs::kForm == ScoreForm::kGeneral || std::is_base_of_v<MeanAndSpread<RuleTs::kForm>, RuleTs>) &&
                 ...));
  static_assert((((!RuleTs::kCompressible && !RuleTs::kTrainable) || RuleTs::kForm != ScoreForm::kGeneral) && ...));
  static constexpr int kCount = sizeof...(RuleTs);
  static constexpr RuleFacts kFacts[] = {{RuleTs::kName, RuleTs::kWeightName, RuleTs::kWeight, RuleTs::kVectors,
                                          RuleTs::kScalar, RuleTs::kForm, RuleTs::kCompressible,
                                          RuleTs::kTrainable}...};
  // body(RuleTag<type of the rule>()).
  template <typename Body>
  static inline __attribute__((always_inline)) void visit(Rule rule, const Body& body) {  // on the host
    int place = 0;
    ((static_cast<int>(rule) == place++ ? (body(RuleTag<RuleTs>()), true) : false) || ...);
  }
};

// A Rule is a place in this list; it is part of the ops' schemas, so new ones go to the end.
using AllRules = RuleTable<MeanRule, UniqueRule, DirectionalRule, MinMaxRule>;

inline constexpr bool is_rule(int64_t number) { return number >= 0 && number < AllRules::kCount; }
inline constexpr const RuleFacts& rule_facts(Rule rule) { return AllRules::kFacts[static_cast<int>(rule)]; }

}  // namespace unique_attn
