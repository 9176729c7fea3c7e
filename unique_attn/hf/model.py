"""Switch a model to page-sparse decoding and back, and watch what it selects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from unique_attn.config import UniqueConfig
from unique_attn.hf.compat import PreTrainedModel, cache_argument, family_of, warn_once
from unique_attn.hf.hooks import (
    IMPLEMENTATION,
    KEEPS,
    SAVED,
    Before,
    Record,
    SelectionRecord,
    attach,
    attention_modules,
    detach,
    hook_of,
    language_config,
    recording,
    saved_settings,
)
from unique_attn.hf.lazy import register
from unique_attn.hf.reasons import never_sparse, window_of
from unique_attn.hf.subclass import unwatch_steps, watch_steps
from unique_attn.hf.training import TrainState
from unique_attn.prefill import PrefillRecord
from unique_attn.train_config import TrainConfig

Model = TypeVar("Model", bound=nn.Module)


def enable(model: Model, config: UniqueConfig | None = None, train: TrainConfig | None = None, **fields: Any) -> Model:
    """Let ``model`` decode page-sparsely, in ``generate()`` and in plain forward calls with a cache.

    Sets the attention implementation to ``"unique"``, puts a forward pre-hook on this instance and the transformers
    models in it, and writes the settings into its ``config``, with which they are saved. Contexts below
    ``config.dense_below`` stay dense, and so does prefill unless ``config.prefill`` names a method: then prompts longer
    than ``config.prefill_above`` are sparse, with and without a cache. May be called again with other settings, which
    hold for caches made from then on. A model of which no layer could ever be sparse keeps its own attention, with a
    warning that says why.

    Threads may use one model at once, each with caches of its own.

    Args:
        model: a transformers model, or a module that contains one.
        config: settings; if None those that the model was saved with, else the defaults.
        train: how the model trains: while it is in training mode and is given no cache, its full-attention layers use
            the mask of :func:`unique_attn.train.masked_attention` with ``config``'s pages. None for dense training.
            Drive it with :class:`unique_attn.hf.SparsityCallback` or ``update`` of
            ``unique_attn.hf.train_state(model)``. ``eval()`` and ``generate()`` do not change.
        fields: fields of :class:`UniqueConfig` that differ from ``config``: ``enable(model, budget=1024)``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` holds no transformers model, ``config`` is no :class:`UniqueConfig`, ``train`` no
            :class:`TrainConfig`, or a field is unknown.
        ValueError: the model's attention cannot be replaced through transformers' attention interface, a field has a
            value that is not allowed, there is no such layer, or ``config`` has no training mask.
    """
    if config is not None and not isinstance(config, UniqueConfig):
        raise TypeError(f"config: expected a UniqueConfig or None, got {type(config).__name__}")
    if train is not None and not isinstance(train, TrainConfig):
        raise TypeError(f"train: expected a TrainConfig or None, got {type(train).__name__}")
    inner = _transformers_model(model)
    text, key = _language_config(inner)
    config = _with_fields(saved_settings(text) if config is None else config, fields)
    state = None if train is None else TrainState(config, train)
    modules = attention_modules(inner)
    if not modules:
        raise ValueError(f"model: expected attention modules with a cache, got {type(inner).__name__} without any")
    layers = {int(module.layer_idx) for module in modules}  # type: ignore[arg-type]
    missing = sorted(set(config.dense_layers) - layers)
    if missing:
        raise ValueError(f"config.dense_layers: expected layers from 0 to {max(layers)}, got {missing}")
    before = _before(inner)
    detach(inner)
    unwatch_steps(inner)
    reason = never_sparse(inner, modules)
    if reason is None and train is None and cache_argument(inner) is None:
        reason = "its forward names no cache among its arguments"
    if reason is not None:
        warn_once(f"{type(inner).__name__} keeps its own attention and is dense: {reason}", type(inner), reason)
        _restore(inner, before)
        setattr(inner, KEEPS, reason)
        return model
    register()
    if text._attn_implementation != IMPLEMENTATION:
        before = Before(text._attn_implementation, getattr(text, SAVED, None))
        inner.set_attn_implementation(_only(key, IMPLEMENTATION))
        if text._attn_implementation != IMPLEMENTATION:
            inner.set_attn_implementation(_only(key, before.implementation))  # of what could be set
            raise ValueError(
                f"model: expected a family that uses transformers' AttentionInterface, got {type(inner).__name__}"
            )
    setattr(text, SAVED, config.to_dict())
    attach(inner, config, state, before)
    watch_steps(inner)
    if state is not None:
        state.prepare(modules)
    if all(window_of(module) != 0 for module in modules):
        name = type(inner).__name__
        warn_once(f"every layer of {name} has a sliding window, so none is sparse", type(inner), "sliding")
    return model


def disable(model: Model) -> Model:
    """Undo :func:`enable`: restore the attention implementation from before and remove hooks and settings.

    A model that was loaded with ``attn_implementation="unique"`` gets ``sdpa``, or ``eager`` if its family has no
    sdpa. Does nothing on a model that is not enabled. A cache on pages stays usable; it turns dense.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` holds no transformers model.
    """
    inner = _transformers_model(model)
    before = _before(inner)
    detach(inner)
    unwatch_steps(inner)
    vars(inner).pop(KEEPS, None)
    _restore(inner, before)
    return model


def _before(model: Any) -> Before | None:
    """What was before the model, or the one that it is part of or has inside, was enabled."""
    hooks = (hook_of(module) for module in attention_modules(model))
    return next((hook.before for hook in hooks if hook is not None and hook.before is not None), None)


def _restore(model: Any, before: Before | None) -> None:
    text, key = _language_config(model)
    if before is not None:
        if before.saved is None:
            vars(text).pop(SAVED, None)
        else:
            setattr(text, SAVED, before.saved)
    if text._attn_implementation == IMPLEMENTATION:
        usual = "eager" if any(family_of(module).eager_only for module in attention_modules(model)) else "sdpa"
        model.set_attn_implementation(_only(key, usual if before is None else before.implementation))


def record_selection(model: nn.Module) -> AbstractContextManager[list[SelectionRecord]]:
    """Collect which pages every layer selects in the decode steps inside the ``with`` block, of this thread.

    Yields a list that grows by one :class:`SelectionRecord` ``(layer_idx, seq_lens, pages)`` per sparse layer and
    step, in the order of execution; the tensors stay on their device and nothing waits for it. Costs nothing outside.
    The list stays empty for a model that keeps its own attention (see :func:`enable`).

    Raises:
        TypeError: ``model`` holds no transformers model.
        ValueError: ``model`` does not use the ``"unique"`` implementation.
    """
    return _record(model, SelectionRecord)


def record_prefill(model: nn.Module) -> AbstractContextManager[list[PrefillRecord]]:
    """Collect which key blocks every layer attends to in the sparse prefills inside the ``with`` block, of this thread.

    Yields a list that grows by one :class:`PrefillRecord` per sparse layer, call and row of the batch, in the order of
    execution; the tensors stay on their device and nothing waits for it. The list stays empty if all prefill is dense.
    :func:`unique_attn.viz.plot_prefill` draws it.

    Raises:
        TypeError: ``model`` holds no transformers model.
        ValueError: ``model`` does not use the ``"unique"`` implementation.
    """
    return _record(model, PrefillRecord)


@contextmanager
def _record(model: nn.Module, kind: type[Record]) -> Iterator[list[Record]]:
    inner = _transformers_model(model)
    if KEEPS in vars(inner):
        yield []
        return
    implementation = _language_config(inner)[0]._attn_implementation
    if implementation != IMPLEMENTATION:
        raise ValueError(f"model: expected the attention implementation {IMPLEMENTATION!r}, got {implementation!r}")
    hooks = [hook for module in attention_modules(inner) if (hook := hook_of(module)) is not None]
    with recording(hooks or [attach(inner, saved_settings(_language_config(inner)[0]))], kind) as records:
        yield records


def _transformers_model(model: Any) -> Any:
    """``model`` itself, or the outermost transformers model inside (of a PEFT model, for example)."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    return found


def _language_config(model: Any) -> tuple[Any, str | None]:
    """The config of the language model, and its key in ``model.config`` if it is a part of that."""
    text = language_config(model)
    for key in getattr(model.config, "sub_configs", {}):
        if getattr(model.config, key, None) is text:
            return text, key
    return model.config, None


def _with_fields(config: UniqueConfig, fields: dict[str, Any]) -> UniqueConfig:
    known = config.to_dict()
    unknown = sorted(name for name in fields if name not in known)
    if unknown:
        raise TypeError(f"enable: expected fields of UniqueConfig ({', '.join(known)}), got {', '.join(unknown)}")
    return replace(config, **fields)


def _only(key: str | None, implementation: str) -> Any:
    """For ``set_attn_implementation``: other parts of a model, such as a vision encoder, keep theirs."""
    return implementation if key is None else {key: implementation}
