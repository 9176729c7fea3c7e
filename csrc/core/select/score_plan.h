// How page_scores cuts its work on CUDA: a pure host function of shapes, as in decode/split_plan.h.
#pragma once

namespace unique_attn {

// Steps that a thread block takes of `steps` in each of `rows` rows of scores, on a device that holds `slots` thread
// blocks at a time: the last ones to run shall leave few slots empty.
int plan_score_steps(int rows, int steps, int slots);

}  // namespace unique_attn
