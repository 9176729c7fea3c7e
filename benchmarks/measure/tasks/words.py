"""Lists of words in which some come more often than the others, and are asked for."""

from __future__ import annotations

import random
import re
from functools import lru_cache

from benchmarks.measure.tasks.writing import Sample, Writer

COMMON, OFTEN, SELDOM = 10, 30, 3  # words that are asked for; how often they and the others come
FREQUENT, ALPHA = 3, 2.0  # words that are asked for; how fast the frequency falls with the rank
SYLLABLES = ("ba", "du", "fe", "go", "ki", "lo", "mu", "ni", "po", "ra", "se", "ti", "vo", "wa", "xe", "zu")
COMMON_HEAD = "Below is a numbered list of words, in which some come much more often than the others. Memorize them.\n"
FREQUENT_HEAD = "Below is a text in an unknown language. Count how often each of its words comes; dots do not count.\n"


def common(writer: Writer, tokens: int, rng: random.Random) -> Sample:
    """A numbered list of English words, ten of which come ten times as often as all others."""
    question = (
        f"What are the {COMMON} most common words in the list?",
        f"The {COMMON} most common words in the list are",
    )
    words = list(_vocabulary(writer.text))
    rng.shuffle(words)
    often, others = words[:COMMON], words[COMMON:]
    room = writer.room(tokens, COMMON_HEAD, question)
    number = [len(writer.encode(f"\n{10**digits}.")) for digits in range(6)]
    cost = {word: len(writer.encode(f" {word}")) for word in often}
    every = sum(number[3] + cost[word] for word in often)
    repeats = max(2, min(OFTEN, room // 2 // every))
    seldom = max(1, repeats * SELDOM // OFTEN)
    entries = [word for word in often for _ in range(repeats)]
    left = room - repeats * sum(cost.values()) - sum(number[len(str(i + 1)) - 1] for i in range(len(entries)))
    for word in others:
        places = range(len(entries) + 1, len(entries) + 1 + seldom)
        left -= seldom * len(writer.encode(f" {word}")) + sum(number[len(str(i)) - 1] for i in places)
        if left < 0:
            break
        entries += [word] * seldom
    rng.shuffle(entries)
    numbered = ((f"\n{i + 1}.", f" {word}") for i, word in enumerate(entries))
    text = [token for entry in numbered for part in entry for token in writer.encode(part)]
    return writer.write(tokens, COMMON_HEAD, [text], question, often, rng)


def frequent(writer: Writer, tokens: int, rng: random.Random) -> Sample:
    """Made-up words whose frequencies fall with the square of the rank; the first rank is dots, which do not count."""
    question = (
        f"What are the {FREQUENT} most frequent words in the text?",
        f"The {FREQUENT} most frequent words in the text are",
    )
    room = writer.room(tokens, FREQUENT_HEAD, question)
    words: dict[str, None] = {}
    while len(words) < room // 30:
        words["".join(rng.choices(SYLLABLES, k=3))] = None
    ranks = ["...", *words]
    pieces = {word: writer.encode(f" {word}") for word in ranks}
    shares = [(rank + 1) ** -ALPHA for rank in range(len(ranks))]
    each = sum(share * len(pieces[word]) for share, word in zip(shares, ranks))
    counts = [max(1, int(room * share / each)) for share in shares]
    entries = [word for word, count in zip(ranks, counts) for _ in range(count)]
    rng.shuffle(entries)
    text: list[int] = []
    for word in entries:
        if len(text) + len(pieces[word]) <= room:
            text += pieces[word]
    text += pieces[ranks[0]] * ((room - len(text)) // len(pieces[ranks[0]]))
    return writer.write(tokens, FREQUENT_HEAD, [text], question, ranks[1 : FREQUENT + 1], rng)


@lru_cache(maxsize=1)
def _vocabulary(text: str) -> tuple[str, ...]:
    """Words of a text that are neither short nor long, each once."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,10}\b", text))))
