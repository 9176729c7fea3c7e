#include "ops.h"

#ifdef UNIQUE_ATTN_WITH_CUDA
#include <cuda_runtime.h>

// Weak, because torch's CPU packages do not have it: the library loads there too, and never calls it.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace unique_attn {

Runner::Runner(const char* op, const Tensor& first) : op_(op), cuda_(first.is_cuda()) {
#ifdef UNIQUE_ATTN_WITH_CUDA
  if (cuda_) {
    const int32_t device = first.get_device_index();
    guard_.emplace(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
}

template <typename Params>
void Runner::run(const Params& params, void (*cpu)(const Params&, const CpuExecutor&),
                 [[maybe_unused]] cudaError_t (*cuda)(const Params&, cudaStream_t)) const {
#ifdef UNIQUE_ATTN_WITH_CUDA
  if (cuda_) {
    const cudaError_t error = cuda(params, stream_);
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string(op_) + ": CUDA launch failed: " + cudaGetErrorString(error));
    }
    return;
  }
#endif
  cpu(params, torch_executor());
}

#ifdef UNIQUE_ATTN_WITH_CUDA
#define UA_CUDA(function) function
#else
#define UA_CUDA(function) static_cast<decltype(&function)>(nullptr)
#endif

void Runner::run(const AppendKvParams& params) const { run(params, append_kv_cpu, UA_CUDA(append_kv_cuda)); }
void Runner::run(const PageIndexParams& params) const { run(params, page_index_cpu, UA_CUDA(page_index_cuda)); }
void Runner::run(const PageScoresParams& params) const { run(params, page_scores_cpu, UA_CUDA(page_scores_cuda)); }
void Runner::run(const TopkPagesParams& params) const { run(params, topk_pages_cpu, UA_CUDA(topk_pages_cuda)); }
void Runner::run(const SparseDecodeParams& params) const {
  run(params, sparse_decode_cpu, UA_CUDA(sparse_decode_cuda));
}

int multiprocessor_count([[maybe_unused]] const Tensor& tensor) {
#ifdef UNIQUE_ATTN_WITH_CUDA
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()) == cudaSuccess) {
    return count;
  }
#endif
  return 1;
}

}  // namespace unique_attn
