"""How far sparse prefill takes a model's next tokens from those of dense attention, and which needles it finds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.harness import Call
from benchmarks.measure.real_keys import observing
from examples.finetuning.data import CITIES, PLACES
from unique_attn.calibration import Distance, distance

__all__ = ["Distance", "Layer", "Needle", "distance", "find", "full_layers", "needle", "over_layers", "tail_logits"]


# ---- Distributions. ----


@torch.inference_mode()
def tail_logits(model: Any, ids: Tensor, count: int) -> Tensor:
    """Logits ``[count, vocabulary]`` after each of the last ``count`` tokens of ``ids`` ``[1, n]``, without a cache."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=count).logits[0]
    return logits


# ---- Needles. ----


@dataclass(frozen=True)
class Needle:
    """A text with a fact in it that is asked for at its end.

    Attributes:
        ids: int64 ``[1, n]``, the answer included.
        answer: tokens of the answer, the last ones.
        depth: where the fact is, as a share of the text.
    """

    ids: Tensor
    answer: int
    depth: float


def needle(tokenizer: Any, text: Sequence[int], tokens: int, depth: float, seed: int) -> Needle:
    """``tokens`` tokens in all: the beginning of ``text`` (token numbers), a code at ``depth``, the question, the code.

    Raises:
        ValueError: the text is too short.
    """
    rng = random.Random(seed)
    city, place, code = rng.choice(CITIES), rng.choice(PLACES), rng.randrange(100_000, 1_000_000)

    def encode(words: str) -> list[int]:
        found: list[int] = tokenizer(words, add_special_tokens=False).input_ids
        return found

    fact = encode(f" The code of the {city} {place} is {code}.")
    question = encode(
        f"\n\nQuestion: What is the code of the {city} {place}?\nAnswer: The code of the {city} {place} is"
    )
    answer = encode(f" {code}")
    room = tokens - len(fact) - len(question) - len(answer)
    if not 0 < room <= len(text):
        raise ValueError(f"a text of {len(text)} tokens has no room for a needle in {tokens}")
    place_of = round(depth * room)
    ids = [*text[:place_of], *fact, *text[place_of:room], *question, *answer]
    return Needle(torch.tensor([ids]), len(answer), depth)


@torch.inference_mode()
def find(model: Any, each: Needle) -> tuple[float, bool]:
    """Nats per token of the answer, and whether every token of it is the likeliest."""
    ids = each.ids.to(model.device)
    logits = model(ids, use_cache=False, logits_to_keep=each.answer + 1).logits[0, :-1].float()
    wanted = ids[0, -each.answer :]
    nll = -logits.log_softmax(-1).gather(-1, wanted[:, None]).mean()
    return float(nll), bool((logits.argmax(-1) == wanted).all())


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
