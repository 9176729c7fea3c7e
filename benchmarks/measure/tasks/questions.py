"""A question about one of several paragraphs of invented facts."""

from __future__ import annotations

import random

from benchmarks.measure.tasks.paragraphs import PARAGRAPHS
from benchmarks.measure.tasks.writing import Sample, Writer

HEAD = "Some paragraphs about places and people are hidden in the following text. Answer the question at its end.\n"
TOKENS_EACH = 300  # of the prompt, for each paragraph


def qa(writer: Writer, tokens: int, rng: random.Random) -> Sample:
    """The paragraph with the answer and others, as many as have room: a fourth of the prompt or so, at most all."""
    count = max(2, min(len(PARAGRAPHS), tokens // TOKENS_EACH))
    shown = rng.sample(PARAGRAPHS, count)
    question, answer = rng.choice(shown[0][1])
    pieces = [text for text, _ in shown]
    rng.shuffle(pieces)
    return writer.write(tokens, HEAD, pieces, (question, ""), [answer], rng)
