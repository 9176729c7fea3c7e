"""Whether a model is still what a captured step was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unique_attn.hf.hooks import IMPLEMENTATION, attention_modules, hook_of, language_config


class Unchanged:
    """The modules and weights of a model, where the weights are and of which type, and how the model attends.

    Values may change in place; a captured step reads them anew. Anything else would be read from memory that is gone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._module = attention_modules(model)[0]
        self._config = language_config(model)
        self._places: list[tuple[dict[str, Any], str, Any]] = []  # of modules, parameters and buffers
        self._weights: list[tuple[torch.Tensor, int, torch.dtype]] = []
        for module in model.modules():
            for place in (module._modules, module._parameters, module._buffers):
                self._places += [(place, name, each) for name, each in place.items()]
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._weights.append((tensor, tensor.data_ptr(), tensor.dtype))
        self._autocast = self._autocast_now()

    def check(self) -> None:
        """Raise if something changed. Takes a tenth of a millisecond for a few hundred weights.

        Raises:
            RuntimeError: what changed, and what to do.
        """
        if self._config._attn_implementation != IMPLEMENTATION or hook_of(self._module) is None:
            got = self._config._attn_implementation
            raise RuntimeError(f"model: expected it to be enabled as when the GraphedDecoder was made, got {got!r}")
        if self._autocast_now() != self._autocast:
            raise RuntimeError("torch.autocast: expected it as when the GraphedDecoder was made: make a new one")
        for place, name, each in self._places:
            if place.get(name) is not each:
                raise RuntimeError(
                    f"model: expected what it was made of when the GraphedDecoder was made, but {name} is another one: "
                    "make a new decoder"
                )
        for tensor, pointer, dtype in self._weights:
            if tensor.data_ptr() != pointer or tensor.dtype != dtype:
                raise RuntimeError(
                    "model: expected its weights where they were when the GraphedDecoder was made, but one of shape "
                    f"{list(tensor.shape)} was moved or cast: make a new decoder"
                )

    def _autocast_now(self) -> tuple[bool, torch.dtype | None]:
        device = self._weights[0][0].device.type if self._weights else "cpu"
        on = torch.is_autocast_enabled(device)
        return on, torch.get_autocast_dtype(device) if on else None
