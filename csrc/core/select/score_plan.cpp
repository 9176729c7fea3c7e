#include "core/select/score_plan.h"

#include <algorithm>
#include <cstdint>

namespace unique_attn {

int plan_score_chunk(int rows, int row_pages, int step, int slots) {
  constexpr int kMaxSteps = 8;  // rows of different lengths must still spread over the device
  const int64_t steps = (row_pages + step - 1) / step;
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t n = 1; n <= std::min<int64_t>(steps, kMaxSteps); ++n) {
    const int64_t blocks = rows * ((steps + n - 1) / n);
    const int64_t waves = (blocks + slots - 1) / slots;
    const int64_t cost = waves * (n + 1);  // a thread block's start takes about a step
    if (cost <= best_cost) {
      best_cost = cost;
      best = n;
    }
  }
  return step * static_cast<int>(best);
}

}  // namespace unique_attn
