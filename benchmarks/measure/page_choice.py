"""Ways to choose the pages that a decode step reads: scores of pages, by the shipped rules and by others.

A score is a function of what one layer's attention is given (:class:`Step`). Rules that are shipped are scored by
``page_scores``; candidates are computed in PyTorch from the same index entries as those of ``directional``, exact or
compressed, so that they cost the same bytes, and rounded like a rule's scores; an oracle looks at all keys. The pages
themselves are always chosen by ``topk_pages``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unique_attn import ops
from unique_attn.index_format import decode_index
from unique_attn.ops.page_scores import score_dtype
from unique_attn.rules import RULES

BLOCK = 64  # tokens per block of the paged cache


@dataclass(frozen=True)
class Setting:
    """Which pages are read.

    Attributes:
        score: one of :data:`SCORES`.
        weight: lambda or c, where the score has one.
        page_size: tokens per page.
        index_format: ``exact`` or ``compressed``.
        budget: tokens that a query reads for each KV head, sink and own page included.
        dense_layers: layers that read everything.
        layer_budgets: pairs of a layer and its budget, for layers with one of their own.
    """

    score: str = "directional"
    weight: float | None = None
    page_size: int = 8
    index_format: str = "exact"
    budget: int = 512
    dense_layers: tuple[int, ...] = ()
    layer_budgets: tuple[tuple[int, int], ...] = ()

    def of_layer(self, layer: int) -> Setting:
        """The same with the budget of this layer for all."""
        return replace(self, budget=dict(self.layer_budgets).get(layer, self.budget), layer_budgets=())

    @property
    def label(self) -> str:
        """The score with its weight, ``directional, c = 2``."""
        return label(self.score, self.weight)


def label(score: str, weight: float | None) -> str:
    name = SCORES[score].weight_name
    return f"{score}, {name} = {weight:g}" if name and weight is not None else score


@dataclass
class Step:
    """What the attention of one layer is given for the last T tokens of some texts, and what scores need of it.

    Attributes:
        q: ``[samples, T, Hq, D]``, rotary embeddings applied.
        k: ``[samples, N, H, D]``, all tokens, the last T included; zeros from ``tokens`` on, N a multiple of ``BLOCK``.
        v: like ``k``.
        tokens: of each text.
        scale: factor of the logits.
        setting: page size, format and weight that are asked for.
        generator: of random scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: int
    scale: float
    setting: Setting
    generator: torch.Generator | None = None

    @property
    def tail(self) -> int:
        return self.q.shape[1]

    @cached_property
    def rows(self) -> dict[str, Any]:
        """Every query token as a sequence of its own: ``block_table`` and ``seq_lens`` of samples * T rows."""
        samples, blocks = len(self.q), self.k.shape[1] // BLOCK
        table = torch.arange(samples * blocks, dtype=torch.int32, device=self.q.device).view(samples, blocks)
        lengths = torch.arange(self.tokens - self.tail + 1, self.tokens + 1, dtype=torch.int32, device=self.q.device)
        return {"block_table": table.repeat_interleave(self.tail, 0), "seq_lens": lengths.repeat(samples)}

    @property
    def row_queries(self) -> Tensor:
        """``[samples * T, 1, Hq, D]``."""
        return self.q.flatten(0, 1)[:, None]

    def paged(self, x: Tensor) -> Tensor:
        """``k`` or ``v`` as a paged cache ``[samples * blocks, H, BLOCK, D]``, without a copy."""
        return x.unflatten(1, (-1, BLOCK)).flatten(0, 1).transpose(1, 2)

    def index(self, rule: str) -> Tensor:
        """The shipped index of all pages. A page before a query's own is complete when it is read, so its entry does
        not depend on what comes after the query; the own page is always read, whatever its entry says."""
        paging: dict[str, Any] = self.paging(rule)
        cache = self.paged(self.k)
        index = ops.new_index(cache, **paging)
        table = self.rows["block_table"][:: self.tail].contiguous()
        start = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        ops.page_index(cache, index, table, start, start + self.tokens, max_new_tokens=self.tokens, **paging)
        return index

    def paging(self, rule: str) -> dict[str, Any]:
        form = self.setting.index_format if RULES[rule].compressible else "exact"
        return {"rule": rule, "page_size": self.setting.page_size, "index_format": form}

    def of_pages(self, x: Tensor) -> Tensor:
        """A part of an index ``[samples * blocks, H, pages, ...]`` as ``[samples, H, P, ...]``, fp32."""
        return x.float().unflatten(0, (len(self.q), -1)).transpose(1, 2).flatten(2, 3)

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations ``[samples, H, P, D]`` as the index of ``directional`` stores them."""
        paging = self.paging("directional")
        del paging["page_size"]
        mean, std = decode_index(self.index("directional"), dtype=self.k.dtype, head_dim=self.k.shape[-1], **paging)
        return self.of_pages(mean), self.of_pages(std)

    @cached_property
    def grouped(self) -> Tensor:
        """Queries ``[samples, H, G, T, D]``, fp32."""
        return self.q.float().unflatten(2, (self.k.shape[2], -1)).permute(0, 2, 3, 1, 4)

    @cached_property
    def logits(self) -> Tensor:
        """``[samples, H, G, T, N]``, fp32, -inf for tokens that a query does not see."""
        products = self.products(self.grouped, self.k.float().transpose(1, 2))
        hidden = torch.arange(self.k.shape[1], device=self.q.device) >= self.rows["seq_lens"][: self.tail, None]
        return (products * self.scale).masked_fill_(hidden, -torch.inf)

    @cached_property
    def lse(self) -> Tensor:
        """The logarithm of the sum of exponentials over all tokens that a query sees, ``[samples, T, Hq]``."""
        return self.logits.logsumexp(-1).flatten(1, 2).transpose(1, 2)

    @cached_property
    def page_mass(self) -> Tensor:
        """The share of attention on each page ``[samples, H, G, T, P]``."""
        return self.logits.softmax(-1).unflatten(-1, (-1, self.setting.page_size)).sum(-1)

    def terms(self) -> tuple[Tensor, Tensor]:
        """``q . mean`` and ``sum_d q_d^2 var_d`` ``[samples, H, G, T, P]``: mean and variance of q . k in a page."""
        mean, std = self.statistics
        return self.products(self.grouped, mean), self.products(self.grouped.square(), std.square())

    @staticmethod
    def products(q: Tensor, x: Tensor) -> Tensor:
        """``[samples, H, G, T, n]`` of queries ``[samples, H, G, T, D]`` and vectors ``[samples, H, n, D]``."""
        return (q.flatten(2, 3) @ x.mT).unflatten(2, q.shape[2:4])  # the group as rows: no copies of x


# ---- Scores. ----


@dataclass(frozen=True)
class Score:
    """A way to score pages.

    Attributes:
        of: scores ``[samples, H, T, P]`` of pages; only those that a query sees count.
        weights: what it is measured with; None for a score without one.
        weight_name: of the weight.
        index_rule: the shipped rule whose index it reads; None if it reads none.
        rounded: stored in the dtype of shipped scores.
    """

    of: Callable[[Step], Tensor]
    weights: tuple[float | None, ...] = (None,)
    weight_name: str = ""
    index_rule: str | None = None
    rounded: bool = True


def _shipped(rule: str) -> Callable[[Step], Tensor]:
    def scores(step: Step) -> Tensor:
        weight: dict[str, Any] = {"spread_weight": step.setting.weight}
        scores = ops.page_scores(step.row_queries, step.index(rule), **step.rows, **step.paging(rule), **weight)
        return scores[:, 0].unflatten(0, (len(step.q), -1)).transpose(1, 2)

    return scores


def _random(step: Step) -> Tensor:
    samples, tokens, _, _ = step.q.shape
    shape = (samples, step.k.shape[2], tokens, step.k.shape[1] // step.setting.page_size)
    return torch.rand(shape, generator=step.generator, device=step.q.device)


def _recent(step: Step) -> Tensor:
    """The later, the better: with the sink page, what streaming attention reads."""
    pages = step.k.shape[1] // step.setting.page_size
    order = torch.arange(pages, device=step.q.device, dtype=torch.float32)
    return order.expand(len(step.q), step.k.shape[2], step.tail, pages)


def _oracle(step: Step) -> Tensor:
    """The attention that is truly there, mean over the group: no choice of whole pages keeps more of it."""
    return step.page_mass.mean(2)


def _directional(step: Step) -> Tensor:
    mean, variance = step.terms()
    weight = 2.0 if step.setting.weight is None else step.setting.weight
    return mean + weight * variance.sqrt()


def _second_order(step: Step) -> Tensor:
    """The logarithm of the mean of exp(scale * q . k) in a page to the second order, in the unit of q . k.

    It is capped: S numbers exceed their mean by at most ``sqrt(S - 1)`` of their standard deviations, and so does
    what is estimated here.
    """
    mean, variance = step.terms()
    most = (step.setting.page_size - 1) ** 0.5 * variance.sqrt()
    return mean + torch.minimum(0.5 * step.scale * variance, most)


def _group_max(score: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
    return lambda step: score(step).amax(2)


def _normalized(score: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
    """Maximum over the group of ``z - logsumexp(z)`` over the complete pages that a query sees, z the scores times the
    logits' scale, so that no head outweighs the others by its size."""

    def scores(step: Step) -> Tensor:
        z = score(step) * step.scale
        own = (step.rows["seq_lens"][: step.tail, None] - 1) // step.setting.page_size
        complete = torch.arange(z.shape[-1], device=z.device) < own
        return (z - z.masked_fill(~complete, -torch.inf).logsumexp(-1, keepdim=True)).amax(2)

    return scores


