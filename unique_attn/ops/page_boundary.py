"""The boundary score of every query of a training batch."""

from __future__ import annotations

import torch

from unique_attn.ops._autocast import autocast_inputs
from unique_attn.ops._shared import same_device
from unique_attn.rules import rule_info, weight_of


def page_boundary(
    q: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    k: int,
    *,
    rule: str,
    page_size: int,
    spread_weight: float | None = None,
    sink_pages: int = 1,
    recent_pages: int = 1,
) -> torch.Tensor:
    """theta: the midpoint between the last selected and the first dropped page's score (UNIQUE section 4).

    A query's candidates are the complete pages between the sink pages and its own recent pages; with s their scores
    (as :func:`page_scores` orders them) in descending order and ``k' = k - sink_pages - recent_pages``,
    ``theta = (s_(k') + s_(k'+1)) / 2``. With at most k' candidates theta is -inf (every gate is 1).
    NaN scores rank below every number and count as -inf; with k' = 0 and a candidate theta is +inf (every gate is 0).

    Exact and bitwise deterministic, so gradient checkpointing sees the same gates twice. Scores exist for a bounded
    chunk of queries at a time. Not differentiable: theta is a constant of the soft mask. Under ``torch.autocast`` q is
    cast to its dtype, as in ``scaled_dot_product_attention``.

    Args:
        q: ``[N, Hq, D]`` packed queries, ``Hq = G * H`` with G from 1 to 16. Not scaled.
        index: uint8 ``[slots, H, 1, entry_bytes]`` from :func:`unique_attn.train.packed_index`.
        cu_seqlens: int32 ``[B + 1]``, the first token of each sequence and N, ascending from 0. On the CPU the values
            are checked; on CUDA with UNIQUE_ATTN_CHECK=1.
        max_seqlen: host-known upper bound of the sequence lengths.
        k: selected pages per query, sink and recent pages included.
        rule: ``mean``, ``unique`` or ``directional``.
        page_size: tokens per page; pages start at each sequence's start.
        spread_weight: lambda of ``unique`` (default 0.5) or c of ``directional`` (default 2).
        sink_pages: first pages of a sequence, always visible.
        recent_pages: last pages up to the query's own, always visible; at least 1.

    Returns:
        ``[N, H]`` fp32 (fp64 for fp64).

    Raises:
        ValueError: a wrong rank, shape, dtype, device, stride or number, naming the argument.
    """
    info = rule_info(rule)
    weight = weight_of(info, spread_weight)
    (q,) = autocast_inputs(q)
    return torch.ops.unique_attn.page_boundary(
        q.detach(), index, cu_seqlens, max_seqlen, k, page_size, info.id, weight, sink_pages, recent_pages
    )


@torch.library.register_fake("unique_attn::page_boundary")
def _(q, index, cu_seqlens, max_seqlen, k, page_size, rule, spread_weight, sink_pages, recent_pages):  # type: ignore[no-untyped-def]
    same_device("page_boundary", q=q, index=index, cu_seqlens=cu_seqlens)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[0], index.shape[1]), dtype=dtype)
