"""Caches of transformers whose layers can turn to pages."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from unique_attn.config import UniqueConfig
from unique_attn.hf.cache_state import CacheState
from unique_attn.hf.compat import DynamicCache, DynamicLayer
from unique_attn.hf.layer import UniqueLayer


class UniqueCache(DynamicCache):
    """A transformers cache whose full-attention layers can turn to pages.

    ``model.generate()`` needs none: the cache it makes gets the same layers. Pass one to share it between calls, to
    fork it, or to give a cache settings of its own.

    Threads: each thread needs a cache of its own. Forks of one cache are caches of their own, also while they share
    blocks: every use of shared blocks is under a lock. A fork taken while another thread decodes with the cache itself
    may hold layers of different lengths, and says so by :class:`~unique_attn.paging.OutOfStepError` when it is used.

    Args:
        config: settings; the defaults if None. They win over those of ``unique_attn.enable``.
        model_config: the model's ``config``. With it, sliding-window layers keep only their window.

    Raises:
        TypeError: ``config`` is no :class:`UniqueConfig`.
    """

    def __init__(self, config: UniqueConfig | None = None, model_config: Any = None) -> None:
        if config is not None and not isinstance(config, UniqueConfig):
            raise TypeError(f"config: expected a UniqueConfig or None, got {type(config).__name__}")
        if model_config is not None and not hasattr(model_config, "get_text_config"):
            raise TypeError(f"model_config: expected a transformers config or None, got {type(model_config).__name__}")
        super().__init__(config=model_config)
        _turn(self, CacheState(UniqueConfig() if config is None else config))

    @property
    def unique_config(self) -> UniqueConfig:
        """The settings of this cache."""
        return config_of(self)

    def fork(self) -> UniqueCache:
        """A copy that continues on its own. Blocks of pages are shared until one of the two writes to them.

        ``copy.deepcopy`` does the same, for this and for any cache that hooks have adopted.
        """
        return copy.deepcopy(self)


def adopt(cache: Any, config: UniqueConfig, *, empty: bool = True, plain_prompts: bool = False) -> None:
    """Give a plain ``DynamicCache`` layers that can turn to pages, in place of its full-attention layers.

    The cache object itself stays, because ``generate`` holds on to it. Does nothing to caches of other kinds.

    Args:
        cache: any transformers cache.
        config: settings, for a cache that has none of its own.
        empty: also if nothing is in the cache yet.
        plain_prompts: what a prompt attends to is stock's, by the settings and by the model.
    """
    if type(cache) not in (DynamicCache, UniqueCache) or cache.offloading:
        return
    if _STATE not in vars(cache) and (empty or cache.get_seq_length() > 0):
        _turn(cache, CacheState(config, plain_prompts=plain_prompts))
    state: CacheState | None = vars(cache).get(_STATE)
    if state is not None:
        state.met = True


def state_of(cache: Any) -> CacheState | None:
    """What the layers of a cache share, if they are ours."""
    return vars(cache).get(_STATE) if type(cache) in (DynamicCache, UniqueCache) else None


def config_of(cache: Any) -> UniqueConfig:
    """The settings of a cache with layers of ours."""
    config: UniqueConfig = vars(cache)[_STATE].config
    return config


_STATE = "_unique_attn"  # attribute of a cache with layers of ours


def _turn(cache: DynamicCache, state: CacheState) -> None:
    vars(cache)[_STATE] = state
    cache.layers = [UniqueLayer.adopt(x, state) if type(x) is DynamicLayer else x for x in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = partial(UniqueLayer, state)  # type: ignore[assignment]  # it is only called
