// Argument checks and views, shared by every op. The same checks run for CPU and CUDA tensors, before
// anything is allocated or written. A failed check throws std::invalid_argument, which Python sees as ValueError:
// "<op>: <argument>: expected <what>, got <what>".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/exec.h"
#include "core/rules.h"

namespace unique_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": " << argument << ": ";
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}

std::string shape_string(const Tensor& tensor);
std::string stride_string(const Tensor& tensor);
const char* dtype_string(ScalarType dtype);

// The op's name travels with the checks so that every message starts with it.
class Arguments {
 public:
  // `first` decides the device and, through key(), the dtype the others must have.
  Arguments(const char* op, const char* name, const Tensor& first);

  bool is_cuda() const { return cuda_; }
  DType dtype() const { return dtype_; }

  // Floating-point tensor of the op's dtype, with the given rank.
  void floating(const char* name, const Tensor& tensor, int64_t rank) const;
  void tensor(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rank) const;
  void size(const char* name, const Tensor& tensor, int64_t dim, int64_t expected, const char* what) const;
  void contiguous(const char* name, const Tensor& tensor) const;
  void range(const char* name, int64_t value, int64_t low, int64_t high) const;
  void finite(const char* name, double value) const;
  void head_dim(const char* name, int64_t head_dim) const;
  void page_size(int64_t page_size) const;

  // [.., H, D] heads of q against the heads of the cache: Hq = G * H with G in 1..16.
  void groups(int64_t num_q_heads, int64_t num_kv_heads) const;

  // q, k or v as [B, T, heads, D]: any strides as far as vector loads allow, else a contiguous copy. `keep` gets the
  // tensor whose memory it is.
  TokenView tokens(const char* name, const Tensor& tensor, std::optional<Tensor>& keep) const;
  // A cache [num_blocks, H, block_size, D].
  PagedView cache(const char* name, const Tensor& tensor) const;
  // That caches which are written share no memory, neither with each other nor within.
  void apart(const Tensor& k_cache, const Tensor& v_cache) const;
  // That a tensor which is written lies before or behind another, whose strides are not negative.
  void apart(const char* name, const Tensor& written, const char* other_name, const Tensor& other) const;
  // The page index of keys of the op's dtype; `num_blocks` -1 allows any number.
  IndexView index(const Tensor& index, int64_t index_format, Rule rule, int64_t num_blocks, int64_t heads,
                  int64_t head_dim) const;
  Rule rule(int64_t rule) const;
  void trainable(Rule rule) const;
  // block_table int32 [B, max_blocks] over a cache of `num_blocks` blocks: a table whose pages are blocks, without
  // lengths. A row may hold up to `most_tokens` tokens.
  PageTable blocks(const Tensor& block_table, int64_t batch, int64_t num_blocks, int64_t block_size,
                   int64_t most_tokens) const;
  // The same with pages, and seq_lens int32 [B].
  PageTable table(const Tensor& block_table, const Tensor& seq_lens, int64_t batch, int64_t num_blocks,
                  int64_t block_size, int64_t page_size) const;
  void seq_lens(const Tensor& seq_lens, int64_t batch) const;

  const char* op() const { return op_; }

 private:
  void same_device(const char* name, const Tensor& tensor) const;

  const char* op_;
  const char* first_name_;
  bool cuda_;
  int32_t device_index_;
  ScalarType scalar_type_;
  DType dtype_;
};

// dtype in which scores of inputs of `dtype` are stored and ordered.
ScalarType score_type(ScalarType dtype);

// A contiguous tensor with any contents, on the device of `like`. torch::stable::new_empty would find its operator by
// name and box the arguments, which takes longer than the allocation.
Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);

// PyTorch's own intra-op thread pool.
CpuExecutor torch_executor();

}  // namespace unique_attn
