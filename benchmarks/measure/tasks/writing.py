"""How a prompt is put together: pieces between lines of a filler, a question at the end, as many tokens as wanted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Question = tuple[str, str]  # what is asked, and the beginning of its answer


@dataclass(frozen=True)
class Sample:
    """A prompt and what its answer should contain.

    Attributes:
        ids: tokens of the prompt, exactly as many as were wanted.
        question: how many of them, at the end, are the question.
        answers: texts that the answer should contain.
    """

    ids: list[int]
    question: int
    answers: tuple[str, ...]

    def score(self, answer: str) -> float:
        """Share of the expected texts that ``answer`` contains, 0 to 1; upper and lower case are the same."""
        found = [each.lower() in answer.lower() for each in self.answers]
        return sum(found) / len(found)


class Writer:
    """Writes prompts with the tokens of one model.

    Args:
        tokenizer: of the model.
        text: the filler, whose lines are taken one after the other from somewhere on.
        chat: write prompts as the tokenizer's chat template does; else as a text that goes on.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, text: str, *, chat: bool = False) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._around = _template(tokenizer) if chat else None
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        self._lines = [self.encode(f"\n{line}") for line in lines]

    def encode(self, words: str) -> list[int]:
        """Tokens of ``words`` alone, without those that the model has at the beginning of a text."""
        found = self._known.get(words)
        if found is None:
            found = self._known[words] = self.tokenizer(words, add_special_tokens=False).input_ids
        return found

    def filler(self, count: int, rng: random.Random) -> list[list[int]]:
        """Lines of the filler, from a random one on, ``count`` tokens in all; of the first line it is the end.

        Raises:
            ValueError: the filler is too short.
        """
        total = sum(map(len, self._lines))
        if count > total:
            raise ValueError(f"filler: expected at least {count} tokens, got {total}")
        at, found, left = rng.randrange(len(self._lines)), [], count
        while left > 0:
            line = self._lines[at % len(self._lines)]
            found.append(line)
            at, left = at + 1, left - len(line)
        return _last(found, count)

    def room(self, tokens: int, head: str, question: Question) -> int:
        """How many of ``tokens`` there are between the head and the question."""
        return tokens - sum(map(len, self._ends(head, question)))

    def _ends(self, head: str, question: Question) -> tuple[list[int], list[int]]:
        """Tokens of the first and of the last part of a prompt."""
        asked, start = question
        if self._around is not None:
            before, after = self._around
            return self.encode(before + head), self.encode(f"\n\nQuestion: {asked}{after}{start}")
        first: list[int] = self.tokenizer(head).input_ids
        return first, self.encode(f"\n\nQuestion: {asked}\nAnswer: {start}".rstrip())

    def write(
        self,
        tokens: int,
        head: str,
        pieces: Sequence[str | list[int]],
        question: Question,
        answers: Sequence[str],
        rng: random.Random,
    ) -> Sample:
        """A prompt of ``tokens`` tokens: the head, the pieces in their order between lines of the filler, the question.

        Args:
            tokens: how many in all.
            head: what stands first.
            pieces: each becomes a line of its own, at a random place; or tokens.
            question: what stands last, with the beginning of its answer: the model goes on from there.
            answers: what its answer should contain.
            rng: decides which lines and which places.

        Raises:
            ValueError: there is no room for that, or the filler is too short.
        """
        first, last = self._ends(head, question)
        parts = [self.encode(f"\n{piece}") if isinstance(piece, str) else piece for piece in pieces]
        room = tokens - len(first) - len(last) - sum(map(len, parts))
        if room < 0:
            raise ValueError(f"tokens: expected at least {tokens - room} for this task, got {tokens}")
        lines = self.filler(room, rng)
        places = sorted(rng.randrange(len(lines) + 1) for _ in parts)
        ids = list(first)
        for number, line in enumerate([*lines, []]):
            while places and places[0] == number:
                places.pop(0)
                ids += parts.pop(0)
            ids += line
        return Sample([*ids, *last], len(last), tuple(answers))


def _template(tokenizer: Any) -> tuple[str, str]:
    """What a chat template puts before a message of a user, and behind it where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"chat: expected a tokenizer with a chat template, got {type(tokenizer).__name__} without one")
    mark = "What is asked."
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = text.partition(mark)
    return before, after


def _last(lines: list[list[int]], count: int) -> list[list[int]]:
    """The last ``count`` tokens of ``lines``, as lines."""
    found: list[list[int]] = []
    for line in reversed(lines):
        part = line[max(0, len(line) - count) :]
        count -= len(part)
        if part:
            found.insert(0, part)
    return found
