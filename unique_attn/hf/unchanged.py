"""Whether a model is still what a captured step was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unique_attn.hf.hooks import IMPLEMENTATION, attention_modules, hook_of, language_config


class Unchanged:
    """The modules and weights of a model, where the weights are and of which type, and how the model attends.

    Values may change in place; a captured step reads them anew. Anything else would be read from memory that is gone.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._module = attention_modules(model)[0]
        self._config = language_config(model)
        places = [place for each in modules for place in (each._modules, each._parameters, each._buffers) if place]
        self._places = _Contents(places)
        self._empty = [each._parameters for each in modules if not each._parameters]
        self._weights = [
            tensor
            for each in modules
            for tensor in (*each._parameters.values(), *each._buffers.values())
            if tensor is not None
        ]
        self._pointers = [tensor.data_ptr() for tensor in self._weights]
        self._dtypes = [tensor.dtype for tensor in self._weights]
        self._autocast = self._autocast_now()

    def changed(self) -> str | None:
        """What changed, as the end of a message "expected ...", or None. Takes some ten microseconds."""
        if self._config._attn_implementation != IMPLEMENTATION or hook_of(self._module) is None:
            return f"model: expected it to be enabled as {{then}}, got {self._config._attn_implementation!r}"
        if self._autocast_now() != self._autocast:
            return "torch.autocast: expected it as {then}"
        place = self._places.changed()
        if place is not None:
            now, before = place
            name = next((name for name in (*before, *now) if now.get(name) is not before.get(name)), "its order")
            return f"model: expected what it was made of {{then}}, but {name} is another one"
        if any(self._empty):
            return "model: expected what it was made of {then}, but a module has a new parameter"
        if not self.finds_weights() or [tensor.dtype for tensor in self._weights] != self._dtypes:
            return "model: expected its weights where they were {then}, but some were moved or cast"
        return None

    def finds_weights(self) -> bool:
        """Whether the weights that the model had are still in their places."""
        return [tensor.data_ptr() for tensor in self._weights] == self._pointers

    def check(self) -> None:
        """Raise if something changed.

        Raises:
            RuntimeError: what changed, and what to do.
        """
        changed = self.changed()
        if changed is not None:
            raise RuntimeError(changed.format(then="when the GraphedDecoder was made") + ": make a new decoder")

    def _autocast_now(self) -> tuple[bool, torch.dtype | None]:
        device = self._weights[0].device.type if self._weights else "cpu"
        on = torch.is_autocast_enabled(device)
        return on, torch.get_autocast_dtype(device) if on else None


class Behaviour:
    """What the modules of a model are set to: hooks, modes, adapters and other attributes that are no weights.

    A captured step does what they said when it was captured.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        configs = {id(each.config): vars(each.config) for each in modules if _has_config(each)}
        own = [value for each in modules for name, value in vars(each).items() if name not in _OF_ANY_MODULE]
        dicts = [value for value in own if isinstance(value, dict)]
        hooks: list[dict[Any, Any]] = [
            hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)
        ]
        self._contents = _Contents([*map(vars, modules), *configs.values(), *dicts, *(each for each in hooks if each)])
        self._without_hooks = [each for each in hooks if not each]
        self._lists = [(value, list(value)) for value in own if isinstance(value, list)]

    def changed(self) -> bool:
        """Whether something did. Takes a tenth of a millisecond for a few hundred modules."""
        if any(self._without_hooks) or self._contents.changed() is not None:
            return True
        return not all(_equal(now, before) for now, before in self._lists)


def _has_config(module: nn.Module) -> bool:
    return hasattr(vars(module).get("config"), "__dict__")


_OF_ANY_MODULE = frozenset(vars(nn.Module()))


class _Contents:
    """Dictionaries and what they held."""

    def __init__(self, places: Sequence[dict[str, Any]]) -> None:
        self._places = places
        self._names = [list(place) for place in places]
        self._values = self._now()

    def changed(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The first dictionary that does not hold the same any more, as it is and as it was."""
        if _equal(self._now(), self._values):
            return None
        values = iter(self._values)
        for place, names in zip(self._places, self._names):
            before = dict(zip(names, values))
            if not _equal(list(place.values()), list(before.values())):
                return place, before
        return {}, {}

    def _now(self) -> list[Any]:
        return [value for place in self._places for value in place.values()]


def _equal(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the same objects, or equal ones. Objects are compared by identity first."""
    if len(now) != len(before):
        return False
    try:
        return bool(now == before)
    except (RuntimeError, TypeError, ValueError):  # tensors that are others have no one answer
        return False
