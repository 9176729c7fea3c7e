"""Documents for two tasks of lm-eval: a code in Python's own documentation, asked for at the end. Needs no network.

lm-eval calls :func:`dataset`, which the YAML files beside this one name.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pydoc_data import topics
from typing import Any

CHARACTERS = 6000  # of a document; about 1,500 tokens
PLACES = ("archive", "brewery", "harbour", "library", "museum", "observatory", "station", "theatre")


def documents(count: int, characters: int) -> Iterator[dict[str, str]]:
    """``document``, ``place`` and ``code`` of each sample; the code is at evenly spread depths.

    Raises:
        ValueError: the documentation is shorter than a document.
    """
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    if characters > len(text):
        raise ValueError(f"characters: expected at most {len(text)}, got {characters}")
    for number in range(count):
        rng = random.Random(number)
        place, code = rng.choice(PLACES), str(rng.randrange(100_000, 1_000_000))
        begin = rng.randrange(len(text) - characters + 1)
        lines = text[begin : begin + characters].split("\n")
        lines.insert(round((number + 0.5) / count * len(lines)), f"The code of the {place} is {code}.")
        yield {"document": "\n".join(lines), "place": place, "code": code}


def dataset(count: int = 16, characters: int = CHARACTERS, **_: Any) -> dict[str, Any]:
    """The only split, for ``custom_dataset``; ``--metadata count=4 characters=20000`` of lm-eval changes it."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(documents(count, characters)))}
