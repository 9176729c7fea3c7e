// The ops of sparse prefill. As in ops.h, everything is checked before anything runs.
#pragma once

#include <vector>

#include "arguments.h"
#include "core/prefill/block_sparse.h"
#include "core/prefill/composite_blocks.h"
#include "core/prefill/select_blocks.h"
#include "training.h"

namespace unique_attn {

// ---- Checked calls: Params, and the tensors whose memory they point into. ----

// What the three ops know of a packed batch of queries and keys.
struct PrefillBatch {
  int batch;
  int total_queries;
  int total_keys;  // paged: at most so many; 0 where the op is given no bound
  int max_queries;
  int block_q, block_k;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  PageTable table;  // of paged keys
};

PrefillBatch prefill_batch(const Arguments& args, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                           int64_t total_queries, int64_t total_keys, int64_t max_seqlen_q, int64_t block_q,
                           int64_t block_k);
// The same of queries [N, Hq, D] and keys: packed [Nk, H, D], or with a table [num_blocks, H, block_size, D].
// No max_seqlen_k where the op is not given it.
PrefillBatch prefill_batch(const Arguments& args, const Tensor& q, const Tensor& k,
                           const std::optional<Tensor>& block_table, const Tensor& cu_seqlens_q,
                           const Tensor& cu_seqlens_k, int64_t max_seqlen_q, std::optional<int64_t> max_seqlen_k,
                           int64_t block_q, int64_t block_k);
// Packed or paged keys or values of such a batch; their tensor has the right rank.
KeyView prefill_keys(const Arguments& args, const char* name, const Tensor& tensor, const PrefillBatch& batch,
                     std::optional<Tensor>& keep);
// Fills the Params of an op with what it has of its queries, keys and batch.
template <typename Params>
void enter_batch(Params& p, const Arguments& args, const Tensor& q, const Tensor& k, const PrefillBatch& batch,
                 double scale, std::optional<Tensor>& keep_q, std::optional<Tensor>& keep_k) {
  p.dtype = args.dtype();
  const TokenView view = packed_tokens(args, "q", q, keep_q);
  p.q = view.data, p.q_stride_token = view.stride_token, p.q_stride_head = view.stride_head;
  p.k = prefill_keys(args, "k", k, batch, keep_k);
  args.size("k", k, k.dim() - 1, q.size(2), "head dimension of q");
  p.batch = batch.batch;
  p.num_q_heads = static_cast<int>(q.size(1));
  p.num_kv_heads = static_cast<int>(k.size(1));
  p.head_dim = static_cast<int>(q.size(2));
  p.total_queries = batch.total_queries;
  p.total_keys = batch.total_keys;
  p.max_queries = batch.max_queries;
  p.block_q = batch.block_q;
  p.block_k = batch.block_k;
  p.cu_seqlens_q = batch.cu_seqlens_q;
  p.cu_seqlens_k = batch.cu_seqlens_k;
  args.finite("scale", scale);
  p.scale = scale;
  p.table = batch.table;
}
// The values of bounds and table, where they are looked at.
void check_prefill_values(const Arguments& args, const PrefillBatch& batch, const std::optional<Tensor>& block_table,
                          const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                          std::optional<int64_t> max_seqlen_k);

// Without results and workspace.
struct CompositeBlocksCall {
  CompositeBlocksParams params{};
  std::optional<Tensor> q, k;
};
CompositeBlocksCall prepare_composite_blocks(const Arguments& args, const Tensor& q, const Tensor& k,
                                             const PrefillBatch& batch, int64_t max_seqlen_k, int64_t rule,
                                             bool pools_heads, int64_t aggregate, int64_t pool_q, int64_t pool_k,
                                             double spread_weight, double scale);
// Memory for the pages and, on CUDA, to work in; entered in the Params.
std::vector<Tensor> composite_memory(const Tensor& q, CompositeBlocksParams& params);

// Without shares and results.
SelectBlocksParams prepare_select_blocks(const Arguments& args, const PrefillBatch& batch, int64_t heads,
                                         int64_t key_blocks, std::optional<double> threshold,
                                         std::optional<double> top_p, int64_t min_blocks,
                                         std::optional<int64_t> max_blocks);

// Without mask and results.
struct BlockSparseCall {
  BlockSparseParams params{};
  std::optional<Tensor> q, k, v, items_taken;
};
BlockSparseCall prepare_block_sparse(const Arguments& args, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const PrefillBatch& batch, double scale);
// The results `out` and `lse`, entered in the Params.
std::tuple<Tensor, Tensor> block_sparse_results(const Tensor& q, BlockSparseParams& params);

// ---- The registered functions; library.cpp has their schemas. ----

Tensor composite_blocks(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, int64_t rule, bool pools_heads, int64_t aggregate, int64_t pool_q,
                        int64_t pool_k, int64_t block_q, int64_t block_k, double spread_weight, double scale,
                        std::optional<Tensor> block_table);

std::tuple<Tensor, Tensor> select_blocks(Tensor shares, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                         std::optional<double> threshold, std::optional<double> top_p,
                                         int64_t min_blocks, std::optional<int64_t> max_blocks, int64_t block_q,
                                         int64_t block_k);

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                                  Tensor cu_seqlens_k, int64_t max_seqlen_q, Tensor mask,
                                                  int64_t block_q, int64_t block_k, double scale,
                                                  std::optional<Tensor> block_table);

std::tuple<Tensor, Tensor, Tensor, Tensor> unique_prefill(
    Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    int64_t rule, bool pools_heads, int64_t aggregate, std::optional<double> threshold, std::optional<double> top_p,
    int64_t min_blocks, std::optional<int64_t> max_blocks, int64_t pool_q, int64_t pool_k, int64_t block_q,
    int64_t block_k, double spread_weight, double scale, std::optional<Tensor> block_table);

}  // namespace unique_attn
