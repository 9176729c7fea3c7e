// What this library was built with and runs on, as a JSON object; shown by `python -m unique_attn info`.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_config.h"
#include "core/cpu/isa.h"

namespace unique_attn {
namespace {

std::string build_info() { return std::string("{" UA_BUILD_FACTS ", \"cpu_isa\": \"") + cpu_isa() + "\"}"; }

}  // namespace
}  // namespace unique_attn

STABLE_TORCH_LIBRARY_FRAGMENT(unique_attn, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(unique_attn, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&unique_attn::build_info));
}
