#include <algorithm>
#include <iterator>

#include "prefill.h"
#include "value_checks.h"

namespace unique_attn {
namespace {

int pool(const Arguments& args, const char* name, int64_t tokens) {
  if (std::find(std::begin(kPools), std::end(kPools), tokens) == std::end(kPools)) {
    fail(args.op(), name, "expected 8, 16, 32 or 64, got ", tokens);
  }
  return static_cast<int>(tokens);
}

}  // namespace

CompositeBlocksCall prepare_composite_blocks(const Arguments& args, const Tensor& q, const Tensor& k,
                                             const PrefillBatch& batch, int64_t max_seqlen_k, int64_t rule,
                                             bool pools_heads, int64_t aggregate, int64_t pool_q, int64_t pool_k,
                                             double spread_weight, double scale) {
  CompositeBlocksCall call;
  CompositeBlocksParams& p = call.params;
  p.form = rule_facts(args.rule(rule)).form;
  if (p.form != ScoreForm::kMean && p.form != ScoreForm::kVectorSpread) {
    fail(args.op(), "rule", "expected mean or directional, got ", rule_facts(args.rule(rule)).name);
  }
  args.range("aggregate", aggregate, 0, 1);
  args.finite("spread_weight", spread_weight);
  p.spread_weight = spread_weight;
  p.pools_heads = pools_heads;
  p.aggregate = static_cast<Aggregate>(aggregate);
  p.pool_q = pool(args, "pool_q", pool_q);
  p.pool_k = pool(args, "pool_k", pool_k);
  enter_batch(p, args, q, k, batch, scale, call.q, call.k);
  args.groups(q.size(1), k.size(1));
  p.key_blocks = static_cast<int>((max_seqlen_k + batch.block_k - 1) / batch.block_k);
  p.first_slot = 0;
  p.end_slot = num_block_slots(p.total_queries, p.batch, p.block_q);
  p.pools_keys = true;
  return call;
}

std::vector<Tensor> composite_memory(const Tensor& q, CompositeBlocksParams& params) {
  const CompositeBlocksParams& p = params;
  const int64_t pages = num_block_slots(p.total_keys, p.batch, p.pool_k);
  const bool unrounded = !q.is_cuda() && p.dtype != DType::kFloat64;
  Tensor entries = allocate(q, {pages, p.num_kv_heads, composite_vectors(p.form), p.head_dim},
                            unrounded ? ScalarType::Float : q.scalar_type());
  params.pages = entries.data_ptr();
  std::vector<Tensor> memory{entries};
  if (q.is_cuda()) {
    const size_t bytes = composite_workspace(p, multiprocessor_count(q));
    memory.push_back(allocate(q, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    params.workspace = memory.back().data_ptr();
  }
  return memory;
}

Tensor composite_blocks(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, int64_t rule, bool pools_heads, int64_t aggregate, int64_t pool_q,
                        int64_t pool_k, int64_t block_q, int64_t block_k, double spread_weight, double scale,
                        std::optional<Tensor> block_table) {
  constexpr const char* kOp = "composite_blocks";
  const Arguments args(kOp, "q", q);
  args.floating("q", q, 3);
  args.floating("k", k, block_table.has_value() ? 4 : 3);
  const PrefillBatch batch =
      prefill_batch(args, q, k, block_table, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_q, block_k);
  CompositeBlocksCall call = prepare_composite_blocks(args, q, k, batch, max_seqlen_k, rule, pools_heads, aggregate,
                                                      pool_q, pool_k, spread_weight, scale);
  CompositeBlocksParams& p = call.params;
  check_prefill_values(args, batch, block_table, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  const std::vector<Tensor> memory = composite_memory(q, p);
  const ScalarType type = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor shares = allocate(q, {p.end_slot, composite_heads(p), p.key_blocks}, type);
  p.shares = shares.data_ptr();
  Runner(kOp, q).run(p, composite_blocks_cpu, UA_CUDA(composite_blocks_cuda));
  return shares;
}

}  // namespace unique_attn
