#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/index/format.h"

namespace unique_attn {
namespace {

std::string list_string(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// Numbers of the shim are compared as they are: to make a ScalarType of one means to ask for the number of each type in
// turn, and every argument of every call is checked.
int32_t shim_dtype(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

bool has_dtype(const Tensor& tensor, ScalarType dtype) {
  int32_t found = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &found));
  return found == shim_dtype(dtype);
}

int32_t device_type(const Tensor& tensor) {
  int32_t found = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &found));
  return found;
}

DType to_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

// Kernels read 8 channels at a time: rows must start where a vector of 8 may be read.
bool rows_aligned(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 != 0) return false;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) % 8 != 0) return false;
  }
  return true;
}

const Tensor& given(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.defined()) fail(op, name, "expected a tensor, got None");
  return tensor;
}

// "a, b or c".
std::string choices(const std::vector<std::string>& names) {
  std::string list;
  for (size_t i = 0; i < names.size(); ++i) {
    list += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + names[i];
  }
  return list;
}

// The rules with a property.
template <typename Has>
std::string rule_names(Has has) {
  std::vector<std::string> names;
  for (const RuleFacts& facts : AllRules::kFacts) {
    if (has(facts)) names.emplace_back(facts.name);
  }
  return choices(names);
}

}  // namespace

std::string shape_string(const Tensor& tensor) { return list_string(tensor.sizes()); }
std::string stride_string(const Tensor& tensor) { return list_string(tensor.strides()); }

const char* dtype_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

Arguments::Arguments(const char* op, const char* name, const Tensor& first)
    : op_(op),
      first_name_(name),
      cuda_(given(op, name, first).is_cuda()),
      device_index_(first.get_device_index()),
      scalar_type_(first.scalar_type()),
      dtype_(to_dtype(first.scalar_type())) {
  if (!is_floating(scalar_type_)) {
    fail(op, name, "expected dtype float32, bfloat16, float16 or float64, got ", dtype_string(scalar_type_));
  }
  if (cuda_ && scalar_type_ == ScalarType::Double) {
    fail(op, name, "expected dtype float32, bfloat16 or float16 on CUDA, got float64 (a CPU dtype here)");
  }
#ifndef UNIQUE_ATTN_WITH_CUDA
  if (cuda_) {
    fail(op, name,
         "got a CUDA tensor, but this build of unique_attn has no CUDA kernels: install nvcc and rebuild "
         "with UNIQUE_ATTN_CUDA=1");
  }
#endif
}

void Arguments::same_device(const char* name, const Tensor& tensor) const {
  given(op_, name, tensor);
  const int32_t expected = cuda_ ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  if (device_type(tensor) != expected || (cuda_ && tensor.get_device_index() != device_index_)) {
    fail(op_, name, "expected the device of ", first_name_, ", ", cuda_ ? "cuda:" : "cpu",
         cuda_ ? std::to_string(device_index_) : std::string(), ", got ",
         tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index())
                          : std::string(tensor.is_cpu() ? "cpu" : "another device"));
  }
}

void Arguments::tensor(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rank) const {
  same_device(name, tensor);
  if (!has_dtype(tensor, dtype)) {
    fail(op_, name, "expected dtype ", dtype_string(dtype),
         dtype == scalar_type_ ? std::string(" (the dtype of ") + first_name_ + ")" : std::string(), ", got ",
         dtype_string(tensor.scalar_type()));
  }
  if (tensor.dim() != rank) {
    fail(op_, name, "expected ", rank, " dimensions, got ", tensor.dim(), " (shape ", shape_string(tensor), ")");
  }
}

void Arguments::floating(const char* name, const Tensor& tensor, int64_t rank) const {
  this->tensor(name, tensor, scalar_type_, rank);
}

void Arguments::size(const char* name, const Tensor& tensor, int64_t dim, int64_t expected, const char* what) const {
  if (tensor.size(dim) != expected) {
    fail(op_, name, "expected size ", expected, " (", what, ") in dimension ", dim, ", got ", tensor.size(dim),
         " (shape ", shape_string(tensor), ")");
  }
}

void Arguments::contiguous(const char* name, const Tensor& tensor) const {
  if (!tensor.is_contiguous()) {
    fail(op_, name, "expected a contiguous tensor, got strides ", stride_string(tensor), " for shape ",
         shape_string(tensor));
  }
}

void Arguments::range(const char* name, int64_t value, int64_t low, int64_t high) const {
  if (value < low || value > high) {
    fail(op_, name, "expected a value from ", low, " to ", high, ", got ", value);
  }
}

