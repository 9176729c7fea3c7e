"""Which key blocks a prefill reads, by an estimate of shares and a selection, in a real model.

:func:`survey` reads a text densely and keeps every way's shares, from which thresholds for given densities are found;
:func:`read` reads a text with the blocks that a way selects, in all layers of full attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.block_lists import Blocks, density, find_setting
from benchmarks.measure.block_shares import ESTIMATES, block_shares
from benchmarks.measure.next_tokens import Layer, tail_logits
from benchmarks.measure.real_keys import attending, observing
from unique_attn import ops

SELECTIONS = ("threshold", "top_p")


@dataclass(frozen=True)
class Way:
    """How blocks are chosen.

    Attributes:
        estimate: one of :data:`ESTIMATES`.
        aggregate: of the shares of a block's pooled queries; "" where there is one.
        selection: ``threshold`` or ``top_p``.
    """

    estimate: str = "directional"
    aggregate: str = "max"
    selection: str = "threshold"

    @property
    def label(self) -> str:
        """``directional:max``, as flags take it."""
        parts = [self.estimate, self.aggregate, self.selection if self.selection != "threshold" else ""]
        return ":".join(part for part in parts if part)


SHIPPED = Way()
PAPER = Way("mean", "mean", "top_p")  # the paper's, but for its pooling of heads


def ways_of(names: Sequence[str]) -> list[Way]:
    """``NAME`` for an estimate with all of its aggregates, ``NAME:AGGREGATE`` or ``NAME:AGGREGATE:top_p``.

    Raises:
        ValueError: an unknown one.
    """
    found: list[Way] = []
    for name in names:
        estimate, *more = name.split(":")
        if estimate not in ESTIMATES:
            raise ValueError(f"expected of {', '.join(ESTIMATES)}, got {estimate!r}")
        known = ESTIMATES[estimate]
        selection = more.pop() if more and more[-1] in SELECTIONS else "threshold"
        if more and (len(more) > 1 or more[0] not in known):
            raise ValueError(f"{name}: expected an aggregate of {', '.join(filter(None, known)) or 'none'}")
        found += [Way(estimate, each, selection) for each in more or known]
    return list(dict.fromkeys(found))


def select(way: Way, shares: Tensor, blocks: Blocks, value: float) -> Tensor:
    """The packed mask int32 ``[slots, Hq, words]``: ``value`` is the threshold or the top-p."""
    setting: dict[str, Any] = {way.selection: value}
    bounds = _bounds(blocks.tokens, shares.device)
    mask, _ = ops.select_blocks(shares, bounds, bounds, block_q=blocks.block_q, block_k=blocks.block_k, **setting)
    return mask


def shares_of(way: Way, layer: Layer, blocks: Blocks, number: int) -> Tensor:
    """Shares of a layer, the ``number``-th that is sparse."""
    return block_shares(way.estimate, layer, blocks, [way.aggregate], seed=number)[way.aggregate]


def _bounds(tokens: int, device: torch.device) -> Tensor:
    return torch.tensor([0, tokens], dtype=torch.int32, device=device)


# ---- Dense attention. ----


@dataclass
class Survey:
    """Of one text under dense attention.

    Attributes:
        logits: of the tail ``[tail, vocabulary]``.
        shares: by way without its selection, shares ``[slots, Hq, key_blocks]`` of every layer of full attention.
        truth: likewise the mean of the true shares of a block's queries.
    """

    logits: Tensor
    shares: dict[tuple[str, str], list[Tensor]]
    truth: list[Tensor]


@torch.inference_mode()
def survey(model: Any, ids: Tensor, tail: int, ways: Sequence[Way]) -> Survey:
    blocks = Blocks(ids.shape[1])
    wanted: dict[str, list[str]] = {"oracle": ["mean"]}
    for way in ways:
        names = wanted.setdefault(way.estimate, [])
        names += [way.aggregate] if way.aggregate not in names else []
    found = Survey(torch.empty(0), {(name, each): [] for name in wanted for each in wanted[name]}, [])

    def see(q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> None:
        if kwargs.get("sliding_window"):
            return
        layer = _packed(q, k, v, kwargs)
        number = len(found.truth)
        for name, aggregates in wanted.items():
            for each, shares in block_shares(name, layer, blocks, aggregates, seed=number).items():
                found.shares[name, each].append(shares)
        found.truth.append(found.shares["oracle", "mean"][-1])

    with observing(model, see):
        found.logits = tail_logits(model, ids, tail)
    return found


def _packed(q: Tensor, k: Tensor, v: Tensor, kwargs: Mapping[str, Any]) -> Layer:
    rows = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    return Layer(rows[0], rows[1], rows[2], float(kwargs.get("scaling") or q.shape[-1] ** -0.5))


def setting_for(way: Way, surveys: Sequence[Survey], blocks: Blocks, wanted: float) -> float | None:
    """The threshold or top-p with which ``wanted`` of the visible blocks of the texts are kept, all layers and heads
    together; None if more are always kept."""
    every = [shares for each in surveys for shares in each.shares[way.estimate, way.aggregate]]
    seen, forced = blocks.seen(every[0].device), blocks.forced(every[0].device)
    if wanted <= int(forced.sum()) / int(seen.sum()):
        return None
    if way.selection == "top_p":

        def kept(top_p: float) -> float:
            return sum(density(blocks, select(way, shares, blocks, top_p)) for shares in every) / len(every)

        return find_setting(wanted, kept, steps=20)[0]
    free = seen & ~forced
    values = torch.cat([x[: blocks.queries].transpose(0, 1)[:, free].flatten() for x in every]).clamp(max=1)
    share = (wanted * int(seen.sum()) - int(forced.sum())) / int(free.sum())
    place = min(round(share * len(values)), len(values)) - 1
    return float(values.sort(descending=True).values[max(place, 0)])


def kept_mass(way: Way, surveys: Sequence[Survey], blocks: Blocks, value: float) -> float:
    """The true attention on the blocks that would be kept, mean over queries, heads, layers and texts. (Each query
    block counts alike.)"""
    found = []
    for each in surveys:
        for shares, truth in zip(each.shares[way.estimate, way.aggregate], each.truth):
            flags = ops.unpack_block_mask(select(way, shares, blocks, value), blocks.keys)
            found.append((truth * flags)[: blocks.queries].sum(-1).mean())
    return float(torch.stack(found).mean())


# ---- Sparse attention. ----


@contextmanager
def choosing(model: Any, choose: Callable[[Layer, Blocks, int], Tensor]) -> Iterator[list[float]]:
    """Inside, every layer of full attention of ``model`` attends to the blocks of the packed mask that ``choose`` gives
    for it, its blocks and its number; yields the densities, one of each layer and forward. One text at a time."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    densities: list[float] = []
    layers: list[int] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        if kwargs.get("sliding_window"):
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        layer = _packed(query, key, value, kwargs)
        blocks = Blocks(query.shape[2])
        if module.layer_idx not in layers:
            layers.append(module.layer_idx)
        kept = choose(layer, blocks, layers.index(module.layer_idx))
        densities.append(density(blocks, kept))
        bounds = _bounds(blocks.tokens, query.device)
        out, _ = ops.block_sparse_attention(
            layer.q, layer.k, layer.v, bounds, bounds, blocks.tokens, kept,
            block_q=blocks.block_q, block_k=blocks.block_k, scale=layer.scale,
        )  # fmt: skip
        return out[None], None

    with attending(model, attention):
        yield densities


@contextmanager
def sparse(model: Any, way: Way, value: float) -> Iterator[list[float]]:
    """Inside, ``model`` reads the blocks that a way selects; yields their densities."""

    def choose(layer: Layer, blocks: Blocks, number: int) -> Tensor:
        return select(way, shares_of(way, layer, blocks, number), blocks, value)

    with choosing(model, choose) as densities:
        yield densities


def read(model: Any, ids: Tensor, tail: int, way: Way, value: float) -> tuple[Tensor, float]:
    """Logits of the tail ``[tail, vocabulary]`` and the density, mean over layers and heads."""
    with sparse(model, way, value) as densities:
        logits = tail_logits(model, ids, tail)
    return logits, sum(densities) / len(densities)
