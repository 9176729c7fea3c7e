"""Score every visible page of every query token."""

from __future__ import annotations

import torch

from unique_attn.ops._autograd import without_backward
from unique_attn.ops._shared import same_device
from unique_attn.rules import format_id, rule_info, weight_of

_OP = torch.ops.unique_attn.page_scores.default


def page_scores(
    q: torch.Tensor,
    index: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    rule: str,
    page_size: int,
    spread_weight: float | None = None,
    window: int = 0,
    index_format: str = "exact",
) -> torch.Tensor:
    """The rule's score of each page, maximum over the query heads that share a KV head (UNIQUE section 3).

    The last T tokens of a sequence are its queries: token t stands at position ``seq_lens[b] - T + t`` and sees the
    pages up to its own.

    Args:
        q: ``[B, T, Hq, D]``, any strides, T from 1 to 16, ``Hq = G * H`` with G from 1 to 16. Not scaled.
        index: uint8 ``[num_blocks, H, pages_per_block, entry_bytes]`` as written by :func:`page_index` with keys
            of q's dtype.
        block_table: int32 ``[B, max_blocks]``.
        seq_lens: int32 ``[B]``, tokens in the cache, the queries' own included.
        rule: the rule the index was written with.
        page_size: tokens per page.
        spread_weight: lambda of ``unique`` (default 0.5) or c of ``directional`` (default 2); unused by the others.
        window: tokens a query sees (its own included), 0 for all.
        index_format: ``exact`` or ``compressed``, what the index was made with.

    Returns:
        ``[B, T, H, P]`` with ``P = max_blocks * pages_per_block``; bf16 for bf16 and fp16 queries, fp32 for fp32,
        fp64 for fp64. Accumulated in fp32 (fp64). Pages a query does not see hold -inf.

    Raises:
        ValueError: a wrong rank, shape, dtype, device or stride, naming the argument; on the CPU (on CUDA with
            UNIQUE_ATTN_CHECK=1) also a length or a block that is out of range.
    """
    info = rule_info(rule)
    weight = weight_of(info, spread_weight)
    storage = format_id(index_format, rule)
    return without_backward(_OP, (q,), q, index, block_table, seq_lens, page_size, info.id, storage, weight, window)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores of inputs of ``dtype`` are stored and ordered."""
    return torch.bfloat16 if dtype in (torch.bfloat16, torch.float16) else dtype


@torch.library.register_fake("unique_attn::page_scores")
def _(q, index, block_table, seq_lens, page_size, rule, index_format, spread_weight, window):  # type: ignore[no-untyped-def]
    same_device("page_scores", q=q, index=index, block_table=block_table, seq_lens=seq_lens)
    pages = block_table.shape[1] * index.shape[2]
    return q.new_empty((q.shape[0], q.shape[1], index.shape[1], pages), dtype=score_dtype(q.dtype))
