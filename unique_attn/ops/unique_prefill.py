"""Sparse prefill in one call: estimate, select, attend."""

from __future__ import annotations

import torch

from unique_attn.ops._autocast import autocast_prefill
from unique_attn.ops._autograd import register_no_backward
from unique_attn.ops._shared import same_device, softmax_scale
from unique_attn.ops.select_blocks import _WORD_BITS
from unique_attn.prefill_methods import method_options, selection_of


def unique_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    method: str = "directional",
    threshold: float | None = None,
    top_p: float | None = None,
    min_blocks: int = 0,
    max_blocks: int | None = None,
    pool_q: int = 8,
    pool_k: int = 8,
    block_q: int = 128,
    block_k: int = 64,
    spread_weight: float | None = None,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`composite_blocks`, :func:`select_blocks` and :func:`block_sparse_attention` in one call (UniSparse,
    arXiv 2512.14082, section 3).

    The same results as from the three. Shares are made for so many query blocks at a time that memory stays linear in
    the number of tokens, but for the mask, which has one bit for every query block, key block and head.

    Args:
        q: ``[N, Hq, D]``, as in :func:`block_sparse_attention`.
        k: ``[Nk, H, D]``, or a paged cache ``[num_blocks, H, block_size, D]`` as in :func:`block_sparse_attention`.
        v: like ``k``.
        cu_seqlens_q: int32 ``[B + 1]``, the first query of each sequence and N.
        cu_seqlens_k: int32 ``[B + 1]``, the same of the keys.
        max_seqlen_q: host-known upper bound of the queries of a sequence.
        max_seqlen_k: host-known upper bound of the keys of a sequence.
        method: ``directional`` or ``unisparse``, as in :func:`composite_blocks`.
        threshold: as in :func:`select_blocks`. With neither this nor ``top_p``, the method's own.
        top_p: likewise.
        min_blocks: as in :func:`select_blocks`.
        max_blocks: likewise.
        pool_q: queries of a pooled query: 8, 16, 32 or 64.
        pool_k: keys of a page: 8, 16, 32 or 64.
        block_q: queries of a block, 64 or 128.
        block_k: keys of a block, 64 or 128.
        spread_weight: c of ``directional``, 2 by default.
        scale: factor of the logits, ``1 / sqrt(D)`` by default.
        block_table: int32 ``[B, max_blocks]`` of paged caches, as in :func:`composite_blocks` and
            :func:`block_sparse_attention`.

    Returns:
        ``out`` ``[N, Hq, D]`` and ``lse`` ``[N, Hq]`` of :func:`block_sparse_attention`, ``mask`` and ``kept`` of
        :func:`select_blocks`.

    Raises:
        ValueError: a wrong rank, shape, dtype, device, stride or number, naming the argument.
        NotDifferentiableError: a gradient is asked for.
    """
    scale = softmax_scale(q) if scale is None else float(scale)
    q, k, v = autocast_prefill(block_table, q, k, v)
    rule, pools_heads, aggregate, weight = method_options("unique_prefill", method, spread_weight)
    threshold, top_p = selection_of(method, threshold, top_p)
    return torch.ops.unique_attn.unique_prefill(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, rule, pools_heads, aggregate,
        threshold, top_p, min_blocks, max_blocks, pool_q, pool_k, block_q, block_k, weight, scale, block_table,
    )  # fmt: skip


@torch.library.register_fake("unique_attn::unique_prefill")
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, rule, pools_heads, *options):  # type: ignore[no-untyped-def]
    block_q, block_k, _weight, _scale, block_table = options[-5:]
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    same_device("unique_prefill", q=q, k=k, v=v, **bounds, block_table=block_table)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    slots = q.shape[0] // block_q + cu_seqlens_q.shape[0] - 1
    heads = k.shape[1] if pools_heads else q.shape[1]
    words = ((max_seqlen_k + block_k - 1) // block_k + _WORD_BITS - 1) // _WORD_BITS
    mask = q.new_empty((slots, heads, words), dtype=torch.int32)
    kept = q.new_empty((slots, heads), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=dtype), mask, kept


register_no_backward("unique_prefill", "prefill")
