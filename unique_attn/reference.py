"""What every decode op computes, in plain PyTorch, written to be read. The tests hold the kernels to it.

The functions have the signatures of :mod:`unique_attn.ops` and two habits of their own: everything is computed
in ``compute_dtype`` (fp64 by default) whatever the inputs' dtype is, and attention results stay in it, so that a
kernel's error can be measured against them. Two roundings belong to the definition and are made here too: index
entries are stored in the keys' dtype or compressed, scores in the dtype they are ordered by.

Nothing here is fast, and of the compiled library it takes only the table of rules: what an entry holds, and default
weights. Sources: UNIQUE (arXiv 2605.27740) section 3; `minmax` is Quest's bound; `directional` is this project's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unique_attn.index_format import decode_index
from unique_attn.reference_index import compress, encode_entry, new_index, page_entry  # noqa: F401
from unique_attn.rules import rule_info, weight_of

# ---- Positions: what a query may see. ----


def query_position(seq_len: int, num_tokens: int, t: int) -> int:
    """Position of query ``t`` of the last ``num_tokens`` tokens. A negative one sees nothing."""
    return seq_len - num_tokens + t


def visible_tokens(position: int, window: int = 0) -> range:
    """What a query at ``position`` may see: itself and what comes before, ``window`` tokens at most if not 0."""
    return range(max(0, position - window + 1) if window > 0 else 0, position + 1)


def visible_pages(position: int, window: int, page_size: int) -> range:
    """Pages that hold at least one visible token."""
    tokens = visible_tokens(position, window)
    return range(tokens.start // page_size, position // page_size + 1) if tokens else range(0)


# ---- The paged cache. ----


def gather_positions(cache: Tensor, block_table: Tensor, positions: Tensor) -> Tensor:
    """Tokens ``[H, n, D]`` at ``positions`` ``[n]`` of a sequence; ``block_table`` is its row ``[max_blocks]``."""
    block_size = cache.shape[2]
    blocks = block_table[positions // block_size].long()
    return cache[blocks, :, positions % block_size].transpose(0, 1)


def gather_tokens(cache: Tensor, block_table: Tensor, seq_len: int) -> Tensor:
    """All tokens ``[H, seq_len, D]`` of a sequence; ``block_table`` is its row ``[max_blocks]``."""
    return gather_positions(cache, block_table, torch.arange(seq_len, device=cache.device))


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write token n of ``k`` and ``v`` ``[N, H, D]`` to its slot, ``block * block_size + offset``, if not negative."""
    block_size = k_cache.shape[2]
    for n, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[n]
            v_cache[slot // block_size, :, slot % block_size] = v[n]


# ---- The page index. ----


def page_index(
    k_cache: Tensor,
    index: Tensor,
    block_table: Tensor,
    start_lens: Tensor,
    seq_lens: Tensor,
    *,
    max_new_tokens: int,
    rule: str,
    page_size: int,
    index_format: str = "exact",
    compute_dtype: torch.dtype = torch.float64,
) -> None:
    """Write the entry of every page that holds a token at ``start_lens[b] <= i < seq_lens[b]``."""
    pages_per_block = index.shape[2]
    for b, (start, end) in enumerate(zip(start_lens.tolist(), seq_lens.tolist(), strict=True)):
        if start >= end:
            continue
        if end - start > max_new_tokens:
            raise ValueError(f"max_new_tokens: sequence {b} has {end - start} new tokens, got {max_new_tokens}")
        first = start // page_size
        positions = torch.arange(first * page_size, end, device=k_cache.device)
        keys = gather_positions(k_cache, block_table[b], positions).to(compute_dtype)
        pages = torch.arange(first, (end - 1) // page_size + 1, device=k_cache.device)
        blocks, inner = block_table[b, pages // pages_per_block].long(), pages % pages_per_block
        for i, of_page in enumerate(torch.split(keys, page_size, dim=1)):  # the last one may be partly filled
            index[blocks[i], :, inner[i]] = encode_entry(of_page, rule, index_format, k_cache.dtype)


# ---- Scores. ----


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype by which scores of inputs of ``dtype`` are ordered."""
    return torch.bfloat16 if dtype in (torch.bfloat16, torch.float16) else dtype


def rule_score(q: Tensor, entry: tuple[Tensor, ...], rule: str, weight: float) -> Tensor:
    """Scores ``[..., G, n]`` of queries ``[..., G, D]`` on n entries ``[..., n, D]`` (the scalar: ``[..., n]``)."""
    if rule == "minmax":  # relu(q) . max - relu(-q) . min
        upper, lower, each = entry[0].unsqueeze(-3), entry[1].unsqueeze(-3), q.unsqueeze(-2)
        return (each * torch.where(each > 0, upper, lower)).sum(-1)
    if rule == "mean":  # q . mean
        return q @ entry[0].mT
    if rule == "unique":  # q . mean + lambda * norm(q) * std
        return q @ entry[0].mT + weight * q.norm(dim=-1, keepdim=True) * entry[1].unsqueeze(-2)
    if rule == "directional":  # q . mean + c * sqrt(sum_d q_d^2 var_d)
        return q @ entry[0].mT + weight * (q.square() @ entry[1].square().mT).sqrt()
    raise ValueError(f"rule: expected one of mean, unique, directional, minmax, got {rule!r}")


def page_scores(
    q: Tensor,
    index: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    rule: str,
    page_size: int,
    spread_weight: float | None = None,
    window: int = 0,
    index_format: str = "exact",
    compute_dtype: torch.dtype = torch.float64,
    rounded: bool = True,
) -> Tensor:
    """Score ``[B, T, H, P]`` of each page a query sees, maximum over its group; -inf elsewhere.

    ``rounded=False`` returns the scores in ``compute_dtype`` instead of the dtype they are ordered by.
    """
    batch, num_tokens, q_heads, head_dim = q.shape
    _, kv_heads, pages_per_block, _ = index.shape
    weight = weight_of(rule_info(rule), spread_weight)
    parts = decode_index(index, rule=rule, dtype=q.dtype, index_format=index_format, head_dim=head_dim)
    row_pages = block_table.shape[1] * pages_per_block
    scores = q.new_full((batch, num_tokens, kv_heads, row_pages), -torch.inf, dtype=compute_dtype)
    for b, seq_len in enumerate(seq_lens.tolist()):
        for t in range(num_tokens):
            visible = visible_pages(query_position(seq_len, num_tokens, t), window, page_size)
            pages = torch.arange(visible.start, visible.stop, device=q.device)
            blocks, inner = block_table[b, pages // pages_per_block].long(), pages % pages_per_block
            entry = tuple(part[blocks, :, inner].transpose(0, 1).to(compute_dtype) for part in parts)
            heads = q[b, t].to(compute_dtype).view(kv_heads, q_heads // kv_heads, head_dim)
            scores[b, t, :, visible.start : visible.stop] = rule_score(heads, entry, rule, weight).amax(1)
    return scores.to(score_dtype(q.dtype)) if rounded else scores


# ---- Selection. ----


def descending_order(scores: Tensor) -> Tensor:
    """Indices of a row of scores from best to worst: ties to the lower index, -0 equals +0, NaN last."""
    nan = scores.isnan()
    numbers = scores.masked_fill(nan, -torch.inf) + 0.0  # -0 + 0 is +0
    order = numbers.sort(descending=True, stable=True).indices
    return order[nan[order].byte().sort(stable=True).indices]


def topk_pages(
    scores: Tensor,
    seq_lens: Tensor,
    k: int,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 1,
    window: int = 0,
    budget_pages: Tensor | None = None,
    block_table: Tensor | None = None,
    pages_per_block: int = 1,
) -> Tensor:
    """Recent pages, sink pages, then the largest scores, ``k`` in all: ascending ``[B, T, H, k]``, then -1."""
    batch, num_tokens, kv_heads, _ = scores.shape
    selected = torch.full((batch, num_tokens, kv_heads, k), -1, dtype=torch.int32, device=scores.device)
    for b, seq_len in enumerate(seq_lens.tolist()):
        budget = k if budget_pages is None else max(0, min(k, int(budget_pages[b])))
        for t in range(num_tokens):
            visible = visible_pages(query_position(seq_len, num_tokens, t), window, page_size)
            own = visible.stop - 1
            recent = [page for page in range(own, own - recent_pages, -1) if page in visible]
            sinks = [page for page in range(sink_pages) if page in visible and page not in recent]
            forced = torch.tensor((recent + sinks)[:budget], dtype=torch.long, device=scores.device)
            for h in range(kv_heads):
                order = descending_order(scores[b, t, h, visible.start : visible.stop]) + visible.start
                others = order[~torch.isin(order, forced)]
                chosen = torch.cat([forced, others[: budget - len(forced)]]).sort().values
                if block_table is not None:
                    blocks = block_table[b, chosen // pages_per_block]
                    chosen = blocks * pages_per_block + chosen % pages_per_block
                selected[b, t, h, : len(chosen)] = chosen.int()
    return selected


# ---- Attention. ----


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``q`` ``[..., G, D]`` over ``[..., n, D]``, and the log of its normalizer."""
    logits = scale * (q @ keys.mT)
    if logits.shape[-1] == 0:  # nothing to see: 0 and -inf
        return torch.zeros_like(q), logits.logsumexp(-1)
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    scale: float | None = None,
    window: int = 0,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention over the visible tokens of the selected logical pages: ``out`` and ``lse``."""
    _, num_tokens, q_heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    group = q_heads // kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros(q.shape, dtype=compute_dtype)
    lse = q.new_zeros(q.shape[:3], dtype=compute_dtype)
    in_page = torch.arange(page_size, device=q.device)
    for b, seq_len in enumerate(seq_lens.tolist()):
        keys = gather_tokens(k_cache, block_table[b], seq_len).to(compute_dtype)
        values = gather_tokens(v_cache, block_table[b], seq_len).to(compute_dtype)
        for t in range(num_tokens):
            visible = visible_tokens(query_position(seq_len, num_tokens, t), window)
            for h in range(kv_heads):
                chosen = pages[b, t, h][pages[b, t, h] >= 0].long()
                positions = (chosen[:, None] * page_size + in_page).flatten()
                positions = positions[(positions >= visible.start) & (positions < visible.stop)]
                heads = slice(h * group, (h + 1) * group)
                out[b, t, heads], lse[b, t, heads] = attend(
                    q[b, t, heads].to(compute_dtype), keys[h, positions], values[h, positions], scale
                )
    return out, lse


def dense_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention over every visible token: :func:`sparse_decode` must equal it when all pages are selected."""
    _, num_tokens, q_heads, head_dim = q.shape
    group = q_heads // k_cache.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros(q.shape, dtype=compute_dtype)
    lse = q.new_zeros(q.shape[:3], dtype=compute_dtype)
    for b, seq_len in enumerate(seq_lens.tolist()):
        keys = gather_tokens(k_cache, block_table[b], seq_len).to(compute_dtype)
        values = gather_tokens(v_cache, block_table[b], seq_len).to(compute_dtype)
        for t in range(num_tokens):
            visible = visible_tokens(query_position(seq_len, num_tokens, t), window)
            seen = slice(visible.start, max(visible.start, visible.stop))
            heads = q[b, t].to(compute_dtype).view(-1, group, head_dim)
            part, log_sum = attend(heads, keys[:, seen], values[:, seen], scale)
            out[b, t], lse[b, t] = part.flatten(0, 1), log_sum.flatten()
    return out, lse


# ---- The whole step. ----


def step_slots(block_table: Tensor, seq_lens: Tensor, num_tokens: int, block_size: int) -> Tensor:
    """Slots ``[B * num_tokens]`` of each sequence's last ``num_tokens`` tokens, -1 where there are fewer."""
    slots = torch.full((len(seq_lens), num_tokens), -1, dtype=torch.long, device=seq_lens.device)
    for b, seq_len in enumerate(seq_lens.tolist()):
        for t in range(num_tokens):
            position = query_position(seq_len, num_tokens, t)
            if position >= 0:
                slots[b, t] = int(block_table[b, position // block_size]) * block_size + position % block_size
    return slots.flatten()


def unique_decode(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    index: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    num_pages: int,
    *,
    rule: str,
    page_size: int,
    spread_weight: float | None = None,
    sink_pages: int = 1,
    recent_pages: int = 1,
    scale: float | None = None,
    window: int = 0,
    budget_pages: Tensor | None = None,
    index_format: str = "exact",
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """One decode step: append, index, score, select, attend. Returns ``out``, ``lse`` and ``pages``."""
    num_tokens = q.shape[1]
    if k is not None and v is not None:
        slots = step_slots(block_table, seq_lens, num_tokens, k_cache.shape[2])
        append_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots)
    start_lens = (seq_lens - num_tokens).clamp(min=0)
    page_index(
        k_cache, index, block_table, start_lens, seq_lens,
        max_new_tokens=num_tokens, rule=rule, page_size=page_size, index_format=index_format,
        compute_dtype=compute_dtype,
    )  # fmt: skip
    scores = page_scores(
        q, index, block_table, seq_lens,
        rule=rule, page_size=page_size, spread_weight=spread_weight, window=window, index_format=index_format,
        compute_dtype=compute_dtype,
    )  # fmt: skip
    pages = topk_pages(
        scores, seq_lens, num_pages,
        page_size=page_size, sink_pages=sink_pages, recent_pages=recent_pages, window=window,
        budget_pages=budget_pages,
    )  # fmt: skip
    out, lse = sparse_decode(
        q, k_cache, v_cache, pages, block_table, seq_lens,
        page_size=page_size, scale=scale, window=window, compute_dtype=compute_dtype,
    )  # fmt: skip
    return out, lse, pages
