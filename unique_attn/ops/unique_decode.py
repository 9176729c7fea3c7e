"""One decode step in one call: append, index, score, select, attend."""

from __future__ import annotations

import torch

from unique_attn.ops._autograd import reject_grad
from unique_attn.ops._shared import same_device, softmax_scale
from unique_attn.rules import format_id, rule_info, weight_of

_OP = torch.ops.unique_attn.unique_decode.default
_STORED = torch.ops.unique_attn.unique_decode.stored
_OUT = torch.ops.unique_attn.unique_decode.out


def unique_decode(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    index: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_pages: int,
    *,
    rule: str,
    page_size: int,
    spread_weight: float | None = None,
    sink_pages: int = 1,
    recent_pages: int = 1,
    scale: float | None = None,
    window: int = 0,
    budget_pages: torch.Tensor | None = None,
    index_format: str = "exact",
    slot_mapping: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`append_kv` (when ``k`` and ``v`` are given), :func:`page_index` of the last T tokens' pages,
    :func:`page_scores`, :func:`topk_pages` and :func:`sparse_decode`, with results identical to theirs; but one token
    of few sequences takes one kernel on Hopper, which adds up the selected tokens in another order.

    Nothing is read back to the host, so a step can be captured in a CUDA graph and replayed while ``seq_lens``,
    ``block_table`` and ``budget_pages`` change on the device.

    Args:
        q: ``[B, T, Hq, D]``, the last T tokens of each sequence.
        k: ``[B, T, H, D]`` new keys, written at positions ``seq_lens[b] - T + t``; None if they are in the cache.
        v: like ``k``; None together with it.
        k_cache: ``[num_blocks, H, block_size, D]``. Written if ``k`` is given.
        v_cache: like ``k_cache``.
        index: uint8 from :func:`new_index`. Written.
        block_table: int32 ``[B, max_blocks]``.
        seq_lens: int32 ``[B]``, lengths after this step's T tokens.
        num_pages: pages per row (the budget in pages, k of the paper).
        rule, page_size, spread_weight, sink_pages, recent_pages, scale, window, budget_pages, index_format: as in the
            single ops. With T > 1 and ``recent_pages=0``, a token's own page is scored by an entry that the tokens
            behind it are part of.
        slot_mapping: int64 ``[B * T]``, as an engine's: new tokens with a negative number are not written. Other
            numbers are the places that ``block_table`` has for them, block * block_size + offset. None: all are
            written.
        out: ``[B, T, Hq, D]`` of q's dtype, contiguous, with memory of its own that begins at a multiple of 16 bytes;
            None: allocated. Written.

    Returns:
        ``out`` ``[B, T, Hq, D]``, ``lse`` ``[B, T, Hq]`` and the selected logical ``pages`` ``[B, T, H, num_pages]``.

    Raises:
        ValueError: a wrong rank, shape, dtype, device or stride, naming the argument; on the CPU (on CUDA with
            UNIQUE_ATTN_CHECK=1) also a length or a block that is out of range. Nothing is written then.
        NotDifferentiableError: an input requires grad while grad mode is on.
    """
    info = rule_info(rule)
    weight = weight_of(info, spread_weight)
    scale = softmax_scale(q) if scale is None else float(scale)
    if torch.is_grad_enabled():
        reject_grad("unique_decode", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, out=out)
    index_id = format_id(index_format, rule)
    numbers = (num_pages, page_size, info.id, index_id, weight, sink_pages, recent_pages, scale, window, budget_pages)
    if out is not None or slot_mapping is not None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        return out, *_OUT(q, k, v, k_cache, v_cache, index, block_table, seq_lens, *numbers, slot_mapping, out)
    if k is None and v is None:
        return _STORED(q, k_cache, v_cache, index, block_table, seq_lens, *numbers)
    return _OP(q, k, v, k_cache, v_cache, index, block_table, seq_lens, *numbers)


@torch.library.register_fake("unique_attn::unique_decode")
def _(q, k, v, k_cache, v_cache, index, block_table, seq_lens, *numbers):  # type: ignore[no-untyped-def]
    same_device("unique_decode", q=q, k=k, v=v)
    return _stored(q, k_cache, v_cache, index, block_table, seq_lens, *numbers)


@torch.library.register_fake("unique_attn::unique_decode.stored")
def _stored(q, k_cache, v_cache, index, block_table, seq_lens, num_pages, *numbers):  # type: ignore[no-untyped-def]
    same_device(
        "unique_decode",
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        index=index,
        block_table=block_table,
        seq_lens=seq_lens,
        budget_pages=numbers[-1],
    )
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    pages = q.new_empty((q.shape[0], q.shape[1], k_cache.shape[1], num_pages), dtype=torch.int32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype), pages


@torch.library.register_fake("unique_attn::unique_decode.out")
def _out(q, k, v, k_cache, v_cache, index, block_table, seq_lens, *more):  # type: ignore[no-untyped-def]
    *numbers, slot_mapping, out = more
    same_device("unique_decode", q=q, k=k, v=v, slot_mapping=slot_mapping, out=out)
    return _stored(q, k_cache, v_cache, index, block_table, seq_lens, *numbers)[1:]