SCORES: dict[str, Score] = {
    "random": Score(_random, rounded=False),
    "recent": Score(_recent, rounded=False),
    "mean": Score(_shipped("mean"), index_rule="mean"),
    "unique": Score(_shipped("unique"), (0.0, 0.125, 0.25, 0.5, 1.0), "lambda", "unique"),
    "minmax": Score(_shipped("minmax"), index_rule="minmax"),
    "directional": Score(_shipped("directional"), (1.0, 2.0, 3.0), "c", "directional"),
    "second order": Score(_group_max(_second_order), index_rule="directional"),
    "directional, normalized": Score(_normalized(_directional), index_rule="directional"),
    "second order, normalized": Score(_normalized(_second_order), index_rule="directional"),
    "oracle": Score(_oracle, rounded=False),
}


def choose(step: Step) -> Tensor:
    """The pages int32 ``[samples * T, 1, H, k]`` that a setting reads: the first, the own, and those with the best
    scores."""
    score = SCORES[step.setting.score]
    scores = score.of(step).transpose(1, 2).flatten(0, 1)[:, None]
    if score.rounded:
        scores = scores.to(score_dtype(step.q.dtype))
    size = step.setting.page_size
    return ops.topk_pages(scores.contiguous(), step.rows["seq_lens"], step.setting.budget // size, page_size=size)
