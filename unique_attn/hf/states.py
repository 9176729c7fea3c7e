"""Layers of a cache with recurrent or convolutional states, which transformers updates in place."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import Tensor

from unique_attn.hf.compat import DummyLayer, LinearAttentionLayer


def has_states(layer: Any) -> bool:
    """Whether ``layer`` is a stock layer with states alone, or without any, that a captured step can use."""
    if DummyLayer is not None and type(layer) is DummyLayer:
        return True
    return LinearAttentionLayer is not None and type(layer) is LinearAttentionLayer and not layer.record_past


def states_of(layer: Any) -> dict[tuple[str, int], Tensor]:
    """The states of a layer by where they are in it."""
    found = {}
    for name in ("conv_states", "recurrent_states"):
        found.update({(name, i): x for i, x in getattr(layer, name, {}).items() if x is not None})
    return found


class StaticStates:
    """States in a fixed place, for a captured step, and the layer of a cache whose states they are at the moment.

    Attributes:
        layer: a layer as that of the cache, for the model to update in the step.
    """

    def __init__(self, stock: Any, states: dict[tuple[str, int], Tensor]) -> None:
        self.layer = copy.copy(stock)
        for name, value in vars(stock).items():
            if isinstance(value, dict):
                setattr(self.layer, name, dict(value))
        self._begin = states
        self._owner: weakref.ref[Any] = weakref.ref(stock)  # of nothing yet: see take()
        for (name, i), state in states.items():
            getattr(self.layer, name)[i] = state.clone()
        self._states = states_of(self.layer)

    def rewind(self) -> None:
        """Go back to the states that the step began with, which are kept until :meth:`take`."""
        for place, state in self._begin.items():
            self._states[place].copy_(state)

    def is_of(self, stock: Any) -> bool:
        """Whether the states of a layer are in this place."""
        return all(getattr(stock, name)[i] is state for (name, i), state in self._states.items())

    def take(self, stock: Any) -> bool:
        """Move the states of a layer here; those that were here move out. False if they are others than expected."""
        now = states_of(stock)
        if {place: (x.shape, x.dtype, x.device) for place, x in now.items()} != {
            place: (x.shape, x.dtype, x.device) for place, x in self._states.items()
        }:
            return False
        self._begin = {}
        owner = self._owner()
        if owner is not None and owner is not stock:
            for (name, i), state in self._states.items():
                if getattr(owner, name)[i] is state:
                    getattr(owner, name)[i] = state.clone()
        for (name, i), state in self._states.items():
            if now[name, i] is not state:
                state.copy_(now[name, i])
                getattr(stock, name)[i] = state
        self._owner = weakref.ref(stock)
        return True
