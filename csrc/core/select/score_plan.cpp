#include "core/select/score_plan.h"

#include <algorithm>
#include <cstdint>

namespace unique_attn {

int plan_score_steps(int rows, int steps, int slots) {
  constexpr int kMaxSteps = 8;  // rows of different lengths must still spread over the device
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int n = 1; n <= std::min(steps, kMaxSteps); ++n) {
    const int64_t blocks = int64_t{rows} * ((steps + n - 1) / n);
    const int64_t waves = (blocks + slots - 1) / slots;
    const int64_t cost = waves * (n + 1);  // a thread block's start takes about a step
    if (cost <= best_cost) {
      best_cost = cost;
      best = n;
    }
  }
  return best;
}

}  // namespace unique_attn