void Arguments::finite(const char* name, double value) const {
  if (!std::isfinite(value)) fail(op_, name, "expected a finite number, got ", value);
}

void Arguments::head_dim(const char* name, int64_t head_dim) const {
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    fail(op_, name, "expected a head dimension that is a multiple of 8 from 8 to ", kMaxHeadDim, ", got ", head_dim);
  }
}

void Arguments::page_size(int64_t page_size) const {
  if (std::find(std::begin(kPageSizes), std::end(kPageSizes), page_size) == std::end(kPageSizes)) {
    std::vector<std::string> sizes;
    for (const int size : kPageSizes) sizes.push_back(std::to_string(size));
    fail(op_, "page_size", "expected ", choices(sizes), ", got ", page_size);
  }
}

void Arguments::groups(int64_t num_q_heads, int64_t num_kv_heads) const {
  if (num_kv_heads < 1 || num_q_heads % num_kv_heads != 0 || num_q_heads / num_kv_heads < 1 ||
      num_q_heads / num_kv_heads > kMaxGroup) {
    fail(op_, "q", "expected 1 to ", kMaxGroup, " query heads per KV head, got ", num_q_heads, " query heads for ",
         num_kv_heads, " KV heads");
  }
}

TokenView Arguments::tokens(const char* name, const Tensor& tensor, std::optional<Tensor>& keep) const {
  floating(name, tensor, 4);
  head_dim(name, tensor.size(3));
  keep = tensor;
  if (tensor.numel() > 0 && ((tensor.size(3) > 1 && tensor.stride(3) != 1) || !rows_aligned(tensor))) {
    keep = torch::stable::contiguous(tensor);
    // A contiguous tensor comes back as it is, and it may start at an address that is not aligned.
    if (!rows_aligned(*keep)) keep = torch::stable::clone(*keep);
  }
  return {keep->data_ptr(), keep->stride(0), keep->stride(1), keep->stride(2)};
}

