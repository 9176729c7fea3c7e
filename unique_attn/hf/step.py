"""One decode step of a model over static buffers: on CUDA captured once in a graph and replayed, else run as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unique_attn.hf.compat import cache_argument
from unique_attn.hf.graph import CannotCaptureError, beside, record
from unique_attn.hf.reasons import UnsupportedFeatureError

Sampler = Callable[[Tensor], Tensor]


def greedy(logits: Tensor) -> Tensor:
    """The most probable token ``[B]`` of logits ``[B, vocabulary]``."""
    return logits.argmax(-1)


def sampler(temperature: float = 1.0, top_k: int = 0) -> Sampler:
    """A sampler that draws from ``softmax(logits / temperature)``, of the ``top_k`` largest logits if that is not 0.

    Draws from torch's generator of the device (``torch.manual_seed``), also when it is replayed in a CUDA graph.

    Raises:
        ValueError: ``temperature`` is not positive or ``top_k`` negative.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: expected at least 0, got {top_k}")

    def sample(logits: Tensor) -> Tensor:
        logits = logits.float() / temperature
        if top_k:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        # The largest of p / Exp(1) is a draw from p.
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)

    return sample


class StepCache(Protocol):
    """What a step needs of a cache beside what the model does with it: lengths that live on the device."""

    def advance(self) -> Tensor:
        """Count one more token in every row; returns the positions of these tokens, int64 ``[B, 1]``."""

    def counters(self) -> Sequence[Tensor]:
        """Every tensor in which a step counts: with their old values the step can be repeated."""


class GraphedStep:
    """Embedding, all layers, logits and sampling for one token of every row, without work for the host in between.

    Nothing of a step depends on the host, so one graph serves every length that the cache can hold.

    Args:
        model: a causal language model in eval mode, whose attention writes to and reads from ``cache``.
        cache: what the model gets as its cache.
        batch: rows.
        sample: next tokens ``[B]`` from logits ``[B, vocabulary]``. On CUDA it is captured too.
    """

    def __init__(self, model: nn.Module, cache: StepCache, batch: int, sample: Sampler = greedy) -> None:
        self.model, self.cache, self.sample = model, cache, sample
        self._cache_argument = cache_argument(model) or "past_key_values"
        self.device = next(model.parameters()).device
        with torch.inference_mode(False):  # a decoder may outlive the inference mode it began in
            self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.device)  # the last token of each row
        self.logits: Tensor | None = None  # [B, vocabulary] of the last step
        self._graph: Any = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    @torch.no_grad()
    def run(self) -> None:
        """One step: takes ``tokens``, leaves the next ones there and their logits in ``logits``."""
        if self._graph is None:
            self._step()
        else:
            with torch.cuda.device(self.device):
                self._graph.replay()

    def keep(self, logits: Tensor) -> None:
        """Copy logits ``[B, vocabulary]`` into the place where steps leave theirs."""
        if self.logits is None:
            with torch.inference_mode(False):
                self.logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        self.logits.copy_(logits)

    @torch.no_grad()
    def capture(self) -> None:
        """Capture the step in a CUDA graph; does nothing on another device or the second time.

        Runs it twice before. That counts nothing, and what it writes behind the last token the first step writes again.

        Raises:
            UnsupportedFeatureError: a graph cannot hold the step.
        """
        if self.device.type != "cuda" or self.captured:
            return
        changed = [self.tokens, *self.cache.counters()]
        before = [each.clone() for each in changed]
        logits = None if self.logits is None else self.logits.clone()
        try:
            with beside(self.device):
                for _ in range(2):  # what libraries set up in their first calls
                    self._step()
                    restore(changed, before)
                self._graph, _ = record(self._step)
        except CannotCaptureError as error:
            raise _cannot_capture(self.model, error) from error
        restore(changed, before)
        if logits is not None:
            self.keep(logits)

    def _step(self) -> None:
        positions = self.cache.advance()
        cache = {self._cache_argument: self.cache}
        logits = self.model(self.tokens, position_ids=positions, use_cache=True, **cache).logits
        self.keep(logits[:, -1])
        assert self.logits is not None
        self.tokens.copy_(self.sample(self.logits)[:, None])


def _cannot_capture(model: nn.Module, error: CannotCaptureError) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"GraphedDecoder: model: expected a step that a CUDA graph can hold, but one of {type(model).__name__} waits "
        f"for the device or copies from the host: {error} For a mixture of experts try "
        "model.set_experts_implementation('batched_mm')"
    )


def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy ``values`` into ``tensors``."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
