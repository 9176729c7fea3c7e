"""Codes of names, hidden in a text: one, one of several, several of one name, several names at once."""

from __future__ import annotations

import random
from itertools import product

from benchmarks.measure.tasks.writing import Sample, Writer

COLORS = ("amber", "blue", "brown", "golden", "green", "pink", "purple", "red", "silver", "white")
ANIMALS = (
    "beaver",
    "camel",
    "dolphin",
    "eagle",
    "falcon",
    "hamster",
    "lizard",
    "otter",
    "panda",
    "rabbit",
    "tiger",
    "wolf",
)
NAMES = tuple(f"{color} {animal}" for color, animal in product(COLORS, ANIMALS))
SEVERAL = 4  # codes or names where there are several

ONE = "A special code is hidden in the following text. Remember it: you will be asked for it at the end.\n"
MORE = "Some special codes are hidden in the following text. Remember them: you will be asked for them at the end.\n"


def single(writer: Writer, tokens: int, rng: random.Random) -> Sample:
    """One code of one name."""
    return _asked(writer, tokens, rng, 1)


def multi_key(writer: Writer, tokens: int, rng: random.Random) -> Sample:
    """Codes of several names, of which one is asked for."""
    return _asked(writer, tokens, rng, SEVERAL)


def multi_value(writer: Writer, tokens: int, rng: random.Random) -> Sample:
    """Several codes of one name, all of which are asked for."""
    name, codes = rng.choice(NAMES), _codes(rng, SEVERAL)
    question = f"What are the {SEVERAL} special codes of the {name}?"
    start = f"The special codes of the {name} are the numbers"
    return writer.write(tokens, MORE, [_fact(name, code) for code in codes], (question, start), codes, rng)


def multi_query(writer: Writer, tokens: int, rng: random.Random) -> Sample:
    """Codes of several names, all of which are asked for."""
    names, codes = rng.sample(NAMES, SEVERAL), _codes(rng, SEVERAL)
    facts = [_fact(name, code) for name, code in zip(names, codes)]
    asked = ", the ".join(names[:-1]) + f" and the {names[-1]}"
    question = f"What are the special codes of the {asked}?", "Their special codes are the numbers"
    return writer.write(tokens, MORE, facts, question, codes, rng)


def _asked(writer: Writer, tokens: int, rng: random.Random, count: int) -> Sample:
    names, codes = rng.sample(NAMES, count), _codes(rng, count)
    facts = [_fact(name, code) for name, code in zip(names, codes)]
    name, code = rng.choice(list(zip(names, codes)))
    question = f"What is the special code of the {name}?", f"The special code of the {name} is"
    return writer.write(tokens, ONE if count == 1 else MORE, facts, question, [code], rng)


def _codes(rng: random.Random, count: int) -> list[str]:
    return [str(code) for code in rng.sample(range(1_000_000, 10_000_000), count)]


def _fact(name: str, code: str) -> str:
    return f"The special code of the {name} is {code}."
