"""Static caches of transformers: which of their layers have pages, and when these turn to them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from unique_attn.config import UniqueConfig
from unique_attn.hf.cache_state import CacheState
from unique_attn.hf.compat import StaticCache, StockStaticLayer
from unique_attn.hf.handover import Refusal
from unique_attn.hf.reasons import module_reason
from unique_attn.hf.static_layer import ATTRIBUTE, LISTED, UniqueStaticLayer

_WHOSE = Refusal("no single attention module has the index of this layer of the cache", lasting=True)


def adopt_static(cache: Any, config: UniqueConfig) -> None:
    """Give a plain ``StaticCache`` layers with pages, in place of its full-attention layers.

    Does nothing to one whose layers are on the host in turn, and before transformers 5, which counts tokens elsewhere.
    """
    if type(cache) is not StaticCache or cache.offloading:
        return
    if any(type(layer) is UniqueStaticLayer for layer in cache.layers):
        return
    state = vars(cache)[ATTRIBUTE] = CacheState(config)
    cache.layers = [
        UniqueStaticLayer(layer, state)
        if type(layer) is StockStaticLayer and isinstance(getattr(layer, "cumulative_length", None), Tensor)
        else layer
        for layer in cache.layers
    ]


def may_turn(cache: Any) -> bool:
    """Whether some layer of ``cache`` may turn to pages after a call."""
    if type(cache) is not StaticCache or ATTRIBUTE not in vars(cache):
        return False
    return any(type(layer) is UniqueStaticLayer and layer.may_turn() for layer in cache.layers)


def turn_static(cache: Any, modules: Sequence[nn.Module], mask: Any) -> None:
    """Turn the layers of a static cache to pages that are not empty.

    Args:
        cache: any cache.
        modules: the attention modules of the model.
        mask: the attention mask of a call that is about to begin or has ended.
    """
    for idx, layer in enumerate(cache.layers):
        if type(layer) is not UniqueStaticLayer or not layer.may_turn():
            continue
        if layer.user is None and not any(each.layer_idx == idx for each in modules):
            continue  # of another part of the model
        refusal = layer.no_pages() or _no_user(layer, [each for each in modules if each.layer_idx == idx])
        if refusal is not None:
            layer.stay_dense(refusal)
        else:
            length = layer.length()
            padding = layer.state.padding_of_call(mask, layer.batch_size, length, layer)
            if padding is None:
                layer.refuse_masks()
            elif max(padding) < length:  # else a row has no token yet
                layer.turn(padding, length)


def _no_user(layer: UniqueStaticLayer, modules: Sequence[nn.Module]) -> Refusal | None:
    """Find the module whose keys are in a layer; or why none can use pages."""
    if layer.user is not None:
        return None
    if len(modules) != 1:
        return _WHOSE
    (module,) = modules
    if module.layer_idx in layer.config.dense_layers:
        return LISTED
    reason = module_reason(module)
    if reason is None:
        layer.user = weakref.ref(module)
    return reason
