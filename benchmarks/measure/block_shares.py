"""Estimates of which share of attention each block of keys gets from each block of queries, in plain PyTorch.

An estimate pools the queries of a block to a few, gives each of these a softmax over what it sees, and sums that by
key blocks; an aggregate makes one share of those of a block's pooled queries. The oracle pools nothing. Everything is
computed in fp32, one block of queries at a time, so that memory is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.next_tokens import Layer

SPREAD = 2.0  # c of the shipped `directional`
PAGE = 8  # keys of a page, the shipped pool_k
STRIDE = 8  # of antidiagonals

Shares = Iterator[Tensor]  # of each query block, those of its pooled queries: [Hq, pooled queries, key blocks]

AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda shares: shares.mean(1),
    "rms": lambda shares: shares.square().mean(1).sqrt(),
    "max": lambda shares: shares.amax(1),
}


# ---- Parts. ----


def pool(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means and variances ``[heads, groups, D]`` of every ``size`` rows of ``[heads, n, D]``, and of the rest."""
    count = _counts(x.shape[1], size, x.device)
    groups = _grouped(x, size)
    mean = groups.sum(2) / count[:, None]
    there = torch.arange(size, device=x.device) < count[:, None]
    off = (groups - mean[:, :, None]) * there[..., None]
    return mean, off.square().sum(2) / count[:, None]


