// The training kernels for Hopper (wgmma, TMA): 16-bit inputs, head dimensions 64 and 128. Page scores are computed for
// a bounded chunk of queries (or of keys) at a time into a workspace, as gates in log2; the attention kernels read them
// as a bias per (query, page). Nothing else of size queries x pages exists.
#pragma once

#include "core/cuda/device.h"
#include "core/train/page_boundary.h"
#include "core/train/soft_mask_attention.h"

namespace unique_attn {

constexpr int kScorePages = 64;    // pages per tile of the scores' kernel
constexpr int kForwardKeys = 128;  // keys per tile
constexpr int kDqKeys = 64;
constexpr int kDkvKeys = 128;   // keys per thread block, 64 per warpgroup
constexpr int kGradPages = 64;  // pages per thread block

// How a call is cut into chunks, and where its buffers lie in the workspace. Depends on shapes and the device only.
struct HopperPlan {
  bool use = false;      // the call can run on these kernels
  int tokens = 0;        // query tokens whose heads fill 64 rows
  int chunk_tokens = 0;  // queries per chunk: forward pass and dq
  int chunk_keys = 0;    // keys per chunk: dk and dv
  int width = 0;         // pages in a row of a chunk of queries
  int key_width = 0;     // pages in a row of a chunk of keys
  // Offsets in the workspace in bytes.
  size_t squares = 0;     // [num_page_slots, H, D] bf16: std^2 of every page
  size_t log_gates = 0;   // [chunk_tokens, H, width] fp16, or [N, H, key_width]; dq leaves W (bf16) in it
  size_t best = 0;        // [chunk_tokens, H, width] uint8: the arg-max head
  size_t slopes = 0;      // [chunk_tokens, H, width] bf16: c / sqrt(sum_d q_d^2 var_d) of that head, or 0
  size_t q_squares = 0;   // [chunk_tokens, Hq, D] bf16
  size_t page_grads = 0;  // [num_page_slots, H, 2, D] fp32: of mean and spread
  size_t stats = 0;       // [N, Hq, 2] fp32: lse * log2(e), delta
  size_t bytes = 0;
};

HopperPlan plan_soft_mask(const SoftMaskForwardParams& params, bool backward, const DeviceFacts& device);

// Whether these kernels run there. Strides are multiples of 16 bytes, as the ops require.
bool runs_on_hopper(DType dtype, int head_dim, const DeviceFacts& device);

// Scores of the tokens [begin, end) into the workspace of page_boundary, rows of row_pages.
cudaError_t boundary_scores_hopper(const PageBoundaryParams& params, int begin, int end, int row_pages,
                                   cudaStream_t stream);

cudaError_t soft_mask_forward_hopper(const SoftMaskForwardParams& params, const HopperPlan& plan, cudaStream_t stream);
cudaError_t soft_mask_backward_hopper(const SoftMaskBackwardParams& params, const HopperPlan& plan,
                                      cudaStream_t stream);

}  // namespace unique_attn
