// The only switch macros: a runtime enum becomes a type inside the given statement.
#pragma once

#include "core/index/format.h"
#include "core/types.h"

#define UA_DISPATCH_RULE(rule, RuleT, ...)          \
  switch (rule) {                                   \
    case ::unique_attn::Rule::kMean: {              \
      using RuleT = ::unique_attn::MeanRule;        \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    case ::unique_attn::Rule::kUnique: {            \
      using RuleT = ::unique_attn::UniqueRule;      \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    case ::unique_attn::Rule::kDirectional: {       \
      using RuleT = ::unique_attn::DirectionalRule; \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    case ::unique_attn::Rule::kMinMax: {            \
      using RuleT = ::unique_attn::MinMaxRule;      \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
  }

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
