"""Training sequences: prose with facts in it and questions about some of them at the end, and what is held out."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.support import DOCUMENT

Tokens = list[int]

HELD_OUT = 0.1  # share of every document that is never trained on
TOKENS_PER_FACT, TOKENS_PER_QUESTION = 64, 256
PLACES = ["archive", "library", "harbour", "museum", "station", "observatory", "theatre", "brewery"]
CITIES = [
    "Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Tokyo", "Dublin", "Prague", "Athens", "Warsaw", "Madrid",
    "Nairobi", "Quito", "Havana", "Seoul", "Delhi", "Tunis", "Riga", "Sofia", "Bern", "Ankara", "Manila", "Dakar",
    "Accra", "Boston", "Geneva", "Naples", "Porto", "Leeds", "Bergen", "Kyoto", "Jaipur", "Cusco", "Basel",
    "Bruges", "Ghent", "Malmo", "Turin", "Verona", "Zagreb", "Tallinn", "Odessa", "Baku", "Hanoi", "Perth",
    "Denver", "Austin", "Quebec", "Calgary", "Toledo",
]  # fmt: skip
HELD_OUT_CITIES = CITIES[-10:]  # asked about in the evaluation alone


# ---- Prose. ----


def offline_documents() -> list[str]:
    """English text that every Python installation has: the language reference of ``help()``, the long docstrings of the
    standard library, and the lighthouse of the demo. No paragraph comes twice."""
    found = [DOCUMENT.read_text("utf-8")]
    try:
        from pydoc_data import topics

        found += [topics.topics[name] for name in sorted(topics.topics)]
    except ImportError:  # some distributions leave it out
        pass
    found += _docstrings(Path(sysconfig.get_path("stdlib")))
    seen: set[str] = set()
    unique = []
    for text in found:
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
        fresh = [part for part in dict.fromkeys(paragraphs) if part not in seen]
        seen.update(fresh)
        unique.append("\n\n".join(fresh))
    return [text for text in unique if len(text) > 400]


def _docstrings(folder: Path) -> Iterator[str]:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
    for file in sorted(folder.rglob("*.py")):
        if skipped.isdisjoint(file.relative_to(folder).parts):
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node)
                    if text and len(text) > 400:
                        yield text


def read_documents(files: Sequence[str | Path]) -> list[str]:
    """The text of every file.

    Raises:
        ValueError: a file is missing, empty or no UTF-8 text; the message names it.
    """
    documents = []
    for file in files:
        try:
            text = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise ValueError(f"--text: cannot read {str(file)!r}: {reason}") from error
        if not text.strip():
            raise ValueError(f"--text: expected text, got the empty file {str(file)!r}")
        documents.append(text)
    return documents


def tokenize(tokenizer: Any, documents: Sequence[str]) -> tuple[list[Tokens], list[Tokens]]:
    """Sentences as tokens, in the order of the text: those to train on, and the last tenth of all, which is held out.

    Documents are shuffled (always in the same way) so that the held-out part is not all of one kind; of a single
    document it is the end.
    """
    order = list(documents)
    random.Random(0).shuffle(order)
    text = "\n\n".join(order)
    pieces = re.findall(r"\s*\S.*?(?:[.!?](?=\s)|(?=\n\s*\n)|\Z)", text, re.DOTALL)
    sentences: list[Tokens] = tokenizer(pieces, add_special_tokens=False).input_ids
    allowed = (1 - HELD_OUT) * sum(map(len, sentences))
    count, total = 0, 0
    while total + len(sentences[count]) <= allowed:
        total += len(sentences[count])
        count += 1
    return sentences[:count], sentences[count:]


# ---- Facts and questions. ----


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        ids: tokens.
        weights: of each token in the training loss. 0 for the digits of a fact, which nobody can foresee.
        question: index of the last question's first token.
        answer: index of its answer's first token.
    """

    ids: Tokens
    weights: list[float]
    question: int
    answer: int


def prose_window(sentences: Sequence[Tokens], start: int, length: int) -> list[Tokens]:
    """``length`` tokens from sentence ``start`` on, going on at the beginning after the end."""
    window: list[Tokens] = []
    room = length
    while room > 0:
        window.append(list(sentences[start % len(sentences)][:room]))
        room -= len(window[-1])
        start += 1
    return window


def fact_count(length: int, cities: Sequence[str]) -> int:
    """Facts in a sequence of ``length`` tokens: one in 64 tokens, as far as there are places to tell of."""
    return min(max(2, length // TOKENS_PER_FACT), len(cities) * len(PLACES))


def sample(
    tokenizer: Any,
    sentences: Sequence[Tokens],
    rng: random.Random,
    length: int,
    *,
    cities: Sequence[str],
    facts: int,
    questions: int,
    answer_weight: float = 1.0,
) -> Sample:
    """Prose with ``facts`` at random places and ``questions`` about some of them at the end: ``length`` tokens in all.

    Raises:
        ValueError: facts and questions do not fit into ``length`` tokens.
    """

    def encode(text: str) -> Tokens:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    keys = rng.sample([(city, place) for city in cities for place in PLACES], facts)
    told: list[tuple[Tokens, list[float]]] = []
    asked: list[tuple[Tokens, Tokens]] = []
    for i, (city, place) in enumerate(keys):
        digits = encode(f" {rng.randrange(10000, 100000)}")
        begin, end = encode(f" The code of the {city} {place} is"), encode(".")
        told.append((begin + digits + end, [1.0] * len(begin) + [0.0] * len(digits) + [1.0] * len(end)))
        if i < questions:
            question = f"\nQuestion: What is the code of the {city} {place}?\nAnswer: The code of the {city} {place} is"
            asked.append((encode(question), digits))
    room = length - sum(len(text) for text, _ in told) - sum(len(q) + len(a) for q, a in asked)
    if room < 0:
        raise ValueError(f"{facts} facts and {questions} questions take {length - room} tokens, more than {length}")
    parts = [(text, [1.0] * len(text)) for text in prose_window(sentences, rng.randrange(len(sentences)), room)]
    for fact in told:
        parts.insert(rng.randrange(len(parts) + 1), fact)
    ids = [token for text, _ in parts for token in text]
    weights = [weight for _, each in parts for weight in each]
    asked_at = answer_at = len(ids)
    for text, digits in asked:
        asked_at, answer_at = len(ids), len(ids) + len(text)
        ids += text + digits
        weights += [1.0] * len(text) + [answer_weight] * len(digits)
    return Sample(ids, weights, asked_at, answer_at)


def training_data(
    tokenizer: Any, sentences: Sequence[Tokens], *, count: int, length: int, seed: int, share: float, weight: float
) -> list[dict[str, Tensor]]:
    """``count`` sequences; ``share`` of them with facts and questions, whose answers weigh ``weight`` a token."""
    rng = random.Random(seed)
    cities = CITIES[: -len(HELD_OUT_CITIES)]
    facts, questions = fact_count(length, cities), max(1, length // TOKENS_PER_QUESTION)
    data = []
    for _ in range(count):
        many = (facts, questions) if rng.random() < share else (0, 0)
        each = sample(
            tokenizer, sentences, rng, length, cities=cities, facts=many[0], questions=many[1], answer_weight=weight
        )
        data.append({"input_ids": torch.tensor(each.ids), "weights": torch.tensor(each.weights)})
    return data
