#include <algorithm>

#include "prefill.h"
#include "value_checks.h"

namespace unique_attn {
namespace {

// Shares are made and used for so many query blocks at a time that they are no more than this.
constexpr int64_t kShareBytes = int64_t{32} << 20;

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> unique_prefill(
    Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    int64_t rule, bool pools_heads, int64_t aggregate, std::optional<double> threshold, std::optional<double> top_p,
    int64_t min_blocks, std::optional<int64_t> max_blocks, int64_t pool_q, int64_t pool_k, int64_t block_q,
    int64_t block_k, double spread_weight, double scale, std::optional<Tensor> block_table) {
  constexpr const char* kOp = "unique_prefill";
  const Arguments args(kOp, "q", q);
  const int64_t rank = block_table.has_value() ? 4 : 3;
  args.floating("q", q, 3);
  args.floating("k", k, rank);
  args.floating("v", v, rank);
  const PrefillBatch batch =
      prefill_batch(args, q, k, block_table, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_q, block_k);
  CompositeBlocksCall composite = prepare_composite_blocks(args, q, k, batch, max_seqlen_k, rule, pools_heads,
                                                           aggregate, pool_q, pool_k, spread_weight, scale);
  CompositeBlocksParams& estimate = composite.params;
  const int heads = composite_heads(estimate);
  SelectBlocksParams select =
      prepare_select_blocks(args, batch, heads, estimate.key_blocks, threshold, top_p, min_blocks, max_blocks);
  BlockSparseCall attention = prepare_block_sparse(args, q, k, v, batch, scale);
  check_prefill_values(args, batch, block_table, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);

  const int slots = estimate.end_slot;
  const bool wide = q.scalar_type() == ScalarType::Double;
  const int64_t slot_bytes = std::max<int64_t>(int64_t{heads} * estimate.key_blocks * (wide ? 8 : 4), 1);
  const int chunk = static_cast<int>(std::min<int64_t>(std::max<int64_t>(kShareBytes / slot_bytes, 1), slots));
  const std::vector<Tensor> memory = composite_memory(q, estimate);
  Tensor shares = allocate(q, {chunk, heads, estimate.key_blocks}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor mask = allocate(q, {slots, heads, select.mask_words}, ScalarType::Int);
  Tensor kept = allocate(q, {slots, heads}, ScalarType::Float);
  std::tuple<Tensor, Tensor> results = block_sparse_results(q, attention.params);

  const Runner runner(kOp, q);
  estimate.shares = shares.data_ptr();
  select.dtype = wide ? DType::kFloat64 : DType::kFloat32;
  select.shares = shares.data_ptr();
  for (int first = 0; first < slots; first += chunk) {
    estimate.first_slot = select.first_slot = first;
    estimate.end_slot = select.end_slot = std::min(first + chunk, slots);
    estimate.pools_keys = first == 0;
    const int64_t row = int64_t{first} * heads;
    select.mask = static_cast<uint32_t*>(mask.data_ptr()) + row * select.mask_words;
    select.kept = static_cast<float*>(kept.data_ptr()) + row;
    runner.run(estimate, composite_blocks_cpu, UA_CUDA(composite_blocks_cuda));
    runner.run(select, select_blocks_cpu, UA_CUDA(select_blocks_cuda));
  }
  attention.params.num_mask_heads = heads;
  attention.params.mask_words = select.mask_words;
  attention.params.mask = static_cast<const uint32_t*>(mask.data_ptr());
  runner.run(attention.params, block_sparse_attention_cpu, UA_CUDA(block_sparse_attention_cuda));
  return {std::get<0>(results), std::get<1>(results), mask, kept};
}

}  // namespace unique_attn
