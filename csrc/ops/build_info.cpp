// What this library was built with, what it runs on, and what a caller must know of its rules, formats and limits, as a
// JSON object. `python -m unique_attn info` shows it; unique_attn/rules.py has its tables from here.
#include <torch/csrc/stable/library.h>

#include <iomanip>
#include <iterator>
#include <sstream>
#include <string>

#include "build_config.h"
#include "core/cpu/isa.h"
#include "core/rules.h"

namespace unique_attn {
namespace {

const char* spread_name(ScoreForm form) {
  switch (form) {
    case ScoreForm::kScalarSpread:
      return "\"scalar\"";
    case ScoreForm::kVectorSpread:
      return "\"vector\"";
    default:
      return "null";
  }
}

std::string rules_json() {
  std::ostringstream out;
  out << std::boolalpha << std::setprecision(17) << '[';
  for (int i = 0; i < AllRules::kCount; ++i) {
    const RuleFacts& facts = AllRules::kFacts[i];
    out << (i ? ", " : "") << "{\"name\": \"" << facts.name << "\", \"id\": " << i << ", \"vectors\": " << facts.vectors
        << ", \"scalar\": " << facts.scalar << ", \"spread\": " << spread_name(facts.form) << ", \"weight_name\": \""
        << facts.weight_name << "\", \"weight\": " << facts.weight << ", \"compressible\": " << facts.compressible
        << ", \"trainable\": " << facts.trainable << '}';
  }
  out << ']';
  return out.str();
}

std::string build_info() {
  std::ostringstream out;
  out << "{" UA_BUILD_FACTS ", \"cpu_isa\": \"" << cpu_isa() << "\", \"rules\": " << rules_json()
      << ", \"index_formats\": [\"exact\", \"compressed\"], \"page_sizes\": [";
  for (size_t i = 0; i < std::size(kPageSizes); ++i) out << (i ? ", " : "") << kPageSizes[i];
  out << "], \"max_group\": " << kMaxGroup << ", \"max_query_tokens\": " << kMaxQueryTokens
      << ", \"max_head_dim\": " << kMaxHeadDim << ", \"max_selected_pages\": " << kMaxSelectedPages << '}';
  return out.str();
}

}  // namespace
}  // namespace unique_attn

STABLE_TORCH_LIBRARY_FRAGMENT(unique_attn, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(unique_attn, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&unique_attn::build_info));
}
