// The second half of page_boundary: from the scores of a chunk of queries to theta.
#pragma once

#include "core/cuda/radix_select.cuh"
#include "core/train/page_boundary.h"

namespace unique_attn {

// Theta of the tokens [begin, end) from their scores in the workspace, [end - begin, H, row_pages].
cudaError_t boundary_select_cuda(const PageBoundaryParams& params, int begin, int end, int row_pages,
                                 cudaStream_t stream);

}  // namespace unique_attn
