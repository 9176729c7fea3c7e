"""Switch a model to page-sparse decoding and back, and watch what it selects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from unique_attn.config import UniqueConfig
from unique_attn.hf.compat import PreTrainedModel, eager_attention, family_supports_sdpa, warn_once
from unique_attn.hf.hooks import IMPLEMENTATION, SelectionRecord, attach, attention_modules, hook_of
from unique_attn.hf.lazy import register
from unique_attn.hf.training import TrainState
from unique_attn.train_config import TrainConfig

Model = TypeVar("Model", bound=nn.Module)
_BEFORE = "_unique_attn_before"  # attribute of the model: the implementation that disable() restores


def enable(model: Model, config: UniqueConfig | None = None, train: TrainConfig | None = None) -> Model:
    """Let ``model`` decode page-sparsely, in ``generate()`` and in plain forward calls with a cache.

    Sets the attention implementation to ``"unique"`` and puts a forward pre-hook on each attention module of this
    instance. Prefill and contexts below ``config.dense_below`` stay dense. May be called again with other settings,
    which hold for caches made from then on.

    Args:
        model: a transformers model, or a module that contains one.
        config: settings; the defaults if None.
        train: how the model trains: while it is in training mode and attends to no earlier tokens of a cache, its
            full-attention layers use the mask of :func:`unique_attn.train.masked_attention` with ``config``'s pages.
            None for dense training. Drive it with :class:`unique_attn.hf.SparsityCallback` or ``update`` of
            ``unique_attn.hf.train_state(model)``. ``eval()`` and ``generate()`` do not change.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` holds no transformers model, ``config`` is no :class:`UniqueConfig` or ``train`` no
            :class:`TrainConfig`.
        ValueError: the model's attention cannot be replaced through transformers' attention interface, or ``config``
            has no training mask.
    """
    if config is not None and not isinstance(config, UniqueConfig):
        raise TypeError(f"config: expected a UniqueConfig or None, got {type(config).__name__}")
    config = UniqueConfig() if config is None else config
    if train is not None and not isinstance(train, TrainConfig):
        raise TypeError(f"train: expected a TrainConfig or None, got {type(train).__name__}")
    state = None if train is None else TrainState(config, train)
    inner = _transformers_model(model)
    modules = attention_modules(inner)
    if not modules:
        raise ValueError(f"model: expected attention modules with a cache, got {type(inner).__name__} without any")
    register()
    text, key = _language_config(inner)
    before = text._attn_implementation
    if before != IMPLEMENTATION:
        inner.set_attn_implementation(_only(key, IMPLEMENTATION))
        if text._attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"model: expected a family that uses transformers' AttentionInterface, got {type(inner).__name__}"
            )
        setattr(inner, _BEFORE, before)
    for module in modules:
        attach(module, config).train = state
    if state is not None:
        state.prepare(modules)
    if all("sliding" in kind for kind in _layer_types(text)):
        name = type(inner).__name__
        warn_once(f"every layer of {name} has a sliding window, so none is sparse", type(inner), "sliding")
    return model


def disable(model: Model) -> Model:
    """Undo :func:`enable`: restore the attention implementation from before and remove the hooks.

    A model that was loaded with ``attn_implementation="unique"`` gets ``sdpa``, or ``eager`` if its family has no
    sdpa. Does nothing on a model that is not enabled. A cache on pages stays usable; it turns dense.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` holds no transformers model.
    """
    inner = _transformers_model(model)
    text, key = _language_config(inner)
    hooked = [(module, hook) for module in inner.modules() if (hook := hook_of(module)) is not None]
    for module, hook in hooked:
        hook.remove(module)
    before = vars(inner).pop(_BEFORE, None)
    if text._attn_implementation == IMPLEMENTATION:
        if before is None:
            modules = attention_modules(inner)
            usual = all(family_supports_sdpa(type(m)) or eager_attention(type(m)) is None for m in modules)
            before = "sdpa" if usual else "eager"
        inner.set_attn_implementation(_only(key, before))
    return model


@contextmanager
def record_selection(model: nn.Module) -> Iterator[list[SelectionRecord]]:
    """Collect which pages every layer selects in the decode steps inside the ``with`` block.

    Yields a list that grows by one :class:`SelectionRecord` ``(layer_idx, seq_lens, pages)`` per sparse layer and
    step, in the order of execution; the tensors stay on their device and nothing waits for it. Costs nothing outside.

    Raises:
        TypeError: ``model`` holds no transformers model.
        ValueError: ``model`` does not use the ``"unique"`` implementation.
    """
    inner = _transformers_model(model)
    implementation = _language_config(inner)[0]._attn_implementation
    if implementation != IMPLEMENTATION:
        raise ValueError(f"model: expected the attention implementation {IMPLEMENTATION!r}, got {implementation!r}")
    hooks = [hook_of(module) or attach(module, UniqueConfig()) for module in attention_modules(inner)]
    before = [hook.records for hook in hooks]
    records: list[SelectionRecord] = []
    for hook in hooks:
        hook.records = records
    try:
        yield records
    finally:
        for hook, old in zip(hooks, before):
            hook.records = old


def _transformers_model(model: Any) -> Any:
    """``model`` itself, or the outermost transformers model inside (of a PEFT model, for example)."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    return found


def _language_config(model: Any) -> tuple[Any, str | None]:
    """The config of the language model, and its key in ``model.config`` if it is a part of that."""
    text = model.config.get_text_config(decoder=True)
    for key in getattr(model.config, "sub_configs", {}):
        if getattr(model.config, key, None) is text:
            return text, key
    return model.config, None


def _only(key: str | None, implementation: str) -> Any:
    """For ``set_attn_implementation``: other parts of a model, such as a vision encoder, keep theirs."""
    return implementation if key is None else {key: implementation}


def _layer_types(text_config: Any) -> list[str]:
    types = getattr(text_config, "layer_types", None)
    if types is None:
        types = ["sliding" if getattr(text_config, "sliding_window", None) is not None else "full"]
    return list(types)
