"""Whether a model is still what a captured step was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unique_attn.hf.hooks import IMPLEMENTATION, attention_modules, hook_of, language_config


class Unchanged:
    """The weights of a model, where they are and of which type, and how it attends.

    Values may change in place; a captured step reads them anew. Anything else would be read from memory that is gone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._module = attention_modules(model)[0]
        self._config = language_config(model)
        self._weights = _weights(model)
        self._facts = [_facts(each) for each in self._weights]
        self._autocast = self._autocast_now()

    def check(self, *, thoroughly: bool = False) -> None:
        """Raise if something changed; ``thoroughly``: also look for weights that were replaced by others.

        Raises:
            RuntimeError: what changed, and what to do.
        """
        if self._config._attn_implementation != IMPLEMENTATION or hook_of(self._module) is None:
            got = self._config._attn_implementation
            raise RuntimeError(f"model: expected it to be enabled as when the GraphedDecoder was made, got {got!r}")
        if self._autocast_now() != self._autocast:
            raise RuntimeError("torch.autocast: expected it as when the GraphedDecoder was made: make a new one")
        weights = _weights(self._model) if thoroughly else self._weights
        if len(weights) != len(self._weights) or any(a is not b for a, b in zip(weights, self._weights)):
            raise RuntimeError("model: expected the weights with which the GraphedDecoder was made, got others")
        for weight, facts in zip(self._weights, self._facts):
            if _facts(weight) != facts:
                raise RuntimeError(
                    "model: expected its weights where they were when the GraphedDecoder was made, but one of shape "
                    f"{list(weight.shape)} was moved or cast: make a new decoder"
                )

    def _autocast_now(self) -> tuple[bool, torch.dtype | None]:
        device = self._weights[0].device.type if self._weights else "cpu"
        on = torch.is_autocast_enabled(device)
        return on, torch.get_autocast_dtype(device) if on else None


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype
