// The only dispatches: a runtime enum becomes a type inside the given statement.
#pragma once

#include "core/rules.h"
#include "core/types.h"

// The statement is a lambda: `return` leaves only it.
#define UA_DISPATCH_RULE(rule, RuleT, ...)                         \
  ::unique_attn::AllRules::visit(rule, [&](auto dispatched_rule) { \
    using RuleT = typename decltype(dispatched_rule)::Type;        \
    __VA_ARGS__;                                                   \
  })

// The rule and whether the index is compressed; not compressed for a rule that has no such entry.
#define UA_DISPATCH_INDEX(format, rule, RuleT, kCompressed, ...)                       \
  UA_DISPATCH_RULE(rule, RuleT, {                                                      \
    if ((format) == ::unique_attn::IndexFormat::kCompressed && RuleT::kCompressible) { \
      constexpr bool kCompressed = RuleT::kCompressible;                               \
      __VA_ARGS__;                                                                     \
    } else {                                                                           \
      constexpr bool kCompressed = false;                                              \
      __VA_ARGS__;                                                                     \
    }                                                                                  \
  })

// The form of a score that is a form of products; nothing happens for another.
#define UA_DISPATCH_FORM(form, kForm, ...)                                                \
  switch (form) {                                                                         \
    case ::unique_attn::ScoreForm::kMean: {                                               \
      constexpr ::unique_attn::ScoreForm kForm = ::unique_attn::ScoreForm::kMean;         \
      __VA_ARGS__;                                                                        \
      break;                                                                              \
    }                                                                                     \
    case ::unique_attn::ScoreForm::kScalarSpread: {                                       \
      constexpr ::unique_attn::ScoreForm kForm = ::unique_attn::ScoreForm::kScalarSpread; \
      __VA_ARGS__;                                                                        \
      break;                                                                              \
    }                                                                                     \
    case ::unique_attn::ScoreForm::kVectorSpread: {                                       \
      constexpr ::unique_attn::ScoreForm kForm = ::unique_attn::ScoreForm::kVectorSpread; \
      __VA_ARGS__;                                                                        \
      break;                                                                              \
    }                                                                                     \
    case ::unique_attn::ScoreForm::kGeneral:                                              \
      break;                                                                              \
  }

// F32, BF16 and F16 are the C++ types of the calling side (CPU or CUDA) for those dtypes.
#define UA_DISPATCH_DTYPE(dtype, T, F32, BF16, F16, ...) \
  switch (dtype) {                                       \
    case ::unique_attn::DType::kFloat32: {               \
      using T = F32;                                     \
      __VA_ARGS__;                                       \
      break;                                             \
    }                                                    \
    case ::unique_attn::DType::kBFloat16: {              \
      using T = BF16;                                    \
      __VA_ARGS__;                                       \
      break;                                             \
    }                                                    \
    case ::unique_attn::DType::kFloat16: {               \
      using T = F16;                                     \
      __VA_ARGS__;                                       \
      break;                                             \
    }                                                    \
    default:                                             \
      break;                                             \
  }
