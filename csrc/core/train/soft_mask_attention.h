// Causal attention with a gate per page, forward and backward.
#pragma once

#include "core/cuda_fwd.h"
#include "core/exec.h"
#include "core/train/packed.h"

namespace unique_attn {

enum class MaskMode : int { kDense, kSoft, kHard };

// logits[j] = scale * q . k_j + log g_p for every key j of page p that the query may see. Of a candidate page p (see
// candidate_pages), with s_p its score in fp32 (not rounded to the score type):
//   kSoft:  g_p = sigmoid((s_p - theta) / tau)
//   kHard:  g_p = 1 if p is among `pages`, else 0
// Every other visible page has gate 1; kDense: all have. Gates are recomputed, never stored.
struct SoftMaskForwardParams {
  DType dtype;  // of q, k, v, out and of the index entries
  MaskMode mode;
  ScoreForm form;  // of the rule, a trainable one
  double spread_weight;
  double scale;
  PackedSequences seqs;
  int num_q_heads;   // Hq = G * H
  int num_kv_heads;  // H
  int head_dim;      // D
  int sink_pages;
  int recent_pages;
  const void* q;  // [N, Hq, D], unit channel stride
  const void* k;  // [N, H, D], unit channel stride
  const void* v;  // [N, H, D], unit channel stride
  int64_t q_stride_token, q_stride_head;
  int64_t k_stride_token, k_stride_head;
  int64_t v_stride_token, v_stride_head;
  IndexView index;       // [num_page_slots, H, 1, entry_bytes]; kSoft
  const void* theta;     // [N, H] contiguous fp32 (fp64 for fp64); kSoft
  const float* tau;      // one number on the device of q; kSoft
  const int32_t* pages;  // [N, H, num_selected] contiguous, ascending logical pages, then -1; kHard
  int num_selected;
  void* out;  // [N, Hq, D] contiguous
  void* lse;  // [N, Hq] contiguous fp32 (fp64 for fp64), natural logarithm
  // CUDA: soft_mask_workspace_bytes bytes, aligned to 256; null if that is 0.
  void* workspace;
};

// Gradients (UNIQUE section 4): theta and the query factor of the spread (norm(q), q_d^2) are constants, the maximum
// over the group passes its gradient to the arg-max head (the lowest on ties), d log g / d s = (1 - g) / tau, and where
// the variance vanishes the square root's gradient is 0. The entry's rounding to the keys' dtype passes gradients
// straight through. dq comes from the logits and from q . mean; dk from the logits and, through every complete page's
// entry, from mean and spread.
struct SoftMaskBackwardParams {
  SoftMaskForwardParams forward;  // inputs, and out and lse as the forward pass left them
  const void* grad_out;           // [N, Hq, D] contiguous
  void* delta;                    // [N, Hq] workspace, fp32 (fp64): sum_d grad_out * out
  void* dq;                       // [N, Hq, D] contiguous, dtype of q
  void* dk;                       // [N, H, D] contiguous
  void* dv;                       // [N, H, D] contiguous
};

void soft_mask_forward_cpu(const SoftMaskForwardParams& params, const CpuExecutor& exec);
void soft_mask_backward_cpu(const SoftMaskBackwardParams& params, const CpuExecutor& exec);

// Bytes of workspace that a call on this CUDA device needs.
size_t soft_mask_workspace_bytes(const SoftMaskForwardParams& params, bool backward, int device);

// fp32, bf16 and fp16. Launch on `stream` and do not wait. Deterministic.
cudaError_t soft_mask_forward_cuda(const SoftMaskForwardParams& params, cudaStream_t stream);
cudaError_t soft_mask_backward_cuda(const SoftMaskBackwardParams& params, cudaStream_t stream);

}  // namespace unique_attn
