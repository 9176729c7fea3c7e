"""One budget for all layers, or one for each? Budgets are chosen on one text and judged on the others, at equal bytes.

On a text, every layer has a loss for each budget: the attention that it does not read, or that times what the layer
costs the next tokens. Budgets of a total are chosen by these losses, byte by byte where a byte lowers them most, from
very small ones on, or from half of the one budget. What they are worth is the bytes that one budget for all layers
would read for the same KL.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.failures import token_kl
from benchmarks.measure.page_choice import Setting
from benchmarks.measure.tail_decode import TailBatch
from unique_attn.calibration.run import MOST_DENSE

LADDER = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # budgets that a layer may have, beside everything
TOTALS = (128, 256, 384, 512)  # what is read in all is what one of these budgets would read
PROBE = 128  # budget at which one layer alone is sparse
DRAWS = 1000  # of the bootstrap
MASS, SENSITIVITY, SQUARED, GUARDED, DENSE = "mass", "sensitivity", "squared", "squared, half", "dense layers"

Budgets = Mapping[int, int | None]  # by layer; None reads everything
Point = tuple[float, float]  # bytes and KL


# ---- Choosing. ----


def allocate(losses: Mapping[int, Sequence[float]], costs: Mapping[int, Sequence[int]], total: int) -> dict[int, int]:
    """Which of its choices each layer takes: from the cheapest on, always the step of most gain for its cost that fits.

    Args:
        losses: by layer, of each choice.
        costs: by layer, of each choice, increasing.
        total: what all choices may cost.

    Raises:
        ValueError: the cheapest choices cost more than ``total``.
    """
    taken = dict.fromkeys(losses, 0)
    left = total - sum(costs[layer][0] for layer in losses)
    if left < 0:
        raise ValueError(f"total: expected at least {total - left}, what the least budgets cost, got {total}")
    while True:
        steps = [
            ((loss[now] - loss[then]) / (costs[layer][then] - costs[layer][now]), -layer, then)
            for layer, loss in losses.items()
            for now in (taken[layer],)
            for then in range(now + 1, len(loss))
            if costs[layer][then] - costs[layer][now] <= left and loss[then] < loss[now]
        ]
        if not steps:
            return taken
        _, negative, then = max(steps)
        layer = -negative
        left -= costs[layer][then] - costs[layer][taken[layer]]
        taken[layer] = then


def losses_of(method: str, lost: Sequence[float], alone: float, probe: float) -> list[float]:
    """Losses of a layer's budgets.

    Args:
        method: ``mass``, ``sensitivity``, ``squared`` or ``squared, half``.
        lost: attention lost at each budget.
        alone: KL when this layer alone is sparse.
        probe: attention that it loses then.
    """
    if method == MASS:
        return list(lost)
    power = 1 if method == SENSITIVITY else 2
    return [alone * (x / max(probe, 1e-9)) ** power for x in lost]


def bytes_at(curve: Iterable[Point], kl: float) -> float:
    """The least bytes at which a curve, by increasing bytes, comes down to a KL; logarithms of KL are interpolated.

    Beyond its ends, the bytes of the end: what lies further is not claimed.
    """
    points = list(curve)
    if points[0][1] <= kl:
        return points[0][0]
    for (low, above), (high, below) in pairwise(points):
        if below <= kl:
            return low + (high - low) * math.log(above / kl) / math.log(above / below)
    return points[-1][0]


# ---- Measuring. ----


class _Measured:
    """KL and attention lost of settings over a batch, each measured once."""

    def __init__(self, batch: TailBatch, passed: Callable[[], object]) -> None:
        self.batch, self.passed = batch, passed
        self.found: dict[Setting, tuple[Tensor, dict[int, Tensor]]] = {}

    def _of(self, setting: Setting) -> tuple[Tensor, dict[int, Tensor]]:
        if setting not in self.found:
            decoded = self.batch.decode(setting, mass=True)
            lost = {layer: 1 - kept.float().mean((1, 2)) for layer, kept in decoded.mass.items()}
            self.found[setting] = token_kl(self.batch.dense, decoded.logits).double().cpu(), lost
            self.passed()
        return self.found[setting]

    def bytes(self, setting: Setting, *, index: bool = True) -> int:
        """Of keys and values, and of the index, in all layers."""
        each = [self.batch.bytes_read(setting, layer) for layer in self.batch.full_layers]
        return sum(kv + entries if index else kv for kv, entries in each)

    def kl(self, setting: Setting) -> Tensor:
        """``[samples, T]``, on the CPU."""
        return self._of(setting)[0]

    def lost(self, setting: Setting, layer: int, sample: int) -> float:
        """Mean over heads and tokens."""
        return max(0.0, float(self._of(setting)[1][layer][sample]))


def with_budgets(base: Setting, budgets: Budgets) -> Setting:
    """A setting that reads these budgets."""
    dense = tuple(sorted(layer for layer, budget in budgets.items() if budget is None))
    sized = tuple(sorted((layer, budget) for layer, budget in budgets.items() if budget is not None))
    return replace(base, dense_layers=dense, layer_budgets=sized)


def layer_budgets(
    batch: TailBatch, names: Sequence[str], base: Setting, *, passed: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """What budgets for each layer are worth, over a batch that has logits of its whole tail.

    Args:
        batch: at least two texts.
        names: of the texts.
        base: the score, page size and index format.
        passed: called after every forward, of which there are about :func:`forwards`.

    Raises:
        ValueError: less than two texts, or texts that are too short for any of the totals.
    """
    if len(names) < 2:
        raise ValueError(f"names: expected at least two texts, got {len(names)}")
    layers, samples = batch.full_layers, range(len(names))
    run = _Measured(batch, passed)
    dense_bytes = batch.bytes_read(None, layers[0])[0]
    ladder = [b for b in LADDER if sum(batch.bytes_read(replace(base, budget=b), layers[0])) < dense_bytes]
    totals = [total for total in TOTALS if total in ladder[1:]]
    if not totals or PROBE not in ladder:
        raise ValueError(f"batch: expected texts longer than twice {PROBE} tokens, got {batch.tokens}")
    uniform = {budget: replace(base, budget=budget) for budget in ladder}
    costs = {
        layer: [*(sum(batch.bytes_read(each, layer)) for each in uniform.values()), batch.bytes_read(None, layer)[0]]
        for layer in layers
    }
    alone = {
        layer: run.kl(with_budgets(base, {**dict.fromkeys(layers), layer: PROBE})).mean(1).tolist() for layer in layers
    }
    lost = {  # reading everything loses nothing
        (layer, sample): [*(run.lost(each, layer, sample) for each in uniform.values()), 0.0]
        for layer in layers
        for sample in samples
    }
    probe = ladder.index(PROBE)

    def chosen(method: str, total: int, sample: int) -> Setting | None:
        """Budgets chosen on one text."""
        most = run.bytes(uniform[total])
        if method == DENSE:
            worst = sorted(layers, key=lambda layer: -lost[layer, sample][ladder.index(total)])
            return _with_dense_layers(run, base, worst, most, sample)
        first = bisect_left(ladder, total // 2) if method == GUARDED else 0  # the least that a layer reads
        losses = {
            layer: losses_of(method, lost[layer, sample], alone[layer][sample], lost[layer, sample][probe])[first:]
            for layer in layers
        }
        taken = allocate(losses, {layer: cost[first:] for layer, cost in costs.items()}, most)
        return with_budgets(base, {layer: [*ladder, None][first + choice] for layer, choice in taken.items()})

    rows, saved = [], {}
    for method in (MASS, SENSITIVITY, SQUARED, GUARDED, DENSE):
        by_total = {total: [chosen(method, total, sample) for sample in samples] for total in totals}
        settings = {total: [s for s in each if s is not None] for total, each in by_total.items() if None not in each}
        rows += [_row(run, layers, method, uniform[total], names, each) for total, each in settings.items()]
        saved[method] = {
            where: _saved(run, uniform, list(settings.values()), where == "held_out") for where in ("held_out", "own")
        }
    return {
        "length": batch.tokens,
        "texts": list(names),
        "setting": {"score": base.score, "weight": base.weight, "page_size": base.page_size,
                    "index_format": base.index_format},
        "layers": layers,
        "ladder": ladder,
        "probe": PROBE,
        "uniform": [
            {
                "budget": budget,
                "bytes": run.bytes(each),
                "index_bytes": run.bytes(each) - run.bytes(each, index=False),
                "kl": round(float(run.kl(each).mean()), 6),
                "kl_texts": _rounded(run.kl(each).mean(1)),
            }
            for budget, each in uniform.items()
        ],
        "dense_bytes": dense_bytes * len(layers),
        "curves": [
            {
                "text": names[sample],
                "layer": layer,
                "lost": [round(x, 5) for x in lost[layer, sample][:-1]],
                "kl_alone": round(alone[layer][sample], 7),
            }
            for sample in samples
            for layer in layers
        ],
        "rows": rows,
        "saved": saved,
    }  # fmt: skip


def forwards(layers: int, texts: int) -> int:
    """How many a measurement takes at most."""
    return layers + len(LADDER) + len(TOTALS) * texts * (4 + len(MOST_DENSE))


def _with_dense_layers(run: _Measured, base: Setting, worst: Sequence[int], most: int, sample: int) -> Setting | None:
    """As ``calibrate`` does: the layers that lose most attention are dense, of which the number is chosen by the KL of
    the same text; the others have the largest budget that ``most`` bytes allow. None if they allow none."""
    tried = []
    for count in MOST_DENSE:
        setting = replace(base, dense_layers=tuple(sorted(worst[:count])))
        sized = [replace(setting, budget=size) for size in range(LADDER[0], max(TOTALS), base.page_size)]
        fitting = [each for each in sized if run.bytes(each) <= most]
        if count < len(worst) and fitting:
            tried.append(fitting[-1])
    return min(tried, key=lambda each: float(run.kl(each)[sample].mean()), default=None)


def _rounded(values: Tensor) -> list[float]:
    return [round(float(x), 6) for x in values]


def _pairs(count: int, held_out: bool) -> list[tuple[int, int]]:
    """Texts on which budgets are chosen and judged."""
    return [(a, b) for a in range(count) for b in range(count) if (a != b) == held_out]


def _row(
    run: _Measured, layers: Sequence[int], method: str, uniform: Setting, names: Sequence[str], each: Sequence[Setting]
) -> dict[str, Any]:
    """Of one total: KL on the other texts and on the own ones, and the budgets."""
    row: dict[str, Any] = {"method": method, "total": uniform.budget}
    row["bytes"] = round(sum(run.bytes(setting) for setting in each) / len(each))
    for where in ("held_out", "own"):
        pairs = _pairs(len(each), where == "held_out")
        kl = torch.stack([run.kl(each[a])[b] for a, b in pairs])
        more = kl - torch.stack([run.kl(uniform)[b] for _, b in pairs])
        row[where] = {
            "kl": round(float(kl.mean()), 6),
            "kl_more": round(float(more.mean()), 6),
            "kl_more_se": round(float(more.std() / math.sqrt(more.numel())), 6),
        }
    row["chosen_on"] = {
        name: {
            "budgets": [None if x in setting.dense_layers else setting.of_layer(x).budget for x in layers],
            "kl_texts": _rounded(run.kl(setting).mean(1)),
        }
        for name, setting in zip(names, each)
    }
    return row


def _saved(
    run: _Measured, uniform: Mapping[int, Setting], by_total: Sequence[Sequence[Setting]], held_out: bool
) -> dict[str, Any]:
    """The share of bytes that settings save against one budget of equal KL: of each total, their mean with the 5th and
    95th percentile of a bootstrap over the tokens, and the mean if reading the index were free."""
    if not by_total:
        return {}
    pairs = _pairs(len(by_total[0]), held_out)
    curve = [torch.stack([run.kl(each)[b] for _, b in pairs]).flatten() for each in uniform.values()]
    found = [torch.stack([run.kl(each[a])[b] for a, b in pairs]).flatten() for each in by_total]

    read = {index: [float(run.bytes(s, index=index)) for s in uniform.values()] for index in (True, False)}
    taken = {i: [sum(run.bytes(s, index=i) for s in each) / len(each) for each in by_total] for i in (True, False)}

    def shares(pick: Tensor | None, index: bool) -> list[float]:
        def mean(values: Tensor) -> float:
            return max(1e-9, float((values if pick is None else values[pick]).mean()))

        points = [(size, mean(kl)) for size, kl in zip(read[index], curve)]
        return [1 - size / bytes_at(points, mean(kl)) for size, kl in zip(taken[index], found)]

    each = shares(None, True)
    generator = torch.Generator().manual_seed(0)
    count = curve[0].numel()
    drawn = torch.tensor(
        [sum(shares(torch.randint(count, (count,), generator=generator), True)) / len(each) for _ in range(DRAWS)]
    )
    low, high = drawn.quantile(torch.tensor([0.05, 0.95])).tolist()
    free = shares(None, False)
    return {
        "totals": [round(x, 4) for x in each],
        "mean": round(sum(each) / len(each), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "mean_without_index": round(sum(free) / len(free), 4),
    }
