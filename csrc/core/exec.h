// How the CPU implementations run in parallel without knowing the framework: the caller passes its own
// thread pool. Results never depend on the number of threads.
#pragma once

#include <cstdint>

namespace unique_attn {

struct CpuExecutor {
  // Calls body(ctx, begin, end) over disjoint ranges that cover [0, n); a range holds at least `grain` items
  // where n allows it.
  void (*run)(int64_t n, int64_t grain, void (*body)(void* ctx, int64_t begin, int64_t end), void* ctx);
};

template <typename F>
void parallel_for(const CpuExecutor& exec, int64_t n, int64_t grain, const F& f) {
  exec.run(
      n, grain, [](void* ctx, int64_t begin, int64_t end) { (*static_cast<const F*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace unique_attn