PagedView Arguments::cache(const char* name, const Tensor& tensor) const {
  floating(name, tensor, 4);
  head_dim(name, tensor.size(3));
  if (tensor.numel() > 0 && (tensor.stride(3) != 1 || !rows_aligned(tensor))) {
    fail(op_, name,
         "expected channel stride 1, other strides that are multiples of 8 and 16-byte alignment, got "
         "strides ",
         stride_string(tensor));
  }
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void Arguments::apart(const Tensor& k_cache, const Tensor& v_cache) const {
  const auto check = [&](const char* name, const Tensor& cache) {
    for (int64_t dim = 0; dim < 3; ++dim) {
      if (cache.size(dim) > 1 && cache.stride(dim) == 0) {
        fail(op_, name, "expected memory of its own for every token, got strides ", stride_string(cache));
      }
    }
  };
  check("k_cache", k_cache);
  check("v_cache", v_cache);
  if (k_cache.numel() > 0 && k_cache.data_ptr() == v_cache.data_ptr()) {
    fail(op_, "v_cache", "expected memory of its own, got that of k_cache");
  }
}

void Arguments::apart(const char* name, const Tensor& written, const char* other_name, const Tensor& other) const {
  if (written.numel() == 0 || other.numel() == 0) return;
  const auto range_of = [this](const Tensor& tensor) {
    const size_t size = tensor.scalar_type() == ScalarType::Byte ? 1 : dtype_size(dtype_);  // of the index, or the op's
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    return std::make_pair(begin, begin + static_cast<uintptr_t>(last + 1) * size);
  };
  const auto [begin, end] = range_of(written);
  const auto [other_begin, other_end] = range_of(other);
  if (begin < other_end && other_begin < end) {
    fail(op_, name, "expected memory of its own, got some of ", other_name);
  }
}

IndexView Arguments::index(const Tensor& index, int64_t index_format, Rule rule, int64_t num_blocks, int64_t heads,
                           int64_t head_dim) const {
  if (index_format < 0 || index_format > static_cast<int64_t>(IndexFormat::kCompressed)) {
    fail(op_, "index_format", "expected 0 (exact) or 1 (compressed), got ", index_format);
  }
  const auto format = static_cast<IndexFormat>(index_format);
  if (format == IndexFormat::kCompressed && !rule_facts(rule).compressible) {
    fail(op_, "rule", "expected ", rule_names([](const RuleFacts& facts) { return facts.compressible; }),
         " for a compressed index, got ", rule_facts(rule).name);
  }
  tensor("index", index, ScalarType::Byte, 4);
  if (num_blocks >= 0) size("index", index, 0, num_blocks, "the cache's blocks");
  size("index", index, 1, heads, "KV heads");
  size("index", index, 3, index_entry_bytes(rule, format, dtype_, static_cast<int>(head_dim)),
       format == IndexFormat::kExact ? "bytes of an exact entry of this rule, head dimension and dtype"
                                     : "bytes of a compressed entry of this rule and head dimension");
  if (index.numel() > 0) {
    bool aligned = reinterpret_cast<uintptr_t>(index.data_ptr()) % 16 == 0 && index.stride(3) == 1;
    for (int dim = 0; dim < 3; ++dim) aligned = aligned && (index.size(dim) == 1 || index.stride(dim) % 16 == 0);
    if (!aligned) {
      fail(op_, "index",
           "expected byte stride 1, other strides that are multiples of 16 and 16-byte alignment, got "
           "strides ",
           stride_string(index));
    }
  }
  return {static_cast<uint8_t*>(index.data_ptr()), index.stride(0), index.stride(1), index.stride(2), format};
}

Rule Arguments::rule(int64_t rule) const {
  if (!is_rule(rule)) {
    fail(op_, "rule", "expected the number of ", rule_names([](const RuleFacts&) { return true; }), " (0 to ",
         AllRules::kCount - 1, "), got ", rule);
  }
  return static_cast<Rule>(rule);
}

void Arguments::trainable(Rule rule) const {
  if (!rule_facts(rule).trainable) {
    fail(op_, "rule", "expected ", rule_names([](const RuleFacts& facts) { return facts.trainable; }),
         " for training, got ", rule_facts(rule).name);
  }
}

void Arguments::seq_lens(const Tensor& seq_lens, int64_t batch) const {
  tensor("seq_lens", seq_lens, ScalarType::Int, 1);
  size("seq_lens", seq_lens, 0, batch, "sequences");
  contiguous("seq_lens", seq_lens);
}

PageTable Arguments::table(const Tensor& block_table, const Tensor& seq_lens, int64_t batch, int64_t num_blocks,
                           int64_t block_size, int64_t page_size) const {
  this->page_size(page_size);
  this->seq_lens(seq_lens, batch);
  if (block_size < page_size || block_size % page_size != 0) {
    fail(op_, "page_size", "expected a divisor of the block size ", block_size, ", got ", page_size);
  }
  // A page more must be a number too.
  PageTable table = blocks(block_table, batch, num_blocks, block_size, INT32_MAX - kMaxPageSize);
  table.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  table.page_size = static_cast<int>(page_size);
  return table;
}

PageTable Arguments::blocks(const Tensor& block_table, int64_t batch, int64_t num_blocks, int64_t block_size,
                            int64_t most_tokens) const {
  tensor("block_table", block_table, ScalarType::Int, 2);
  size("block_table", block_table, 0, batch, "sequences");
  if (block_table.numel() > 0 && block_table.size(1) > 1 && block_table.stride(1) != 1) {
    fail(op_, "block_table", "expected stride 1 in dimension 1, got strides ", stride_string(block_table));
  }
  if (block_table.size(1) > 0 && block_size > most_tokens / block_table.size(1)) {
    fail(op_, "block_table", "expected at most ", most_tokens, " tokens per sequence, got ", block_table.size(1),
         " blocks of ", block_size);
  }
  return {static_cast<const int32_t*>(block_table.data_ptr()),
          nullptr,
          block_table.stride(0),
          static_cast<int>(block_table.size(1)),
          static_cast<int>(block_size),
          static_cast<int>(block_size),
          static_cast<int>(std::min<int64_t>(num_blocks, INT32_MAX))};
}

ScalarType score_type(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? ScalarType::BFloat16 : dtype;
}

Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kMaxRank = 4;
  STD_TORCH_CHECK(sizes.size() <= kMaxRank, "allocate: expected at most ", kMaxRank, " dimensions");
  int64_t strides[kMaxRank], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    STD_TORCH_CHECK(!__builtin_mul_overflow(stride, std::max<int64_t>(sizes[i], 1), &stride), "a result of shape ",
                    list_string(sizes), " is too large");
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                         shim_dtype(dtype), device_type(like), like.get_device_index(),
                                                         &handle));
  return Tensor(handle);
}

CpuExecutor torch_executor() {
  return {[](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* ctx) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
  }};
}

}  // namespace unique_attn
