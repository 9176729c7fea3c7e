"""How settings get to a model and its caches: a hook before and after its forward, which keeps nothing of a call."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor, nn

from unique_attn.config import UniqueConfig
from unique_attn.hf.cache import adopt, state_of
from unique_attn.hf.compat import Cache, PreTrainedModel, StaticCache, is_traced
from unique_attn.hf.static_cache import adopt_static, may_turn, turn_static

if TYPE_CHECKING:
    from unique_attn.hf.training import TrainState

IMPLEMENTATION = "unique"
KEEPS = "_unique_attn_keeps"  # attribute of a model that keeps its own attention though it was enabled: why
SAVED = "unique_attn"  # attribute of a model's config: the settings as a dictionary
_ATTRIBUTE = "_unique_attn_hook"  # of attention modules
_attaching = threading.Lock()
_enabled: weakref.WeakKeyDictionary[nn.Module, CacheHook] = weakref.WeakKeyDictionary()


class Before(NamedTuple):
    """What ``disable`` restores."""

    implementation: str
    saved: Any  # settings in the config


class CacheHook:
    """Settings of a model; called around its forward, it gives the caches among the arguments layers with pages.

    Caches are found by their type, whatever the argument is called. Every attention module has a reference to it.

    Attributes:
        config: settings for caches that have none of their own.
        train: what the layers of the model share in training, None if its training is dense.
        before: what was before the model was enabled, None if it was loaded as ``"unique"``.
        outermost: whether the caches that it sees come from outside of the model, empty ones too.
        bystander: whether nobody enabled the model: it only shares its config with one that was.
        attached: whether the model has these settings still.
    """

    attached = True

    def __init__(
        self,
        config: UniqueConfig,
        train: TrainState | None = None,
        before: Before | None = None,
        *,
        outermost: bool = False,
        bystander: bool = False,
    ) -> None:
        self.config = config
        self.train = train
        self.before = before
        self.outermost = outermost
        self.bystander = bystander

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Called before the forward of ``module``, and after it with its output."""
        if is_traced():
            return
        for given in (*args, *kwargs.values()):
            if not isinstance(given, Cache):
                continue
            if not output:
                self.before_call(module, given)
            if may_turn(given):
                names = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
                self.turn(module, given, {**names.get("kwargs", {}), **names}.get("attention_mask"))

    def before_call(self, module: nn.Module, cache: Cache) -> None:
        """Give a cache that ``module`` is called with layers with pages."""
        state = state_of(cache)
        if state is not None and state.met:
            state.hook = self
            return
        config = language_config(module)
        if config is None or config._attn_implementation == IMPLEMENTATION:
            plain = self.config.prefill == "dense" and self.train is None
            adopt(cache, self.config, empty=self.outermost, plain_prompts=plain)
            adopt_static(cache, self.config)
            state = state_of(cache)
            if state is not None:
                state.hook = self

    def turn(self, module: nn.Module, cache: Cache, mask: Any) -> None:
        """Have the layers of a static cache turn to pages that are not empty, if ``mask`` is that of a call with it."""
        turn_static(cache, attention_modules(module), mask)

    def after_compiled(self, module: nn.Module, given: Iterable[Any], mask: Any) -> None:
        """As before and after a call, where neither was possible."""
        for each in given:
            if type(each) is StaticCache:
                self.before_call(module, each)
                if may_turn(each):
                    self.turn(module, each, mask)


def hook_of(module: nn.Module) -> CacheHook | None:
    """The hook that an attention module belongs to, if there is one."""
    return vars(module).get(_ATTRIBUTE)


def attach(
    model: nn.Module, config: UniqueConfig, train: TrainState | None = None, before: Before | None = None
) -> CacheHook:
    """Put these settings on ``model``, in place of those that are there."""
    detach(model)
    outer, inner = CacheHook(config, train, before, outermost=True), CacheHook(config, train, before)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            hook = outer if module is model else inner
            module.register_forward_pre_hook(hook, with_kwargs=True)
            module.register_forward_hook(hook, with_kwargs=True)
        if attends(module):
            setattr(module, _ATTRIBUTE, outer)
    with _attaching:
        _enabled[model] = outer
    return outer


