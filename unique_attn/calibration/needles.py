"""Texts with a fact in them that is asked for at their end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOWNS = ("Alvern", "Brinmouth", "Castle Ore", "Dunlow", "Eastwick", "Farrow", "Greyhaven", "Holmstead", "Kestrel Bay")
PLACES = ("archive", "brewery", "harbour", "library", "museum", "observatory", "station", "theatre")


@dataclass(frozen=True)
class Needle:
    """A text with a fact in it that is asked for at its end.

    Attributes:
        ids: int64 ``[1, n]``, the answer included.
        question: tokens of the question, which stand before the answer.
        answer: tokens of the answer, the last ones.
        depth: where the fact is, as a share of the text.
    """

    ids: Tensor
    question: int
    answer: int
    depth: float


def make_needle(tokenizer: Any, text: Sequence[int], tokens: int, depth: float, seed: int) -> Needle:
    """``tokens`` tokens in all: the beginning of ``text`` (token numbers), a code at ``depth``, the question, the code.

    Raises:
        ValueError: the text is too short.
    """
    rng = random.Random(seed)
    town, place, code = rng.choice(TOWNS), rng.choice(PLACES), rng.randrange(100_000, 1_000_000)

    def encode(words: str) -> list[int]:
        found: list[int] = tokenizer(words, add_special_tokens=False).input_ids
        return found

    fact = encode(f" The code of the {town} {place} is {code}.")
    asked = f"the code of the {town} {place}"
    question = encode(f"\n\nQuestion: What is {asked}?\nAnswer: T{asked[1:]} is")
    answer = encode(f" {code}")
    room = tokens - len(fact) - len(question) - len(answer)
    if not 0 < room <= len(text):
        raise ValueError(f"text: expected at least {room} tokens for a needle in {tokens}, got {len(text)}")
    at = round(depth * room)
    ids = [*text[:at], *fact, *text[at:room], *question, *answer]
    return Needle(torch.tensor([ids]), len(question), len(answer), depth)
