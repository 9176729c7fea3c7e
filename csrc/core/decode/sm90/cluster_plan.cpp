#include "core/decode/sm90/cluster_step.h"

namespace unique_attn {

int plan_cluster_size(int64_t rows, int multiprocessors) {
  if (rows == 0) return 0;
  int size = 16;
  while (size > 1 && rows * size > multiprocessors) size /= 2;
  return size;
}

}  // namespace unique_attn
