// The ops of sparsity-aware training. As in ops.h, everything is checked before anything runs.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "core/train/page_boundary.h"
#include "core/train/soft_mask_attention.h"

namespace unique_attn {

// q, k or v [N, heads, D] of a packed batch. Tensors that repeat memory (strides of 0, from expand) are copied for
// CUDA: tensor maps cannot describe them.
TokenView packed_tokens(const Arguments& args, const char* name, const Tensor& tensor, std::optional<Tensor>& keep);
PackedSequences packed_sequences(const Arguments& args, const Tensor& cu_seqlens, int64_t total_tokens,
                                 int64_t max_seqlen, int64_t page_size);
IndexView packed_index(const Arguments& args, const Tensor& index, Rule rule, const PackedSequences& seqs,
                       int64_t num_kv_heads, int64_t head_dim, std::optional<Tensor>& keep);

// ---- The registered functions; library.cpp has their schemas. ----

Tensor page_boundary(Tensor q, Tensor index, Tensor cu_seqlens, int64_t max_seqlen, int64_t k, int64_t page_size,
                     int64_t rule, double spread_weight, int64_t sink_pages, int64_t recent_pages);

std::tuple<Tensor, Tensor> soft_mask_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int64_t max_seqlen,
                                             std::optional<Tensor> index, std::optional<Tensor> theta,
                                             std::optional<Tensor> tau, std::optional<Tensor> pages, int64_t page_size,
                                             int64_t rule, double spread_weight, int64_t sink_pages,
                                             int64_t recent_pages, double scale);

std::tuple<Tensor, Tensor, Tensor> soft_mask_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,
                                                      Tensor lse, Tensor cu_seqlens, int64_t max_seqlen,
                                                      std::optional<Tensor> index, std::optional<Tensor> theta,
                                                      std::optional<Tensor> tau, std::optional<Tensor> pages,
                                                      int64_t page_size, int64_t rule, double spread_weight,
                                                      int64_t sink_pages, int64_t recent_pages, double scale);

}  // namespace unique_attn
