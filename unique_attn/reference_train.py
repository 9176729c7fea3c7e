"""What sparsity-aware training computes, in plain PyTorch with plain autograd: the oracle of the training ops.

Written to be read, one sequence at a time, with all scores and gates of a sequence at once. Source: UNIQUE
(arXiv 2605.27740) section 4. See :mod:`unique_attn.reference` for the scores and the selection themselves.

Symbols: L tokens of a sequence, N of a packed batch, Hq = G * H query heads, P complete pages of a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unique_attn import reference
from unique_attn.rules import rule_info, weight_of


def round_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to ``dtype``, with the gradient of no rounding."""
    return x + (x.detach().to(dtype).to(x.dtype) - x.detach())


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt whose gradient is 0 where x vanishes."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0 * x.detach())  # NaN stays NaN


# ---- Scores. ----


def page_entries(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[H, P, D]`` of the complete pages of keys ``[L, H, D]``, differentiable."""
    pages = keys.shape[0] // page_size
    paged = keys[: pages * page_size].view(pages, page_size, *keys.shape[1:]).permute(2, 0, 1, 3)
    mean = paged.mean(2)
    return mean, (paged - mean.unsqueeze(2)).square().mean(2)


def head_scores(
    q: Tensor,
    keys: Tensor,
    rule: str,
    page_size: int,
    weight: float,
    entry_dtype: torch.dtype,
    *,
    spread_q: Tensor | None = None,
    square_dtype: torch.dtype | None = None,
) -> Tensor:
    """Score ``[L, H, G, P]`` of each query head of ``q`` ``[L, Hq, D]`` on the complete pages of its KV head.

    Gradients reach q through q . mean alone. ``entry_dtype``: what index entries are stored in. ``spread_q``: the query
    of the spread's term, ``q`` itself (detached) by default. ``square_dtype``: what the factors of the spread's sum are
    rounded to, if anything (bf16 by the CUDA kernels for 16-bit inputs; no part of the definition).
    """
    length, q_heads, head_dim = q.shape
    heads = keys.shape[1]
    group_q = q.view(length, heads, q_heads // heads, head_dim)
    fixed = (q if spread_q is None else spread_q).detach().view(group_q.shape)
    mean, var = page_entries(keys, page_size)
    scores = torch.einsum("lhgd,hpd->lhgp", group_q, round_through(mean, entry_dtype))
    if rule == "mean":
        return scores
    if rule == "unique":
        total = var.sum(-1)
        root = total.detach().sqrt().clamp(max=torch.finfo(entry_dtype).max)
        stored = root.to(entry_dtype).to(q.dtype).square()
        std = safe_sqrt(total + (stored - total.detach()))  # gradients go by the stored root, as below
        return scores + weight * fixed.norm(dim=-1)[..., None] * std[None, :, None]
    if rule == "directional":
        stored = var.detach().sqrt().to(entry_dtype).to(q.dtype).square()  # the entry holds the root
        squares = fixed.square()
        if square_dtype is not None:
            stored, squares = (x.to(square_dtype).to(q.dtype) for x in (stored, squares))
        var = var + (stored - var.detach())
        return scores + weight * safe_sqrt(torch.einsum("lhgd,hpd->lhgp", squares, var))
    raise ValueError(f"rule: expected mean, unique or directional, got {rule!r}")


def group_max(scores: Tensor) -> Tensor:
    """``[L, H, P]``: maximum over the group ``[L, H, G, P]``; its gradient goes to the lowest of the best heads."""
    best = scores.argmax(2, keepdim=True)  # the first of equal ones
    return scores.gather(2, best).squeeze(2)


# ---- Boundary. ----


def candidate_mask(length: int, pages: int, page_size: int, sink_pages: int, recent_pages: int) -> Tensor:
    """``[L, P]``: complete pages that are neither sink nor recent for the query at each position."""
    own = torch.arange(length)[:, None] // page_size
    page = torch.arange(pages)[None, :]
    return (page >= sink_pages) & (page <= own - recent_pages)


def boundary(scores: Tensor, candidates: Tensor, wanted: int, key_dtype: torch.dtype) -> Tensor:
    """theta ``[L, H]`` from scores ``[L, H, P]``: midpoint of the ``wanted``-th and the next candidate's score, both as
    ``key_dtype`` orders them; NaN counts as -inf.

    -inf where there are at most ``wanted`` candidates; else +inf if none is wanted.
    """
    length, heads, _ = scores.shape
    theta = scores.new_full((length, heads), -torch.inf)
    rounded = scores.detach().to(key_dtype).to(scores.dtype)
    rounded = torch.where(rounded.isnan(), -torch.inf, rounded)
    for t in range(length):
        if int(candidates[t].sum()) > wanted:
            ordered = rounded[t][:, candidates[t]].sort(-1, descending=True).values
            theta[t] = (ordered[:, wanted - 1] + ordered[:, wanted]) / 2 if wanted > 0 else torch.inf
    return theta


def page_boundary(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    num_pages: int,
    *,
    rule: str,
    page_size: int,
    spread_weight: float | None = None,
    sink_pages: int = 1,
    recent_pages: int = 1,
    rounded: bool = True,
    compute_dtype: torch.dtype = torch.float64,
    square_dtype: torch.dtype | None = None,
) -> Tensor:
    """theta ``[N, H]`` of packed queries, computed from the keys.

    ``rounded=False`` orders the scores in ``compute_dtype`` instead of the dtype they are ordered by.
    """
    weight = weight_of(rule_info(rule), spread_weight)
    wanted = num_pages - sink_pages - recent_pages
    key_dtype = reference.score_dtype(q.dtype) if rounded else compute_dtype
    theta = [q.new_zeros((0, k.shape[1]), dtype=compute_dtype)]
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        part_q, part_k = (x[start:end].detach().to(compute_dtype) for x in (q, k))
        scores = group_max(head_scores(part_q, part_k, rule, page_size, weight, k.dtype, square_dtype=square_dtype))
        candidates = candidate_mask(end - start, scores.shape[-1], page_size, sink_pages, recent_pages)
        theta.append(boundary(scores, candidates.to(q.device), wanted, key_dtype))
    return torch.cat(theta)


# ---- Attention. ----


def soft_gates(scores: Tensor, theta: Tensor, tau: float | Tensor) -> Tensor:
    """log g ``[L, H, P]`` of scores ``[L, H, P]`` around theta ``[L, H]``: log sigmoid((s - theta) / tau), or 0 where
    theta is -inf."""
    bound = theta[..., None].to(scores.dtype)
    open_gate = bound == -torch.inf
    gates = torch.nn.functional.logsigmoid((scores - torch.where(open_gate, 0.0, bound)) / tau)
    return torch.where(open_gate, 0.0, gates)


def key_gates(
    q: Tensor,
    keys: Tensor,
    *,
    theta: Tensor | None,
    tau: float | Tensor | None,
    pages: Tensor | None,
    rule: str,
    page_size: int,
    weight: float,
    sink_pages: int,
    recent_pages: int,
    entry_dtype: torch.dtype,
    spread_q: Tensor | None = None,
    square_dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
) -> Tensor:
    """log g ``[L, H, L]`` of every query and key of one sequence: soft with ``theta`` and ``tau``, hard with ``pages``
    ``[L, H, n]``, else 0. The causal mask is not in it. ``gate_dtype``: what log2 g is rounded to, if anything (fp16 by
    the Hopper kernels; no part of the definition)."""
    length, heads = keys.shape[:2]
    complete = length // page_size
    page_gates = q.new_zeros((length, heads, complete))
    if theta is not None:
        assert tau is not None
        scores = head_scores(
            q, keys, rule, page_size, weight, entry_dtype, spread_q=spread_q, square_dtype=square_dtype
        )
        page_gates = soft_gates(group_max(scores), theta, tau)
        if gate_dtype is not None:
            rounded = round_through(page_gates / math.log(2), gate_dtype) * math.log(2)
            page_gates = torch.where(page_gates.isfinite(), rounded, page_gates)
    elif pages is not None:
        chosen = (pages[..., None] == torch.arange(complete, device=q.device)).any(2)
        page_gates = page_gates.masked_fill(~chosen, -torch.inf)
    candidates = candidate_mask(length, complete, page_size, sink_pages, recent_pages).to(q.device)
    page_gates = torch.where(candidates[:, None], page_gates, 0.0)
    page_gates = torch.nn.functional.pad(page_gates, (0, 1))  # an incomplete last page has gate 1
    return page_gates[:, :, torch.arange(length, device=q.device) // page_size]


def soft_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    theta: Tensor | None = None,
    tau: float | Tensor | None = None,
    pages: Tensor | None = None,
    rule: str = "directional",
    page_size: int = 8,
    spread_weight: float | None = None,
    sink_pages: int = 1,
    recent_pages: int = 1,
    scale: float | None = None,
    entry_dtype: torch.dtype | None = None,
    spread_q: Tensor | None = None,
    square_dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``out`` ``[N, Hq, D]`` and ``lse`` ``[N, Hq]`` in ``compute_dtype``, differentiable in q, k and v.

    Soft with ``theta`` and ``tau``, hard with ``pages``, else dense. Index entries are rounded to ``entry_dtype``, that
    of ``k`` by default (fp64 leaves of a bf16 run give bf16 here). ``spread_q`` and ``square_dtype``: see
    :func:`head_scores`; ``gate_dtype``: see :func:`key_gates`.
    """
    weight = weight_of(rule_info(rule), spread_weight)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    outs, lses = [q[:0].to(compute_dtype)], [q[:0, :, 0].to(compute_dtype)]
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        length = end - start
        part_q, part_k, part_v = (x[start:end].to(compute_dtype) for x in (q, k, v))
        gates = key_gates(
            part_q,
            part_k,
            theta=None if theta is None else theta[start:end],
            pages=None if pages is None else pages[start:end],
            spread_q=None if spread_q is None else spread_q[start:end].to(compute_dtype),
            tau=tau,
            rule=rule,
            page_size=page_size,
            weight=weight,
            sink_pages=sink_pages,
            recent_pages=recent_pages,
            entry_dtype=entry_dtype or k.dtype,
            square_dtype=square_dtype,
            gate_dtype=gate_dtype,
        )
        logits = scale * torch.einsum("lhgd,jhd->lhgj", part_q.view(length, heads, group, q.shape[-1]), part_k)
        logits = logits + gates[:, :, None]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future[:, None, None], -torch.inf)
        outs.append(torch.einsum("lhgj,jhd->lhgd", logits.softmax(-1), part_v).reshape(part_q.shape))
        lses.append(logits.logsumexp(-1).reshape(length, q.shape[1]))
    return torch.cat(outs), torch.cat(lses)
