"""The class of an enabled model: its own, whose forward first looks whether a captured step does the call."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import nn

from unique_attn.hf.captured import CapturedSteps
from unique_attn.hf.compat import GenerationMixin, is_traced
from unique_attn.hf.hooks import CacheHook, attention_modules, hook_of
from unique_attn.hf.reasons import refuse_continuous_batching

_STEPS = "_unique_attn_steps"  # attribute of an enabled model; None in a copy that has not been called
_EXTENDS = "_update_model_kwargs_for_generation"  # the method of transformers that puts ones behind the mask
_READS = "_prefill"  # the one that reads a prompt, perhaps in chunks
_COMPILES = "_valid_auto_compile_criteria"  # the one that says whether steps, and those chunks, are compiled
_reading: ContextVar[bool] = ContextVar("reading", default=False)  # in transformers' method that reads a prompt
_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def watch_steps(model: nn.Module) -> None:
    """Have ``model`` run its decode steps from graphs where it can.

    Its class becomes one of the same name below its own: unlike a ``forward`` of the instance, that is right for copies
    of the model, for replicas and for whoever looks at the signature.
    """
    if not isinstance(model, _Watched):
        model.__class__ = _watched(type(model))
    vars(model)[_STEPS] = None


def unwatch_steps(model: nn.Module) -> None:
    """Undo :func:`watch_steps`."""
    steps = vars(model).pop(_STEPS, None)
    if steps is not None:
        steps.close()
    if type(model) in _classes.values():
        model.__class__ = type(model).__mro__[2]


class _Watched:
    """What the classes of enabled models have in common."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        cls = type(self)
        if not isinstance(made, tuple) or cls not in _classes.values():
            return made
        return (_new, (cls.__mro__[2],), *made[2:])

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Every way to ``generate_batch`` goes through this method of transformers, which takes dense FlashAttention
        where that is installed, and else knows of no serving but its own."""
        if _STEPS in vars(self):
            refuse_continuous_batching()
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]  # disabled, below another class


def _watched(cls: Any) -> Any:
    found = _classes.get(cls)
    if found is not None:
        return found
    forward: Any = cls.forward

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_traced() and _STEPS in vars(self):
            steps = vars(self)[_STEPS]
            if steps is None:
                steps = vars(self)[_STEPS] = _steps_of(self, forward)
            out = None if steps is None else steps.run(self, forward, args, kwargs)
            if out is not None:
                return out
        return forward(self, *args, **kwargs)

    def extend(self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        before = model_kwargs.get("attention_mask")
        made = extended(self, outputs, model_kwargs, *args, **kwargs)
        steps = vars(self).get(_STEPS)
        if steps is not None:
            steps.extended(before, made)
        hook = next((each for each in self._forward_pre_hooks.values() if isinstance(each, CacheHook)), None)
        if hook is not None:  # if the whole call was compiled, hooks were as well, and did nothing
            hook.after_compiled(self, made.values(), before)
        return made

    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _reading.set(_STEPS in vars(self))
        try:
            return reads(self, *args, **kwargs)
        finally:
            _reading.reset(token)

    def compiles(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Compiled chunks would be dense, whatever the settings say of prompts, and their pages not there in the next.
        return not _reading.get() and stock_compiles(self, *args, **kwargs)

    names: dict[str, Any] = {
        "forward": run,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    extended, reads, stock_compiles = (_stock_method(cls, name) for name in (_EXTENDS, _READS, _COMPILES))
    if extended is not None:
        names[_EXTENDS] = extend
    if reads is not None and stock_compiles is not None:
        names |= {_READS: read, _COMPILES: compiles}
    _classes[cls] = type(cls.__name__, (_Watched, cls), names)
    return _classes[cls]


def _stock_method(cls: type, name: str) -> Any:
    """The method of this name that ``cls`` has from transformers' generation, if it has that one."""
    found = getattr(cls, name, None)
    return found if found is not None and found is getattr(GenerationMixin, name, None) else None


def _new(cls: type) -> Any:
    watched = _watched(cls)
    return watched.__new__(watched)


def _steps_of(model: nn.Module, forward: Any) -> CapturedSteps | None:
    hooks = (hook_of(module) for module in attention_modules(model))
    hook = next((hook for hook in hooks if hook is not None), None)
    return None if hook is None else CapturedSteps(hook, forward)
