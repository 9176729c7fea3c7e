// A step as one kernel where rows are few, else as three.
#include "core/decode/decode_step.h"
#include "core/decode/sm90/cluster_step.h"

namespace unique_attn {

cudaError_t decode_step_cuda(const DecodeStepParams& p, cudaStream_t stream) {
  cudaError_t error = cluster_step_cuda(p, stream);
  if (error != cudaErrorNotSupported) return error;
  error = page_scores_cuda(p.scores, stream);
  if (error == cudaSuccess) error = topk_pages_cuda(p.selection, stream);
  if (error == cudaSuccess) error = sparse_decode_cuda(p.attention, stream);
  return error;
}

}  // namespace unique_attn
