#include <algorithm>

#include "prefill.h"
#include "value_checks.h"

namespace unique_attn {
namespace {

void block_length(const Arguments& args, const char* name, int64_t length) {
  if (length != 64 && length != 128) fail(args.op(), name, "expected 64 or 128, got ", length);
}

const int32_t* bounds(const Arguments& args, const char* name, const Tensor& cu_seqlens) {
  args.tensor(name, cu_seqlens, ScalarType::Int, 1);
  args.contiguous(name, cu_seqlens);
  if (cu_seqlens.size(0) < 1) fail(args.op(), name, "expected B + 1 numbers, got none");
  return static_cast<const int32_t*>(cu_seqlens.data_ptr());
}

void check_mask(const Arguments& args, const Tensor& mask, const BlockSparseParams& p) {
  args.tensor("mask", mask, ScalarType::Int, 3);
  args.contiguous("mask", mask);
  const int64_t slots = num_block_slots(p.total_queries, p.batch, p.block_q);
  if (mask.size(0) < slots) {
    fail(args.op(), "mask", "expected at least ", slots, " query block slots in dimension 0, got ", mask.size(0));
  }
  const int64_t heads = mask.size(1);
  if (heads != 1 && heads != p.num_kv_heads && heads != p.num_q_heads) {
    fail(args.op(), "mask", "expected 1, ", p.num_kv_heads, " (KV heads) or ", p.num_q_heads,
         " (query heads) in dimension 1, got ", heads);
  }
  // Bits must be numbers, and so must the first key of the block that the last one stands for.
  const int64_t most = INT32_MAX / 2 / kMaskBits / p.block_k;
  if (mask.size(2) > most) {
    fail(args.op(), "mask", "expected at most ", most, " words in dimension 2, got ", mask.size(2));
  }
}

}  // namespace

PrefillBatch prefill_batch(const Arguments& args, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                           int64_t total_queries, int64_t total_keys, int64_t max_seqlen_q, int64_t block_q,
                           int64_t block_k) {
  PrefillBatch batch{};
  block_length(args, "block_q", block_q);
  block_length(args, "block_k", block_k);
  batch.block_q = static_cast<int>(block_q);
  batch.block_k = static_cast<int>(block_k);
  batch.cu_seqlens_q = bounds(args, "cu_seqlens_q", cu_seqlens_q);
  batch.cu_seqlens_k = bounds(args, "cu_seqlens_k", cu_seqlens_k);
  args.size("cu_seqlens_k", cu_seqlens_k, 0, cu_seqlens_q.size(0), "as in cu_seqlens_q");
  args.range("tokens of q", total_queries, 0, INT32_MAX / 2);
  args.range("tokens of k", total_keys, 0, INT32_MAX / 2);
  args.range("max_seqlen_q", max_seqlen_q, 0, INT32_MAX / 2);
  batch.batch = static_cast<int>(cu_seqlens_q.size(0) - 1);
  batch.total_queries = static_cast<int>(total_queries);
  batch.total_keys = static_cast<int>(total_keys);
  batch.max_queries = static_cast<int>(std::min(max_seqlen_q, total_queries));
  return batch;
}

PrefillBatch prefill_batch(const Arguments& args, const Tensor& q, const Tensor& k,
                           const std::optional<Tensor>& block_table, const Tensor& cu_seqlens_q,
                           const Tensor& cu_seqlens_k, int64_t max_seqlen_q, std::optional<int64_t> max_seqlen_k,
                           int64_t block_q, int64_t block_k) {
  constexpr int64_t kMost = INT32_MAX / 2;
  const bool paged = block_table.has_value();
  PrefillBatch batch =
      prefill_batch(args, cu_seqlens_q, cu_seqlens_k, q.size(0), paged ? 0 : k.size(0), max_seqlen_q, block_q, block_k);
  if (max_seqlen_k.has_value()) args.range("max_seqlen_k", *max_seqlen_k, 0, kMost);
  if (!paged) return batch;
  const int64_t block_size = k.size(2);
  if (block_size < kBlockAlign || block_size > kMost || block_size % kBlockAlign != 0) {
    fail(args.op(), "k", "expected blocks of a multiple of ", kBlockAlign, " tokens in dimension 2, got ", block_size,
         " (shape ", shape_string(k), ")");
  }
  batch.table = args.blocks(*block_table, batch.batch, k.size(0), block_size, kMost);
  // How many keys there are is known on the device alone.
  const int64_t bound = max_seqlen_k.value_or(0) * batch.batch;
  if (bound > kMost) {
    fail(args.op(), "max_seqlen_k", "expected at most ", kMost / batch.batch, " for ", batch.batch,
         " sequences in a paged cache, got ", *max_seqlen_k);
  }
  batch.total_keys = static_cast<int>(bound);
  return batch;
}

KeyView prefill_keys(const Arguments& args, const char* name, const Tensor& tensor, const PrefillBatch& batch,
                     std::optional<Tensor>& keep) {
  if (is_paged(batch.table)) {
    const PagedView cache = args.cache(name, tensor);
    return {cache.data, cache.stride_block, cache.stride_head, cache.stride_token};
  }
  const TokenView tokens = packed_tokens(args, name, tensor, keep);
  return {tokens.data, 0, tokens.stride_head, tokens.stride_token};
}

void check_prefill_values(const Arguments& args, const PrefillBatch& batch, const std::optional<Tensor>& block_table,
                          const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                          std::optional<int64_t> max_seqlen_k) {
  if (!checks_values(args)) return;
  check_cu_seqlens(args.op(), "cu_seqlens_q", cu_seqlens_q, batch.total_queries, "max_seqlen_q", max_seqlen_q);
  const bool paged = block_table.has_value();
  const int64_t held = paged ? table_tokens(batch.table) : batch.total_keys;
  const char* held_name = paged ? "the tokens of a row of block_table" : "the number of keys";
  const bool bounded = max_seqlen_k.has_value() && (!paged || *max_seqlen_k <= held);
  check_cu_seqlens(args.op(), "cu_seqlens_k", cu_seqlens_k, paged ? -1 : held, bounded ? "max_seqlen_k" : held_name,
                   bounded ? *max_seqlen_k : held);
  check_queries_have_keys(args.op(), cu_seqlens_q, cu_seqlens_k);
  if (paged) check_key_blocks(args.op(), batch.table, *block_table, cu_seqlens_k);
}

BlockSparseCall prepare_block_sparse(const Arguments& args, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const PrefillBatch& batch, double scale) {
  BlockSparseCall call;
  BlockSparseParams& p = call.params;
  enter_batch(p, args, q, k, batch, scale, call.q, call.k);
  p.v = prefill_keys(args, "v", v, batch, call.v);
  for (int64_t dim = 0; dim < k.dim(); ++dim) args.size("v", v, dim, k.size(dim), "as in k");
  args.groups(q.size(1), k.size(1));
  if (q.is_cuda()) {
    call.items_taken = torch::stable::new_empty(q, {1}, ScalarType::Int);
    p.items_taken = static_cast<int32_t*>(call.items_taken->data_ptr());
  }
  return call;
}

std::tuple<Tensor, Tensor> block_sparse_results(const Tensor& q, BlockSparseParams& params) {
  const ScalarType lse_type = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = allocate(q, q.sizes(), q.scalar_type());
  Tensor lse = allocate(q, {q.size(0), q.size(1)}, lse_type);
  params.out = out.data_ptr();
  params.lse = lse.data_ptr();
  return {out, lse};
}

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                                  Tensor cu_seqlens_k, int64_t max_seqlen_q, Tensor mask,
                                                  int64_t block_q, int64_t block_k, double scale,
                                                  std::optional<Tensor> block_table) {
  constexpr const char* kOp = "block_sparse_attention";
  const Arguments args(kOp, "q", q);
  const int64_t rank = block_table.has_value() ? 4 : 3;
  args.floating("q", q, 3);
  args.floating("k", k, rank);
  args.floating("v", v, rank);
  const PrefillBatch batch =
      prefill_batch(args, q, k, block_table, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, {}, block_q, block_k);
  BlockSparseCall call = prepare_block_sparse(args, q, k, v, batch, scale);
  BlockSparseParams& p = call.params;
  check_mask(args, mask, p);
  p.num_mask_heads = static_cast<int>(mask.size(1));
  p.mask_words = static_cast<int>(mask.size(2));
  p.mask = static_cast<const uint32_t*>(mask.data_ptr());
  check_prefill_values(args, batch, block_table, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, {});
  std::tuple<Tensor, Tensor> results = block_sparse_results(q, p);
  Runner(kOp, q).run(p, block_sparse_attention_cpu, UA_CUDA(block_sparse_attention_cuda));
  return results;
}

}  // namespace unique_attn
