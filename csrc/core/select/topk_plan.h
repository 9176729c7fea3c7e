// How topk_pages cuts a row of scores on CUDA: a pure host function of shapes, as in decode/split_plan.h.
#pragma once

#include <cstdint>

namespace unique_attn {

// A thread block holds `vectors` vectors of `width` scores per thread at a time, its chunk of the row.
struct StreamPlan {
  int threads;  // 0: the kernel that reads a row once does not serve the shape
  int width;
  int vectors;
  bool one_chunk;  // the chunk is the whole row
};

// `scores` are read per row, alignment included, for `k` selected pages; `rows` rows on a device of so many
// multiprocessors. A block takes k <= min(threads / 2, 2048 / (width * vectors)).
StreamPlan plan_topk_stream(int k, int scores, bool is_16_bit, int64_t rows, int multiprocessors);

// Threads of a block of the kernel that serves the other shapes, a block per row: 256 or 1024.
int plan_topk_radix(int row_pages);

}  // namespace unique_attn
