#include "core/select/topk_plan.h"

namespace unique_attn {

StreamPlan plan_topk_stream(int k, int scores, bool is_16_bit, int64_t rows, int multiprocessors) {
  if (k > 512 || scores > (1 << 20) + 7) return {0, 0, 0, false};
  if (k > 256) return {1024, 4, 1, false};
  if (k > 128) return {512, 8, 1, false};
  const bool few_wanted = is_16_bit && k <= 64;
  if (scores <= 1024) {
    // Many rows hide each other's latency; fewer threads then have less to do in all.
    if (few_wanted && rows >= 4 * int64_t{multiprocessors}) return {128, 8, 1, true};
    return {256, 4, 1, true};
  }
  if (scores <= 2048) return {256, 8, 1, true};
  if (scores <= 4096) return is_16_bit ? StreamPlan{256, 8, 2, true} : StreamPlan{512, 8, 1, true};
  if (scores <= 8192) return few_wanted ? StreamPlan{256, 8, 4, true} : StreamPlan{512, 8, 2, true};
  const bool few_rows = rows <= multiprocessors;  // then a block may have a multiprocessor to itself
  if (few_wanted) return {few_rows ? 1024 : 512, 8, 4, false};
  return {few_rows && !is_16_bit ? 1024 : 512, 8, 2, false};
}

int plan_topk_radix(int row_pages) { return row_pages <= 4096 ? 256 : 1024; }

}  // namespace unique_attn
