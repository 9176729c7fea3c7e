"""Exact selection of the k best pages of each row."""

from __future__ import annotations

import torch

from unique_attn.ops._shared import same_device

_OP = torch.ops.unique_attn.topk_pages.default


def topk_pages(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    k: int,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 1,
    window: int = 0,
    budget_pages: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    pages_per_block: int = 1,
) -> torch.Tensor:
    """The k pages with the largest scores of each (sequence, query token, KV head), deterministically.

    The recent pages (the query's own first) and the visible sink pages are always taken and count toward k; the rest
    goes to the largest scores. NaN ranks below every number, -0 equals +0, ties go to the lowest page. At most k
    visible pages: all of them. Any number of pages to 2**20, k to 4096.

    Args:
        scores: ``[B, T, H, P]`` bf16 or fp32 (fp64 on the CPU), contiguous.
        seq_lens: int32 ``[B]``, tokens in the cache, the T query tokens included.
        k: pages per row, the width of the result; at least ``sink_pages + recent_pages``.
        page_size: tokens per page.
        sink_pages: first pages of the sequence that are always selected while they are visible.
        recent_pages: last pages up to the query's own that are always selected.
        window: tokens a query sees, 0 for all; pages wholly outside are no candidates.
        budget_pages: int32 ``[B]``, a smaller k for each sequence, on the device; more than k counts as k.
        block_table: int32 ``[B, max_blocks]``; if given, the result holds physical pages,
            ``block * pages_per_block + page % pages_per_block``, instead of logical ones.
        pages_per_block: pages in a physical block; used with ``block_table``.

    Returns:
        int32 ``[B, T, H, k]``, ascending logical pages, then -1.

    Raises:
        ValueError: a wrong rank, shape, dtype or device, or a k that does not fit, naming the argument; on the CPU (on
            CUDA with UNIQUE_ATTN_CHECK=1) also a length or a block that is out of range.
    """
    return _OP(
        scores,
        seq_lens,
        k,
        page_size,
        sink_pages,
        recent_pages,
        window,
        budget_pages,
        block_table,
        pages_per_block,
    )


@torch.library.register_fake("unique_attn::topk_pages")
def _(  # type: ignore[no-untyped-def]
    scores,
    seq_lens,
    k,
    page_size,
    sink_pages,
    recent_pages,
    window,
    budget_pages,
    block_table,
    pages_per_block,
):
    same_device("topk_pages", scores=scores, seq_lens=seq_lens, budget_pages=budget_pages, block_table=block_table)
    return scores.new_empty((*scores.shape[:3], k), dtype=torch.int32)