def _grouped(x: Tensor, size: int) -> Tensor:
    """``[heads, groups, size, D]``, zeros where there is no row."""
    return pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _counts(rows: int, size: int, device: torch.device) -> Tensor:
    groups = -(-rows // size)
    return (rows - size * torch.arange(groups, device=device)).clamp(max=size)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """``[Hq, P, n]`` of ``q`` ``[Hq, P, D]`` and ``k`` ``[H, n, D]``; the heads of a group as rows: no copies of k."""
    rows = q.unflatten(0, (len(k), -1)).flatten(1, 2)
    return (rows @ k.mT).unflatten(1, (-1, q.shape[1])).flatten(0, 1)


def _by_blocks(logits: Tensor, last: Tensor, size: int, blocks: Blocks) -> Tensor:
    """Softmax of ``logits`` ``[Hq, P, n]`` over the groups of ``size`` keys whose first key is not after ``last``
    ``[P]``, summed by key blocks: ``[Hq, P, key_blocks]``."""
    first = size * torch.arange(logits.shape[-1], device=logits.device)
    weights = logits.masked_fill(first > last[:, None], -torch.inf).softmax(-1)
    wide = blocks.keys * blocks.block_k // size
    return pad(weights, (0, wide - weights.shape[-1])).unflatten(-1, (blocks.keys, -1)).sum(-1)


def _query_blocks(layer: Layer, blocks: Blocks) -> Iterator[tuple[int, Tensor]]:
    """The first position of each query block and its queries ``[Hq, n, D]``."""
    for start in range(0, blocks.tokens, blocks.block_q):
        yield start, layer.q[start : start + blocks.block_q].float().transpose(0, 1)


def _keys(layer: Layer) -> Tensor:
    return layer.k.float().transpose(0, 1)


def _ends(start: int, rows: int, size: int, device: torch.device) -> Tensor:
    """Position of the last query of each group of ``size``, of ``rows`` queries from ``start`` on."""
    groups = -(-rows // size)
    return start + (size * torch.arange(1, groups + 1, device=device)).clamp(max=rows) - 1


# ---- Estimates. ----


def _pages(layer: Layer, blocks: Blocks, *, pool_q: int, weight: float) -> Shares:
    """Means of queries against means of pages, with ``weight`` standard deviations of q . k in a page on top."""
    mean, var = pool(_keys(layer), PAGE)
    for start, queries in _query_blocks(layer, blocks):
        rows = queries.shape[1]
        pages = -(-(start + rows) // PAGE)
        pooled, _ = pool(queries, pool_q)
        last = _ends(start, rows, pool_q, mean.device)
        yield _score(layer, pooled, mean[:, :pages], var[:, :pages], weight, last, blocks)


def _score(
    layer: Layer, pooled: Tensor, mean: Tensor, var: Tensor, weight: float, last: Tensor, blocks: Blocks
) -> Tensor:
    logits = _products(pooled, mean)
    if weight:
        logits = logits + weight * _products(pooled.square(), var).sqrt()
    return _by_blocks(layer.scale * logits, last, PAGE, blocks)


def _extreme(layer: Layer, blocks: Blocks, *, pool_q: int = 16) -> Shares:
    """As ``directional``, of as many pooled queries: of every 16 the mean, and the query that is farthest from it."""
    mean, var = pool(_keys(layer), PAGE)
    for start, queries in _query_blocks(layer, blocks):
        rows = queries.shape[1]
        pages = -(-(start + rows) // PAGE)
        middle, _ = pool(queries, pool_q)
        groups = _grouped(queries, pool_q)
        there = torch.arange(pool_q, device=mean.device) < _counts(rows, pool_q, mean.device)[:, None]
        distance = (groups - middle[:, :, None]).square().sum(-1).masked_fill(~there, -1)
        place = distance.argmax(-1)[..., None, None].expand(-1, -1, 1, queries.shape[-1])
        pooled = torch.cat([middle, groups.gather(2, place)[:, :, 0]], 1)
        last = _ends(start, rows, pool_q, mean.device).repeat(2)
        yield _score(layer, pooled, mean[:, :pages], var[:, :pages], SPREAD, last, blocks)


def _antidiagonals(layer: Layer, blocks: Blocks) -> Shares:
    """Of every 8 queries and 8 keys, the mean of the logits on the antidiagonal (arXiv 2503.16428)."""
    keys = _grouped(_keys(layer), STRIDE).flatten(2)
    for start, queries in _query_blocks(layer, blocks):
        rows = queries.shape[1]
        count = _counts(rows, STRIDE, keys.device)
        turned = _grouped(queries, STRIDE).flip(2).flatten(2)
        pages = -(-(start + rows) // STRIDE)
        logits = layer.scale * _products(turned, keys[:, :pages]) / count[:, None]
        yield _by_blocks(logits, _ends(start, rows, STRIDE, keys.device), STRIDE, blocks)


def _pooled(layer: Layer, blocks: Blocks) -> Shares:
    """The mean of a block's queries against every key, with 2 standard deviations of q . k in the block on top."""
    keys = _keys(layer)
    for start, queries in _query_blocks(layer, blocks):
        rows = queries.shape[1]
        seen = keys[:, : start + rows]
        mean, var = pool(queries, blocks.block_q)
        logits = _products(mean, seen) + SPREAD * _products(var, seen.square()).sqrt()
        yield _by_blocks(layer.scale * logits, _ends(start, rows, rows, keys.device), 1, blocks)


def _oracle(layer: Layer, blocks: Blocks) -> Shares:
    """The attention that is truly there, of every query."""
    keys = _keys(layer)
    for start, queries in _query_blocks(layer, blocks):
        end = start + queries.shape[1]
        position = torch.arange(start, end, device=keys.device)
        yield _by_blocks(layer.scale * _products(queries, keys[:, :end]), position, 1, blocks)


POOLED: dict[str, Callable[[Layer, Blocks], Shares]] = {
    "directional": partial(_pages, pool_q=8, weight=SPREAD),
    "directional_16": partial(_pages, pool_q=16, weight=SPREAD),
    "mean": partial(_pages, pool_q=8, weight=0.0),
    "xattention": _antidiagonals,
    "extreme": _extreme,
    "pooled": _pooled,
    "oracle": _oracle,
}
WEIGHTED = {"directional_v": "directional", "oracle_v": "oracle"}
#: By name of an estimate, the aggregates that it is tried with; "" where there is nothing to aggregate.
ESTIMATES: dict[str, tuple[str, ...]] = {
    **{name: ("max", "rms", "mean") for name in POOLED if name != "pooled"},
    "pooled": ("",),
    "union": ("",),
    "average": ("",),
    "directional_v": ("max",),
    "oracle_v": ("max", "rms", "mean"),
    "random": ("",),
}
WORDS = {
    "directional": "`directional`, 8 queries",
    "directional_16": "`directional`, 16 queries",
    "mean": "means, without the spread",
    "xattention": "antidiagonals (XAttention), stride 8",
    "extreme": "`directional`, of 16 queries the mean and the farthest",
    "pooled": "mean of the block's queries and their spread, every key",
    "union": "`directional` max or `pooled`, the larger",
    "average": "`directional` max and `pooled`, their mean",
    "directional_v": "`directional`, times the norm of values",
    "oracle_v": "oracle, times the norm of values",
    "oracle": "oracle: true attention",
    "random": "random blocks",
}


# ---- One share of a block. ----


def value_weights(layer: Layer, blocks: Blocks) -> Tensor:
    """``[Hq, key_blocks]``: the mean norm of a block's values, as a multiple of that of all."""
    norms = layer.v.float().norm(dim=-1).T[..., None]
    mean, _ = pool(norms, blocks.block_k)
    weights = mean[..., 0] / norms.mean((1, 2), keepdim=True)[..., 0]
    return weights.repeat_interleave(layer.q.shape[1] // len(weights), 0)


def block_shares(
    name: str, layer: Layer, blocks: Blocks, aggregates: Sequence[str], *, seed: int = 0
) -> dict[str, Tensor]:
    """By aggregate, shares fp32 ``[slots, Hq, key_blocks]``, contiguous, as ``select_blocks`` takes them.

    Args:
        name: one of ``ESTIMATES``.
        layer: what attention is given.
        blocks: of the sequence.
        aggregates: some of those of the estimate.
        seed: of random shares.
    """
    shape = (blocks.slots, layer.q.shape[1], blocks.keys)
    if name == "random":
        return {"": torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(layer.q.device)}
    if name in WEIGHTED:
        weights = value_weights(layer, blocks)
        return {each: x * weights for each, x in block_shares(WEIGHTED[name], layer, blocks, aggregates).items()}
    if name in ("union", "average"):
        (first,) = block_shares("directional", layer, blocks, ["max"]).values()
        (second,) = block_shares("pooled", layer, blocks, [""]).values()
        return {"": first.maximum(second) if name == "union" else (first + second) / 2}
    found = {each: torch.zeros(shape, device=layer.q.device) for each in aggregates}
    for i, shares in enumerate(POOLED[name](layer, blocks)):
        for each in aggregates:
            found[each][i] = AGGREGATES[each](shares) if each else shares[:, 0]
    return found


def words(row: Mapping[str, str]) -> str:
    """What a result's way is called in tables."""
    name = WORDS[row["estimate"]]
    name += f", {row['aggregate']}" if row["aggregate"] else ""
    return name if row["selection"] == "threshold" else f"{name}, top-p"
