// The ops of sparse prefill. As in ops.h, everything is checked before anything runs.
#pragma once

#include "arguments.h"
#include "core/prefill/block_sparse.h"

namespace unique_attn {

// ---- The registered functions; library.cpp has their schemas. ----

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                                  Tensor cu_seqlens_k, int64_t max_seqlen_q, Tensor mask,
                                                  int64_t block_q, int64_t block_k, double scale);

}  // namespace unique_attn