def attach_late(module: nn.Module) -> CacheHook:
    """Settings for an attention module without a hook.

    They are those of the model that it is part of, if that was enabled. If nobody enabled its model, they are those
    saved in the config, or the defaults; the module is all that the attention function knows then, so the hook is on
    it, for calls to come. But a config that an enabled model shares says nothing of this one, which stays as it was.
    """
    with _attaching:
        hook = hook_of(module)
        if hook is not None:
            return hook
        config = getattr(module, "config", None)
        sharing = [(model, each) for model, each in list(_enabled.items()) if language_config(model) is config]
        hook = next((each for model, each in sharing if any(module is part for part in model.modules())), None)
        if hook is None and sharing:
            hook = CacheHook(sharing[0][1].config, before=sharing[0][1].before, bystander=True)
        elif hook is None:
            hook = CacheHook(saved_settings(config))
            module.register_forward_pre_hook(hook, with_kwargs=True)
            module.register_forward_hook(hook, with_kwargs=True)
        setattr(module, _ATTRIBUTE, hook)
        return hook


def detach(model: nn.Module) -> None:
    """Take all hooks off."""
    with _attaching:
        _enabled.pop(model, None)
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key, hook in list(hooks.items()):
                if isinstance(hook, CacheHook):
                    hook.attached = False
                    del hooks[key]
                    with_kwargs.pop(key, None)
        vars(module).pop(_ATTRIBUTE, None)


def attends(module: nn.Module) -> bool:
    """Whether ``module`` is one that may call the attention function with a layer of a cache."""
    if getattr(module, "layer_idx", None) is None:
        return False
    return hasattr(module, "is_causal") or "Attention" in type(module).__name__


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` for which :func:`attends` holds."""
    return [module for module in model.modules() if attends(module)]


def language_config(module: nn.Module) -> Any:
    """The config of the language model in ``module``, or None."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def saved_settings(config: Any) -> UniqueConfig:
    """The settings that a model's config brought along, or the defaults.

    Raises:
        ValueError, TypeError: they are no settings of this version.
    """
    values = getattr(config, SAVED, None)
    return UniqueConfig() if values is None else UniqueConfig.from_dict(values)


# ---- Watching what is selected. ----

Record = TypeVar("Record")


class SelectionRecord(NamedTuple):
    """The pages that one layer selected in one decode step."""

    layer_idx: int
    seq_lens: Tensor  # int32 [B], tokens of each row after the step, left padding not counted
    pages: Tensor  # int32 [B, T, H, k], logical pages in ascending order, then -1


class MassRecord(NamedTuple):
    """How much of its attention one layer kept in one decode step."""

    layer_idx: int
    mass: Tensor  # [B, T, Hq], the share of all tokens' softmax that the selected pages hold


_recorders: ContextVar[tuple[tuple[list[CacheHook], type, list[Any]], ...]] = ContextVar("recorders", default=())


@contextmanager
def recording(hooks: Sequence[CacheHook], kind: type[Record]) -> Iterator[list[Record]]:
    """Collect the records of a kind of modules with these hooks that run in this context (so, in this thread)."""
    records: list[Record] = []
    _recorders.set((*_recorders.get(), (list(hooks), kind, records)))
    try:
        yield records
    finally:  # not by a token: a generator may end in another context than it began in
        _recorders.set(tuple(each for each in _recorders.get() if each[2] is not records))


def recorders(hook: CacheHook, kind: type[Record]) -> list[list[Record]]:
    """Where records of a kind of modules with this hook are to be noted; nowhere, as a rule."""
    return [records for hooks, each, records in _recorders.get() if each is kind and any(hook is one for one in hooks)]
