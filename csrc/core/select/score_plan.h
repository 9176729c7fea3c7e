// How page_scores cuts its work on CUDA: a pure host function of shapes, as in decode/split_plan.h.
#pragma once

namespace unique_attn {

// Pages per thread block, a multiple of `step`, for `rows` rows of scores on a device that holds `slots`
// thread blocks at a time: the last ones to run shall leave few slots empty.
int plan_score_chunk(int rows, int row_pages, int step, int slots);

}  // namespace unique_attn
