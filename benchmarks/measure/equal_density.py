"""What lies at a given density, between two settings of a way to choose blocks, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

SLACK = 0.02  # how far beyond its densest and sparsest setting a line is continued


@dataclass(frozen=True)
class Rung:
    """One setting.

    Attributes:
        density: that was measured.
        kl: of every token.
        same: of every token, 1 where the likeliest next token is that of dense attention.
    """

    density: float
    kl: Tensor
    same: Tensor


@dataclass(frozen=True)
class At:
    """What was interpolated.

    Attributes:
        kl: mean over tokens; its logarithm is linear in the density.
        top1: share of tokens, linear in the density.
        pull: of every token, by how much the KL would change, to the first order, if all tokens were like it. The
            standard error of the KL is that of the mean of these.
    """

    kl: float
    top1: float
    pull: Tensor


def at_density(rungs: Sequence[Rung], wanted: float) -> At | None:
    """Of the two neighbours of ``wanted``; None where there are none (``SLACK`` aside)."""
    ordered = sorted(rungs, key=lambda rung: rung.density)
    if len(ordered) < 2 or not ordered[0].density - SLACK <= wanted <= ordered[-1].density + SLACK:
        return None
    upper = next((i for i in range(1, len(ordered) - 1) if ordered[i].density >= wanted), len(ordered) - 1)
    low, high = ordered[upper - 1], ordered[upper]
    if high.density - low.density < 1e-6:
        return None
    share = (wanted - low.density) / (high.density - low.density)
    weights = ((1 - share, low), (share, high))
    means = [max(float(rung.kl.double().mean()), 1e-12) for _, rung in weights]
    kl = math.exp(sum(weight * math.log(mean) for (weight, _), mean in zip(weights, means)))
    pull = sum(weight * (rung.kl.double() / mean - 1) for (weight, rung), mean in zip(weights, means))
    assert isinstance(pull, Tensor)
    top1 = sum(weight * float(rung.same.double().mean()) for weight, rung in weights)
    return At(kl, top1, kl * pull)


def standard_error(values: Tensor) -> float:
    """Of the mean, as if tokens were independent."""
    return float(values.double().std() / math.sqrt(values.numel()))
