"""What the terms of a score say about pages, head by head: how large each is, and how well it ranks the true attention.

A rule's score is a mean term, q . mean, and a spread term. Both are taken in the unit of the logits, over the complete
pages behind the first that all queries see. *Rank correlation* is Spearman's, over the pages of one query head and
query, with the logarithm of the attention that is truly on each page; all numbers are means over queries and texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.page_choice import SCORES, Setting, Step
from benchmarks.measure.tail_decode import TailBatch

LAMBDA, C = 0.5, 2.0  # the weights that ship


def ranks(x: Tensor) -> Tensor:
    """Places along the last dimension, fp32; ties in the order in which they stand."""
    order = x.argsort(-1)
    places = torch.arange(x.shape[-1], dtype=torch.float32, device=x.device).expand_as(x)
    return torch.empty_like(x, dtype=torch.float32).scatter_(-1, order, places)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's along the last dimension, of numbers without many ties."""
    x, y = (ranks(each) - (each.shape[-1] - 1) / 2 for each in (a, b))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def head_terms(step: Step) -> dict[str, Tensor]:
    """Of one layer, each ``[Hq]``:

    Returns:
        ``mean_sd``, ``unique_sd``, ``directional_sd``: the standard deviation over pages of the mean term, and of the
        spread terms with the weights that ship. ``unique_ratio``, ``directional_ratio``: the latter by the first.
        ``rank_mean``, ``rank_unique_spread``, ``rank_directional_spread``: rank correlations with the true attention of
        single terms, ``rank_directional`` and ``rank_unique_<lambda>`` of scores. ``order_spread``, ``order_mean``: how
        much the order of pages by ``unique`` is that of its spread term, and of its mean term. ``spread_norm``: rank
        correlation of the spread with the norm of the page's mean. ``key_norm_cv``: standard deviation of the keys'
        norms by their mean. ``equal_c``: the c with which the spread term of ``directional`` is as large as that of
        ``unique``, median over pages.
    """
    size = step.setting.page_size
    pages = slice(1, (step.tokens - step.tail) // size)
    mean, std = (each[:, :, pages] for each in step.statistics)
    q = step.grouped
    centre = step.products(q, mean) * step.scale
    own_way = step.products(q.square(), std.square()).sqrt() * step.scale
    length = std.square().sum(-1).sqrt()  # [samples, H, P]
    any_way = q.norm(dim=-1, keepdim=True) * length[:, :, None, None] * step.scale
    logits = step.logits[..., pages.start * size : pages.stop * size]
    truth = logits.unflatten(-1, (-1, size)).logsumexp(-1)
    unique = centre + LAMBDA * any_way

    def of_heads(x: Tensor) -> Tensor:
        """``[samples, H, G, T]`` or ``[samples, H]`` as ``[Hq]``."""
        if x.dim() == 2:
            x = x[:, :, None, None].expand(-1, -1, q.shape[2], 1)
        return x.mean((0, 3)).flatten()

    sd = centre.std(-1)
    found = {
        "mean_sd": sd,
        "unique_sd": LAMBDA * any_way.std(-1),
        "directional_sd": C * own_way.std(-1),
        "unique_ratio": LAMBDA * any_way.std(-1) / sd,
        "directional_ratio": C * own_way.std(-1) / sd,
        "rank_mean": rank_correlation(centre, truth),
        "rank_unique_spread": rank_correlation(any_way, truth),
        "rank_directional_spread": rank_correlation(own_way, truth),
        "rank_directional": rank_correlation(centre + C * own_way, truth),
        "order_spread": rank_correlation(unique, any_way),
        "order_mean": rank_correlation(unique, centre),
        "spread_norm": rank_correlation(length, mean.norm(dim=-1)),
        "key_norm_cv": _variation(step.k[:, : step.tokens].float().norm(dim=-1)),
        "equal_c": (LAMBDA * any_way / own_way.clamp(min=1e-12)).median(-1).values,
    }
    for weight in SCORES["unique"].weights:
        assert weight is not None
        found[f"rank_unique_{weight:g}"] = rank_correlation(centre + weight * any_way, truth)
    return {name: of_heads(x) for name, x in found.items()}


def _variation(norms: Tensor) -> Tensor:
    """``[samples, H]`` of norms ``[samples, n, H]``."""
    return norms.std(1) / norms.mean(1)


def spread_terms(batch: TailBatch, page_size: int = 8) -> list[dict[str, Any]]:
    """:func:`head_terms` of every layer of full attention and query head, a row each; queries of dense attention."""
    rows: list[dict[str, Any]] = []

    def see(layer: int, step: Step) -> None:
        step.setting = Setting(page_size=page_size)
        found = {name: x.tolist() for name, x in head_terms(step).items()}
        heads = step.q.shape[2]
        rows.extend(
            {"layer": layer, "head": head, **{name: round(x[head], 4) for name, x in found.items()}}
            for head in range(heads)
        )

    batch.decode(None, see=see)
    return rows
