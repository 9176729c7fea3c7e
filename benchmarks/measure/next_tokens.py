"""How far sparse prefill takes a model's next tokens from those of dense attention, and which needles it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.harness import Call
from benchmarks.measure.real_keys import observing
from unique_attn.calibration import Distance, Needle, distance, make_needle

__all__ = [
    "Distance",
    "Layer",
    "Needle",
    "distance",
    "find",
    "full_layers",
    "make_needle",
    "make_needles",
    "over_layers",
    "tail_logits",
]


# ---- Distributions. ----


@torch.inference_mode()
def tail_logits(model: Any, ids: Tensor, count: int) -> Tensor:
    """Logits ``[count, vocabulary]`` after each of the last ``count`` tokens of ``ids`` ``[1, n]``, without a cache."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=count).logits[0]
    return logits


# ---- Needles. ----


@torch.inference_mode()
def find(model: Any, each: Needle) -> tuple[float, bool]:
    """Nats per token of the answer, and whether every token of it is the likeliest."""
    ids = each.ids.to(model.device)
    logits = model(ids, use_cache=False, logits_to_keep=each.answer + 1).logits[0, :-1].float()
    wanted = ids[0, -each.answer :]
    nll = -logits.log_softmax(-1).gather(-1, wanted[:, None]).mean()
    return float(nll), bool((logits.argmax(-1) == wanted).all())


def make_needles(tokenizer: Any, texts: Mapping[str, Sequence[int]], tokens: int, trials: int) -> list[Needle]:
    """Trial i is in text i, at depths that go round evenly; texts that are too short have none."""
    long = [text for text in texts.values() if len(text) >= tokens]
    if not long:
        return []
    return [make_needle(tokenizer, long[i % len(long)], tokens, (i + 0.5) / trials, seed=i) for i in range(trials)]


# ---- What attention takes. ----


@dataclass(frozen=True)
class Layer:
    """What the attention of one layer is given, packed: ``q`` ``[N, Hq, D]``, ``k`` and ``v`` ``[N, H, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@torch.inference_mode()
def full_layers(model: Any, ids: Tensor) -> list[Layer]:
    """Queries, keys and values of all layers without a sliding window for ``ids`` ``[1, n]``, rotation applied."""
    found: list[Layer] = []

    def see(q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> None:
        if not kwargs.get("sliding_window"):
            packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
            found.append(Layer(packed[0], packed[1], packed[2], float(kwargs.get("scaling") or q.shape[-1] ** -0.5)))

    with observing(model, see):
        model(ids, use_cache=False, logits_to_keep=1)
    return found


def over_layers(layers: Sequence[Layer], run: Callable[[Layer], Any]) -> Call:
    """A call that runs all layers, one after the other."""

    def call() -> list[Any]:
        return [run(layer) for layer in layers]

    return call
