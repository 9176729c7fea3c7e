#include <algorithm>

#include "prefill.h"
#include "value_checks.h"

namespace unique_attn {
namespace {

double fraction(const Arguments& args, const char* name, double number) {
  if (!(number >= 0 && number <= 1)) fail(args.op(), name, "expected a number from 0 to 1, got ", number);
  return number;
}

}  // namespace

SelectBlocksParams prepare_select_blocks(const Arguments& args, const PrefillBatch& batch, int64_t heads,
                                         int64_t key_blocks, std::optional<double> threshold,
                                         std::optional<double> top_p, int64_t min_blocks,
                                         std::optional<int64_t> max_blocks) {
  if (threshold.has_value() == top_p.has_value()) {
    fail(args.op(), "threshold", "expected either threshold or top_p, got ", threshold ? "both" : "neither");
  }
  SelectBlocksParams p{};
  p.threshold = threshold ? static_cast<float>(fraction(args, "threshold", *threshold)) : 2.f;
  p.top_p = top_p ? fraction(args, "top_p", *top_p) : 0;
  if (p.top_p == 1) {  // all blocks, those too whose shares are too small to count in a sum
    p.threshold = 0.f;
    p.top_p = 0;
  }
  args.range("min_blocks", min_blocks, 0, INT32_MAX);
  args.range("max_blocks", max_blocks.value_or(INT32_MAX), 0, INT32_MAX);
  p.min_blocks = static_cast<int>(min_blocks);
  p.max_blocks = static_cast<int>(max_blocks.value_or(INT32_MAX));
  if (p.min_blocks > p.max_blocks) {
    fail(args.op(), "min_blocks", "expected at most max_blocks = ", p.max_blocks, ", got ", p.min_blocks);
  }
  args.range("key blocks", key_blocks, 0, INT32_MAX / 2 / batch.block_k);
  p.batch = batch.batch;
  p.num_heads = static_cast<int>(heads);
  p.block_q = batch.block_q;
  p.block_k = batch.block_k;
  p.key_blocks = static_cast<int>(key_blocks);
  p.mask_words = (p.key_blocks + kMaskBits - 1) / kMaskBits;
  p.cu_seqlens_q = batch.cu_seqlens_q;
  p.cu_seqlens_k = batch.cu_seqlens_k;
  p.first_slot = 0;
  p.end_slot = num_block_slots(batch.total_queries, batch.batch, batch.block_q);
  return p;
}

std::tuple<Tensor, Tensor> select_blocks(Tensor shares, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                         std::optional<double> threshold, std::optional<double> top_p,
                                         int64_t min_blocks, std::optional<int64_t> max_blocks, int64_t block_q,
                                         int64_t block_k) {
  constexpr const char* kOp = "select_blocks";
  const Arguments args(kOp, "shares", shares);
  const bool is_double = shares.scalar_type() == ScalarType::Double;
  args.tensor("shares", shares, is_double ? ScalarType::Double : ScalarType::Float, 3);
  args.contiguous("shares", shares);
  if (is_double && shares.is_cuda()) fail(kOp, "shares", "expected float32 on CUDA, got float64");
  const PrefillBatch batch = prefill_batch(args, cu_seqlens_q, cu_seqlens_k, 0, 0, 0, block_q, block_k);
  SelectBlocksParams p =
      prepare_select_blocks(args, batch, shares.size(1), shares.size(2), threshold, top_p, min_blocks, max_blocks);
  args.range("query block slots of shares", shares.size(0), batch.batch, batch.batch == 0 ? 0 : INT32_MAX / 2);
  p.dtype = is_double ? DType::kFloat64 : DType::kFloat32;
  p.end_slot = static_cast<int>(shares.size(0));
  if (checks_values(args)) {
    const Tensor host = on_host(cu_seqlens_q);
    const int64_t queries = static_cast<const int32_t*>(host.data_ptr())[batch.batch];
    const int64_t most = int64_t{INT32_MAX} / 2;
    check_cu_seqlens(kOp, "cu_seqlens_q", cu_seqlens_q, queries, "the most there can be", most);
    const Tensor host_k = on_host(cu_seqlens_k);
    check_cu_seqlens(kOp, "cu_seqlens_k", cu_seqlens_k, static_cast<const int32_t*>(host_k.data_ptr())[batch.batch],
                     "the most there can be", most);
    check_queries_have_keys(kOp, cu_seqlens_q, cu_seqlens_k);
    args.size("shares", shares, 0, queries / block_q + batch.batch, "query block slots");
  }
  Tensor mask = allocate(shares, {shares.size(0), shares.size(1), p.mask_words}, ScalarType::Int);
  Tensor kept = allocate(shares, {shares.size(0), shares.size(1)}, ScalarType::Float);
  p.shares = shares.data_ptr();
  p.mask = static_cast<uint32_t*>(mask.data_ptr());
  p.kept = static_cast<float*>(kept.data_ptr());
  Runner(kOp, shares).run(p, select_blocks_cpu, UA_CUDA(select_blocks_cuda));
  return {mask, kept};
}

}  // namespace unique_attn
