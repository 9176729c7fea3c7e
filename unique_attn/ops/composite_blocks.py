"""Which share of attention every block of keys gets from every block of queries, by pooled queries and keys."""

from __future__ import annotations

import torch

from unique_attn.ops._autocast import autocast_prefill
from unique_attn.ops._autograd import register_no_backward
from unique_attn.ops._shared import same_device, softmax_scale
from unique_attn.prefill_methods import method_options


def composite_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    method: str = "directional",
    pool_q: int = 8,
    pool_k: int = 8,
    block_q: int = 128,
    block_k: int = 64,
    spread_weight: float | None = None,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimated share of attention of every key block, for every block of queries (UniSparse, arXiv 2512.14082,
    section 3: attention between composite tokens).

    ``pool_q`` queries at a time become their mean qbar, ``pool_k`` keys at a time a page with a mean and a variance of
    each channel. A pooled query sees the pages whose first key its last query sees, and a softmax over them of

    - ``directional`` (ours): ``scale * (qbar . mean + c * sqrt(sum_d qbar_d^2 var_d))``, as pages are scored in
      decoding; a key block's share is the largest that any pooled query of the block gives it, for each query head;
    - ``unisparse`` (the paper): ``scale * qbar . mean``, where queries are pooled over the heads of a group as well; a
      key block's share is the mean over the pooled queries of the block, for each KV head

    is summed by key blocks. Bitwise deterministic. Tokens and blocks as in :func:`block_sparse_attention`.

    Args:
        q: ``[N, Hq, D]``, ``Hq = G * H`` with G from 1 to 16; bf16, fp16, fp32 (fp64 on the CPU); D a multiple of 8
            to 256.
        k: ``[Nk, H, D]``, or a paged cache ``[num_blocks, H, block_size, D]`` as in :func:`block_sparse_attention`.
        cu_seqlens_q: int32 ``[B + 1]``, the first query of each sequence and N, ascending from 0. On the CPU the values
            are checked; on CUDA with UNIQUE_ATTN_CHECK=1.
        cu_seqlens_k: int32 ``[B + 1]``, the same of the keys. A sequence has at least as many keys as queries.
        max_seqlen_q: host-known upper bound of the queries of a sequence.
        max_seqlen_k: host-known upper bound of the keys of a sequence.
        method: ``directional`` or ``unisparse``.
        pool_q: queries of a pooled query (the paper's c_q): 8, 16, 32 or 64.
        pool_k: keys of a page (the paper's c_k): 8, 16, 32 or 64.
        block_q: queries of a block, 64 or 128.
        block_k: keys of a block, 64 or 128.
        spread_weight: c of ``directional``, 2 by default.
        scale: factor of the logits, ``1 / sqrt(D)`` by default.
        block_table: int32 ``[B, max_blocks]`` of a paged cache, as in :func:`block_sparse_attention`. There is memory
            for pages of ``B * max_seqlen_k`` keys then, since only the device knows how many there are.

    Returns:
        ``[slots, Hm, key_blocks]`` fp32 (fp64 for fp64), ``slots = N // block_q + B`` as in
        :func:`query_block_slots`, Hm = Hq (``unisparse``: H), ``key_blocks = ceil(max_seqlen_k / block_k)``. 0 for
        blocks that no query of the block sees, and in rows of no block. A pooled query whose logits hold a NaN gives
        NaN to all blocks that it sees.

    Raises:
        ValueError: a wrong rank, shape, dtype, device, stride or number, naming the argument.
        NotDifferentiableError: a gradient is asked for.
    """
    scale = softmax_scale(q) if scale is None else float(scale)
    q, k = autocast_prefill(block_table, q, k)
    rule, pools_heads, aggregate, weight = method_options("composite_blocks", method, spread_weight)
    return torch.ops.unique_attn.composite_blocks(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        rule, pools_heads, aggregate, pool_q, pool_k, block_q, block_k, weight, scale, block_table,
    )  # fmt: skip


@torch.library.register_fake("unique_attn::composite_blocks")
def _(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, rule, pools_heads, aggregate, *options):  # type: ignore[no-untyped-def]
    _pool_q, _pool_k, block_q, block_k, _weight, _scale, block_table = options
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    same_device("composite_blocks", q=q, k=k, **bounds, block_table=block_table)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    slots = q.shape[0] // block_q + cu_seqlens_q.shape[0] - 1
    heads = k.shape[1] if pools_heads else q.shape[1]
    return q.new_empty((slots, heads, (max_seqlen_k + block_k - 1) // block_k), dtype=dtype)


register_no_backward("composite_blocks", "prefill")
