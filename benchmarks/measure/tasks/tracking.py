"""Assignments hidden in a text: which variables have a value, over several steps."""

from __future__ import annotations

import random
import string
from itertools import pairwise

from benchmarks.measure.tasks.writing import Sample, Writer

HOPS = 4  # assignments of a variable to the next one
HEAD = (
    "Assignments of variables are hidden in the following text. Remember them. If VAR AB = 12 and VAR CD = VAR AB, "
    "then the variables with the value 12 are AB, CD.\n"
)


def chain(writer: Writer, tokens: int, rng: random.Random) -> Sample:
    """A value that goes through a chain of variables, in the order of the text; all of them are asked for."""
    names: set[str] = set()
    while len(names) <= HOPS:
        names.add("".join(rng.choices(string.ascii_uppercase, k=3)))
    order, value = sorted(names), rng.randrange(10_000, 100_000)
    rng.shuffle(order)
    steps = [f"VAR {order[0]} = {value}"] + [f"VAR {new} = VAR {old}" for old, new in pairwise(order)]
    question = f"Which {len(order)} variables have the value {value}?", "The variables are VAR"
    return writer.write(tokens, HEAD, steps, question, order, rng)
