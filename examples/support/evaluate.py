"""Measure a causal language model through its real decode path: prefill once, fork the cache, decode token by token.

Nothing here knows how attention is computed; :func:`unique_attn.enable` and :func:`unique_attn.disable` decide that.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoded:
    """Tokens decoded one at a time.

    Attributes:
        tokens: int64 ``[n]``: given (teacher forcing) or generated.
        nll: negative log-likelihood of each token, fp32 ``[n]``; None if they were generated.
        seconds: of each step.
    """

    tokens: Tensor
    nll: Tensor | None
    seconds: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        if self.nll is None:
            raise ValueError("perplexity: expected tokens that were given, got generated ones")
        return math.exp(self.nll.double().mean().item())

    @property
    def tokens_per_second(self) -> float:
        """By the median step, so that the first one, which sets things up, does not count."""
        return 1 / statistics.median(self.seconds) if self.seconds else math.nan


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def prefill(
    model: Any, ids: Tensor, cache: Any = None, *, chunk: int = 1024, progress: Callable[[int], object] | None = None
) -> Any:
    """Feed ``ids`` ``[1, n]`` in chunks and return the cache.

    Args:
        model: a transformers causal language model.
        ids: what comes after the tokens in ``cache``.
        cache: continued in place; a new ``DynamicCache`` if None.
        chunk: tokens per forward pass.
        progress: called with the number of tokens after each chunk.
    """
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if progress is not None:
            progress(part.shape[1])
    return cache


@torch.inference_mode()
def teacher_forced(
    model: Any, ids: Tensor, cache: Any, *, progress: Callable[[int], object] | None = None
) -> tuple[Decoded, Tensor]:
    """Decode the given tokens one at a time on a copy of ``cache``.

    Args:
        model: a transformers causal language model.
        ids: ``[1, n + 1]``; each of the first n is a step, which is scored on the token after it.
        cache: holds everything before ``ids``; left as it is.

    Returns:
        The last n tokens with their likelihoods, and the logits ``[n, vocabulary]`` in fp32 on the CPU.
    """
    cache = copy.deepcopy(cache)
    logits, seconds = [], []
    for i in range(ids.shape[1] - 1):
        start = _clock(ids.device)
        step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1]
        seconds.append(_clock(ids.device) - start)
        logits.append(step.float().cpu())
        if progress is not None:
            progress(1)
    table = torch.stack(logits)
    targets = ids[0, 1:].cpu()
    nll = torch.nn.functional.cross_entropy(table, targets, reduction="none")
    return Decoded(targets, nll, tuple(seconds)), table


class _Stopwatch:
    """A streamer: the time at which ``generate`` hands over the prompt and each new token."""

    def __init__(self, device: torch.device, progress: Callable[[int], object] | None) -> None:
        self.device, self.progress = device, progress
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(_clock(self.device))
        if self.progress is not None and len(self.times) > 1:
            self.progress(1)

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate(
    model: Any, ids: Tensor, cache: Any, *, max_new_tokens: int, progress: Callable[[int], object] | None = None
) -> Decoded:
    """Greedy ``model.generate`` on a copy of ``cache``, which holds all of ``ids`` ``[1, n]`` but the last token."""
    watch = _Stopwatch(ids.device, progress)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=copy.deepcopy(cache),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=watch,
    )
    steps = tuple(b - a for a, b in zip(watch.times, watch.times[1:]))
    return Decoded(out[0, ids.shape[1] :].cpu(), None, steps)
