"""How far distributions of next tokens are from those of dense attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ROWS = 64  # tokens whose distributions are compared at a time: a vocabulary may have 262,144


@dataclass(frozen=True)
class Distance:
    """Of two sets of distributions.

    Attributes:
        kl: of the second from the first, nats, mean.
        top1: share of tokens whose likeliest next token is the same.
        nll: of the text's own next tokens by the second, nats, mean.
    """

    kl: float
    top1: float
    nll: float


def distance(dense: Tensor, other: Tensor, targets: Tensor) -> Distance:
    """Of logits ``[n, vocabulary]``; ``targets`` ``[n - 1]`` or ``[n]``: the text's next tokens. Computed in fp32.

    Raises:
        ValueError: logits of different shapes, or too many or too few targets.
    """
    if dense.shape != other.shape or dense.dim() != 2:
        raise ValueError(f"other: expected the shape of dense, {list(dense.shape)}, got {list(other.shape)}")
    if len(targets) not in (len(dense), len(dense) - 1):
        raise ValueError(f"targets: expected {len(dense) - 1} or {len(dense)} tokens, got {len(targets)}")
    kl = same = nll = 0.0
    for start in range(0, len(dense), ROWS):
        rows = slice(start, start + ROWS)
        wanted, found = dense[rows].float().log_softmax(-1), other[rows].float().log_softmax(-1)
        kl += float((wanted.exp() * (wanted - found)).double().sum())
        same += float((wanted.argmax(-1) == found.argmax(-1)).sum())
        after = targets[rows]
        nll -= float(found[: len(after)].gather(-1, after[:, None]).double().sum())
    return Distance(max(0.0, kl / len(dense)), same / len(dense), nll / max(1, len(targets)))
