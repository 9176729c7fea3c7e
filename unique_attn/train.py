"""Sparsity-aware training: from packed q, k and v to attention with a soft or hard page mask (UNIQUE section 4).

:func:`masked_attention` is the whole of it; :func:`packed_index` and :func:`select_pages` are its parts. All of them
take packed sequences: the tokens of all sequences one after another, bounded by ``cu_seqlens``. A padded batch
``[B, L]`` is the special case ``cu_seqlens = [0, L, 2 L, ...]`` if the padding is on the right, where no real token
sees it.
"""

from __future__ import annotations

import os
from typing import Any, Literal, NoReturn

import torch

from unique_attn import ops
from unique_attn.ops._autocast import autocast_inputs
from unique_attn.ops._autograd import reject_forward_ad
from unique_attn.rules import MAX_PAGES, PAGE_SIZES, choices

Mode = Literal["soft", "hard", "dense"]
_QUERY_CHUNK = 16  # query tokens that one row of `page_scores` takes
_SCORE_BYTES = 256 << 20  # memory for the scores of a chunk of queries


# ---- Checks: what Python computes with before an op sees it. ----


def _refuse(function: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{function}: {argument}: expected {expected}, got {got}")


def _check_packed(
    function: str, name: str, tensor: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, page_size: int
) -> None:
    """Raise ValueError unless ``tensor`` is ``[N, heads, D]`` and the packing has the right types."""
    if tensor.dim() != 3:
        _refuse(function, name, "3 dimensions [N, heads, D]", f"shape {list(tensor.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        _refuse(function, "cu_seqlens", "1 dimension [B + 1]", f"shape {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        _refuse(function, "cu_seqlens", "dtype int32", str(cu_seqlens.dtype).removeprefix("torch."))
    if cu_seqlens.device != tensor.device:
        _refuse(function, "cu_seqlens", f"the device of {name}, {tensor.device}", cu_seqlens.device)
    if max_seqlen < 0:
        _refuse(function, "max_seqlen", "at least 0", max_seqlen)
    if page_size not in PAGE_SIZES:
        _refuse(function, "page_size", choices(PAGE_SIZES), page_size)


def _check_bounds(function: str, tokens: int, cu_seqlens: torch.Tensor, max_seqlen: int) -> None:
    """Raise ValueError unless the sequences are those of ``tokens`` tokens. As the ops: always on the CPU, with
    UNIQUE_ATTN_CHECK=1 on CUDA. Traced and fake tensors have no values."""
    if torch.compiler.is_compiling() or type(cu_seqlens) is not torch.Tensor:
        return
    if cu_seqlens.device.type != "cpu" and os.environ.get("UNIQUE_ATTN_CHECK", "0") in ("", "0"):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens:
        _refuse(function, "cu_seqlens", f"numbers from 0 to the number of tokens {tokens}", f"{first} to {last}")
    lengths = cu_seqlens.diff()
    bad = (lengths < 0) | (lengths > max_seqlen)
    if bool(bad.any()):
        b = int(bad.nonzero()[0])
        expected = f"ascending numbers at most max_seqlen = {max_seqlen} apart"
        _refuse(function, "cu_seqlens", expected, f"{int(cu_seqlens[b])} and {int(cu_seqlens[b + 1])} at [{b}]")


def _check_budget(function: str, num_pages: int, sink_pages: int, recent_pages: int) -> None:
    """Raise ValueError unless sink and recent pages fit; the entry of a query's own page holds tokens after it, so
    that page is never scored."""
    if recent_pages < 1:
        raise ValueError(f"{function}: recent_pages: expected at least 1, got {recent_pages}")
    if sink_pages < 0:
        raise ValueError(f"{function}: sink_pages: expected at least 0, got {sink_pages}")
    if isinstance(num_pages, (bool, float)):
        raise TypeError(f"{function}: num_pages: expected an integer, got {num_pages!r}")
    if num_pages < sink_pages + recent_pages:
        least = f"sink_pages + recent_pages = {sink_pages + recent_pages}"
        raise ValueError(f"{function}: num_pages: expected at least {least}, got {num_pages}")


# ---- Where a packed sequence's pages are. ----


def page_slots(cu_seqlens: torch.Tensor, page_size: int) -> torch.Tensor:
    """The first page slot of each sequence, int32 ``[B]``: no prefix sum over page counts, nothing read back."""
    order = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device, dtype=torch.int32)
    return torch.div(cu_seqlens[:-1], page_size, rounding_mode="floor") + order


def _block_table(cu_seqlens: torch.Tensor, max_seqlen: int, page_size: int, extra: int) -> torch.Tensor:
    """Slots ``[B, pages]`` of every sequence's pages; ``extra`` pages beyond the longest sequence."""
    width = -(-max_seqlen // page_size) + extra
    pages = torch.arange(width, device=cu_seqlens.device, dtype=torch.int32)
    return page_slots(cu_seqlens, page_size)[:, None] + pages


def _extra_pages(page_size: int) -> int:
    """Pages by which the last chunk of queries may reach past its sequence."""
    return -(-_QUERY_CHUNK // page_size)


# ---- The three steps, and all of them. ----


@torch.no_grad()
def packed_index(
    k: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    rule: str,
    page_size: int,
    index_format: str = "exact",
) -> torch.Tensor:
    """The page index of packed keys, by the same op that decoding uses.

    Not differentiable: :func:`unique_attn.ops.soft_mask_attention` hands the entries' gradients to the keys itself.

    Args:
        k: ``[N, H, D]`` packed keys; bf16, fp16, fp32 (fp64 on the CPU). Cast under ``torch.autocast``.
        cu_seqlens: int32 ``[B + 1]``, the first token of each sequence and N, ascending from 0.
        max_seqlen: host-known upper bound of the sequence lengths.
        rule: name of the scoring rule.
        page_size: tokens per page; pages start at each sequence's start.
        index_format: ``exact`` or ``compressed``. Soft gates take exact entries only.

    Returns:
        uint8 ``[slots, H, 1, entry_bytes]``; page p of sequence b is in slot ``cu_seqlens[b] // page_size + b + p``.

    Raises:
        ValueError: a wrong rank, shape, dtype or device, or an unknown rule or page size, naming the argument.
    """
    _check_packed("packed_index", "k", k, cu_seqlens, max_seqlen, page_size)
    _check_bounds("packed_index", k.shape[0], cu_seqlens, max_seqlen)
    (k,) = autocast_inputs(k)
    tokens, heads, head_dim = k.shape
    batch = cu_seqlens.shape[0] - 1
    extra = _extra_pages(page_size)
    slots = tokens // page_size + batch + extra
    # Keys with every sequence's start on a page border: a paged cache of one page per block.
    paged = k.new_zeros((slots * page_size, heads, head_dim))
    position = torch.arange(tokens, device=k.device, dtype=torch.int32)
    # Starts at or before the token, less one. (Not on cu_seqlens[1:]: Inductor has read such views from their base.)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1
    first_slot = page_slots(cu_seqlens, page_size)
    paged[first_slot[sequence] * page_size + position - cu_seqlens[sequence]] = k
    cache = paged.view(slots, page_size, heads, head_dim).transpose(1, 2)
    index = ops.new_index(cache, rule=rule, page_size=page_size, index_format=index_format)
    lengths = cu_seqlens.diff()
    ops.page_index(
        cache,
        index,
        _block_table(cu_seqlens, max_seqlen, page_size, extra),
        torch.zeros_like(lengths),
        lengths,
        max_new_tokens=max_seqlen,
        rule=rule,
        page_size=page_size,
        index_format=index_format,
    )
    return index


@torch.no_grad()
def select_pages(
    q: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    num_pages: int,
    *,
    rule: str,
    page_size: int,
    spread_weight: float | None = None,
    sink_pages: int = 1,
    recent_pages: int = 1,
    index_format: str = "exact",
) -> torch.Tensor:
    """The pages that decoding would select for every query, by the ops that decoding uses.

    Queries are scored in bounded chunks, 16 tokens of a sequence to a row.

    Args:
        q: ``[N, Hq, D]`` packed queries, ``Hq = G * H`` with G from 1 to 16. Cast under ``torch.autocast``.
        index: uint8 ``[slots, H, 1, entry_bytes]`` from :func:`packed_index`.
        cu_seqlens: int32 ``[B + 1]``, the first token of each sequence and N, ascending from 0.
        max_seqlen: host-known upper bound of the sequence lengths.
        num_pages: pages per query, sink and recent ones included.
        rule: name of the scoring rule.
        page_size: tokens per page.
        spread_weight: lambda of ``unique`` (default 0.5) or c of ``directional`` (default 2).
        sink_pages: first pages of a sequence, always selected.
        recent_pages: last pages up to the query's own, always selected; at least 1.
        index_format: what the index was made with.

    Returns:
        int32 ``[N, H, num_pages]``, ascending logical pages, then -1.

    Raises:
        ValueError: a wrong rank, shape, dtype, device or number, naming the argument.
    """
    _check_packed("select_pages", "q", q, cu_seqlens, max_seqlen, page_size)
    _check_bounds("select_pages", q.shape[0], cu_seqlens, max_seqlen)
    if index.dim() != 4:
        raise ValueError(f"select_pages: index: expected 4 dimensions, got shape {list(index.shape)}")
    _check_budget("select_pages", num_pages, sink_pages, recent_pages)
    if num_pages > MAX_PAGES:
        raise ValueError(f"select_pages: num_pages: expected at most {MAX_PAGES}, got {num_pages}")
    (q,) = autocast_inputs(q)
    tokens = q.shape[0]
    heads = index.shape[1]
    batch = cu_seqlens.shape[0] - 1
    table = _block_table(cu_seqlens, max_seqlen, page_size, _extra_pages(page_size))
    selected = torch.empty((tokens + 1, heads, num_pages), dtype=torch.int32, device=q.device)
    if tokens == 0:
        return selected[:0]
    # Chunk i of sequence b has number cu_seqlens[b] // 16 + b + i, as page slots have.
    first_chunk = page_slots(cu_seqlens, _QUERY_CHUNK)
    chunks = torch.arange(tokens // _QUERY_CHUNK + batch, device=q.device, dtype=torch.int32)
    sequence = (torch.searchsorted(first_chunk, chunks, right=True) - 1).clamp_(min=0)
    begin = (chunks - first_chunk[sequence]) * _QUERY_CHUNK  # position of the chunk's first token
    token = cu_seqlens[sequence] + begin
    rows = token[:, None] + torch.arange(_QUERY_CHUNK, device=q.device, dtype=torch.int32)
    inside = rows < cu_seqlens[sequence + 1][:, None]
    # A chunk past its sequence's end has no query: length 0.
    seq_lens = torch.where(inside[:, 0], begin + _QUERY_CHUNK, 0).int()
    per_chunk = _QUERY_CHUNK * heads * table.shape[1] * index.shape[2] * ops.score_dtype(q.dtype).itemsize
    scoring: dict[str, Any] = {
        "rule": rule,
        "page_size": page_size,
        "spread_weight": spread_weight,
        "index_format": index_format,
    }
    step = max(1, _SCORE_BYTES // max(per_chunk, 1))
    for start in range(0, chunks.shape[0], step):
        part = slice(start, start + step)
        chunk_q = q[rows[part].clamp(max=tokens - 1)]
        scores = ops.page_scores(chunk_q, index, table[sequence[part]], seq_lens[part], **scoring)
        pages = ops.topk_pages(
            scores, seq_lens[part], num_pages, page_size=page_size, sink_pages=sink_pages, recent_pages=recent_pages
        )
        # Rows past a sequence's end go to a row of their own, which is dropped.
        target = torch.where(inside[part], rows[part], tokens)
        selected[target.flatten()] = pages.flatten(0, 1)
    return selected[:tokens]


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    num_pages: int,
    *,
    mode: Mode = "soft",
    tau: torch.Tensor | None = None,
    rule: str = "directional",
    page_size: int = 8,
    spread_weight: float | None = None,
    sink_pages: int = 1,
    recent_pages: int = 1,
    scale: float | None = None,
    index_format: str = "exact",
) -> torch.Tensor:
    """Causal attention over packed sequences with the page mask that training uses, differentiable in q, k and v.

    Hard-mode outputs equal those of decoding the same tokens one by one with the same settings. Under
    ``torch.autocast`` q, k and v are cast to its dtype, as in ``scaled_dot_product_attention``.

    Args:
        q: ``[N, Hq, D]``, ``Hq = G * H`` with G from 1 to 16; bf16, fp16, fp32 (fp64 on the CPU); D a multiple of 8
            to 256 (to 128 for fp32 on CUDA).
        k: ``[N, H, D]``.
        v: ``[N, H, D]``.
        cu_seqlens: int32 ``[B + 1]``, the first token of each sequence and N, ascending from 0.
        max_seqlen: host-known upper bound of the sequence lengths.
        num_pages: pages per query, sink and recent ones included (the budget in pages).
        mode: ``soft`` (gates), ``hard`` (the selected pages only, as in decoding) or ``dense``.
        tau: 0-dim fp32 temperature on q's device, positive, in score units; soft mode.
        rule: scoring rule of the pages; every rule but ``minmax`` in soft mode.
        page_size: tokens per page; pages start at each sequence's start.
        spread_weight: lambda of ``unique`` (default 0.5) or c of ``directional`` (default 2).
        sink_pages: first pages of a sequence, always visible.
        recent_pages: last pages up to the query's own, always visible; at least 1.
        scale: factor of the logits, ``1 / sqrt(D)`` by default.
        index_format: storage of the page index, ``exact`` or ``compressed``; soft mode is differentiated through exact
            entries and takes no other.

    Returns:
        ``[N, Hq, D]``.

    Raises:
        ValueError: an unknown mode, soft mode without tau, or what the ops refuse, naming the argument.
        NotDifferentiableError: forward-mode differentiation, of which the ops know nothing.
    """
    if mode not in ("soft", "hard", "dense"):
        raise ValueError(f"masked_attention: mode: expected soft, hard or dense, got {mode!r}")
    reject_forward_ad("masked_attention", q=q, k=k, v=v)
    q, k, v = autocast_inputs(q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_packed("masked_attention", name, tensor, cu_seqlens, max_seqlen, page_size)
        if tensor.dtype != q.dtype:
            raise ValueError(f"masked_attention: {name}: expected dtype {q.dtype} (that of q), got {tensor.dtype}")
        expected = (q.shape[0], k.shape[1], q.shape[2])
        if name != "q" and tensor.shape != expected:
            raise ValueError(f"masked_attention: {name}: expected shape {list(expected)}, got {list(tensor.shape)}")
    _check_bounds("masked_attention", q.shape[0], cu_seqlens, max_seqlen)
    if mode != "dense":
        _check_budget("masked_attention", num_pages, sink_pages, recent_pages)
    scoring: dict[str, Any] = {"rule": rule, "page_size": page_size, "spread_weight": spread_weight}
    fixed: dict[str, Any] = {"sink_pages": sink_pages, "recent_pages": recent_pages}
    mask: dict[str, Any] = {}
    if mode == "soft":
        if index_format != "exact":
            raise ValueError(f"masked_attention: index_format: expected exact for mode 'soft', got {index_format!r}")
        if tau is None:
            raise ValueError("masked_attention: tau: expected a 0-dim float32 tensor for mode 'soft', got None")
        index = packed_index(k, cu_seqlens, max_seqlen, rule=rule, page_size=page_size)
        theta = ops.page_boundary(q, index, cu_seqlens, max_seqlen, num_pages, **scoring, **fixed)
        mask = {"index": index, "theta": theta, "tau": tau}
    elif mode == "hard":
        index = packed_index(k, cu_seqlens, max_seqlen, rule=rule, page_size=page_size, index_format=index_format)
        selecting = {**scoring, **fixed, "index_format": index_format}
        mask = {"pages": select_pages(q, index, cu_seqlens, max_seqlen, num_pages, **selecting)}
    out, _ = ops.soft_mask_attention(q, k, v, cu_seqlens, max_seqlen, **mask, **scoring, **fixed, scale=scale)
    return out
