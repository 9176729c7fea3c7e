"""What stands between one attention module and the cache: a forward pre-hook on this instance, nothing else."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from unique_attn.cache import Call, UniqueLayer, adopt
from unique_attn.config import UniqueConfig
from unique_attn.hf.compat import shares_kv, warn_once

if TYPE_CHECKING:
    from unique_attn.hf.training import TrainState

IMPLEMENTATION = "unique"
_ATTRIBUTE = "_unique_attn_hook"


class SelectionRecord(NamedTuple):
    """The pages that one layer selected in one decode step."""

    layer_idx: int
    seq_lens: Tensor  # int32 [B], tokens of each row after the step, left padding not counted
    pages: Tensor  # int32 [B, T, H, k], logical pages in ascending order, then -1


class AttentionHook:
    """Called before a module's forward: gives its layer of the cache pages, and tells it the mask.

    Attributes:
        config: settings for caches that have none of their own.
        dense_reason: why this module cannot use pages, None if it can. Known after its first call with a cache.
        known: whether ``dense_reason`` is known.
        records: where decode steps note their selection, None for nowhere.
        train: what the layers of the model share in training, None if its training is dense.
        cached: whether the call in progress was given a cache. Known only if there is ``train``.
        shares_kv: whether layers of the model share keys and values.
    """

    def __init__(self, module: nn.Module, config: UniqueConfig) -> None:
        self.config = config
        self.dense_reason: str | None = None
        self.known = False
        self.records: list[SelectionRecord] | None = None
        self.train: TrainState | None = None
        self.cached = False
        self._layer: UniqueLayer | None = None
        names = list(inspect.signature(module.forward).parameters)
        self._cache_names = [name for name in ("past_key_values", "past_key_value") if name in names]
        self._positions = {name: i for i, name in enumerate(names)}
        self.shares_kv = shares_kv(getattr(module, "config", None))
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.train is not None:
            self.cached = any(self._find(name, args, kwargs) is not None for name in self._cache_names)
        if torch.compiler.is_compiling():  # compiled models decode densely
            return
        self._layer = None
        layer_idx: Any = getattr(module, "layer_idx", None)
        config: Any = getattr(module, "config", None)
        if layer_idx is None or config._attn_implementation != IMPLEMENTATION:
            return
        caches = [self._find(name, args, kwargs) for name in self._cache_names]
        cache = next((each for each in caches if each is not None), None)
        if cache is not None and self.shares_kv:
            warn_once("layers that share keys and values stay dense", "shared", type(module))
            return
        layer = adopt(cache, layer_idx, self.config)
        if layer is None:
            return
        reason = self.dense_reason if self.known else "not known yet"
        if layer_idx in layer.state.config.dense_layers:
            reason = "listed in dense_layers"
        layer.announce(Call(self._find("attention_mask", args, kwargs), reason))
        self._layer = layer

    def take_layer(self) -> UniqueLayer | None:
        """The cache layer of the call in progress, for the attention function; None if there is none."""
        layer, self._layer = self._layer, None
        return layer

    def remove(self, module: nn.Module) -> None:
        """Take the hook off ``module``."""
        self._handle.remove()
        delattr(module, _ATTRIBUTE)

    def _find(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self._positions.get(name, len(args))
        return args[position] if position < len(args) else None


def hook_of(module: nn.Module) -> AttentionHook | None:
    """The hook on ``module``, if it has one."""
    return vars(module).get(_ATTRIBUTE)


def attach(module: nn.Module, config: UniqueConfig) -> AttentionHook:
    """Put a hook with these settings on ``module``, in place of one that is there."""
    old = hook_of(module)
    if old is not None:
        old.remove(module)
    hook = AttentionHook(module, config)
    setattr(module, _ATTRIBUTE, hook)
    return hook


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that attend through a cache."""
    return [module for module in model.modules() if _attends(module)]


def _attends(module: nn.Module) -> bool:
    if getattr(module, "layer_idx", None) is None:
        return False
    if not (hasattr(module, "is_causal") or "Attention" in type(module).__name__):
        return False
    names = inspect.signature(module.forward).parameters
    return "past_key_values" in names or "past_key_value" in names
