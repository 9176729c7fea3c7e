"""Tasks over long prompts, after the families of RULER (arXiv 2404.06654), written for this project.

A task makes samples: prompts of exactly as many tokens as wanted, in which what is asked for at the end is between
lines of Python's own documentation, which every machine has. Their last words are the beginning of the answer, so that
a model without a chat template goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.measure.tasks import needles, questions, tracking, words
from benchmarks.measure.tasks.writing import Sample, Writer

__all__ = ["TASKS", "Sample", "Task", "Writer", "samples"]


@dataclass(frozen=True)
class Task:
    """A kind of prompts.

    Attributes:
        title: for tables.
        make: a sample of so many tokens.
        new_tokens: most tokens of an answer.
    """

    title: str
    make: Callable[[Writer, int, random.Random], Sample]
    new_tokens: int


TASKS = {
    "single": Task("needle", needles.single, 16),
    "multi_key": Task("needle, 4 keys", needles.multi_key, 16),
    "multi_value": Task("needle, 4 values", needles.multi_value, 56),
    "multi_query": Task("needle, 4 queries", needles.multi_query, 56),
    "tracking": Task("variables", tracking.chain, 32),
    "common": Task("common words", words.common, 48),
    "frequent": Task("frequent words", words.frequent, 32),
    "qa": Task("questions", questions.qa, 24),
}


def samples(name: str, writer: Writer, length: int, seed: int, count: int) -> list[Sample]:
    """Samples of a task whose prompts and answers together have ``length`` tokens at most.

    The same ``seed`` gives the same samples, with the same tokenizer and filler.

    Raises:
        ValueError: the length is too short for the task, or the filler for the length.
    """
    task = TASKS[name]
    return [
        task.make(writer, length - task.new_tokens, random.Random(f"{name}, {length}, {seed}, {i}"))
        for i in range(count)
    ]
