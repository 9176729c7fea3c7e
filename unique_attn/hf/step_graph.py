"""One decode step of a model over the pages of an arena, captured in a CUDA graph and checked before it is used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unique_attn.hf.cache import config_of
from unique_attn.hf.compat import Cache
from unique_attn.hf.graph import beside, record
from unique_attn.hf.hooks import CacheHook
from unique_attn.hf.layer import UniqueLayer
from unique_attn.hf.ring import RingLayer, ring_blocks, ring_table
from unique_attn.hf.states import StaticStates, has_states
from unique_attn.hf.static_pages import StepPages
from unique_attn.hf.unchanged import Behaviour, Unchanged
from unique_attn.paging import LayerPages, PagedTable

if TYPE_CHECKING:
    from unique_attn.hf.arena import Arena
    from unique_attn.hf.captured import StepCall


class WrongStepError(RuntimeError):
    """A step computes something else when it is captured."""


class StepGraph:
    """A step of one kind: static places for its arguments, lengths and block table, and the graph that reads them.

    Made after a step of that kind has run; what it writes to the pages meanwhile is what that step wrote.

    Args:
        model: in eval mode.
        forward: of the model's class.
        call: the step that has run.
        table: of its cache, which has counted the step.
        states: of layers with states, by their numbers, as they were before the step.
        arena: where the pages of the cache are.

    Raises:
        CannotCaptureError: a graph cannot hold the step.
        WrongStepError: it depends on what the host knows of the length.
        NotImplementedError: a layer does something with its cache that a step on pages does not offer.
        torch.OutOfMemoryError: no memory for it.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        call: StepCall,
        table: PagedTable,
        states: dict[int, Any],
        arena: Arena,
    ) -> None:
        device = call.device
        layers = call.cache.layers
        self._states = {i: StaticStates(layers[i], before) for i, before in states.items()}
        self._storages = [None if i in states else layer.settled()[0].storage for i, layer in enumerate(layers)]
        config = config_of(call.cache)
        windows = [layer.sliding_window if isinstance(layer, RingLayer) else 0 for layer in layers]
        self._pages = StepPages(config, windows, table.batch, table.width, device)
        for i, (static, storage) in enumerate(zip(self._pages.static_layers, self._storages, strict=True)):
            if storage is None:
                self._pages.layers[i] = self._states[i].layer
                continue
            static.storage = LayerPages(table.pool, storage, config)
            if static.window:
                blocks = ring_blocks(static.window, config.block_size)
                static.block_table = ring_table(table.batch, table.width, blocks, device)
        with torch.inference_mode(False):
            self._inputs = {name: x.clone() for name, x in call.tensors.items()}
        self._constants = call.constants
        self._unchanged, self._behaviour = Unchanged(model), Behaviour(model)
        self._device = device
        self._lengths: list[int] | None = None  # that the device has counted to
        self._layout: object = None  # of the block table on the device
        self._graph: Any = None
        # Nothing here may keep the model, which keeps this.
        self._model, self._forward, self._cache_name = weakref.ref(model), forward, call.cache_name
        self._out = self._capture(table, arena)

    # ---- Making it. ----

    def _capture(self, table: PagedTable, arena: Arena) -> Any:
        if self._device.type != "cuda":
            self._check_length(table)
            return self._again(table, table.length - 1)
        with beside(self._device):
            self._check_length(table)
            self._rewind(table)
            if arena.memory_pool is None:
                arena.memory_pool = torch.cuda.graph_pool_handle()
            self._graph, out = record(self._step, arena.memory_pool)
        self._replay()
        return out

    def _step(self) -> Any:
        self._pages.seq_lens.add_(1)
        cache = {self._cache_name: self._pages}
        return self._forward(self._model(), **self._inputs, **self._constants, **cache)

    def _again(self, table: PagedTable, host_length: int) -> Any:
        self._pages.host_length = host_length
        self._rewind(table)
        return self._step()

    def _rewind(self, table: PagedTable) -> None:
        self._load(table, [n - 1 for n in table.lengths])
        for each in self._states.values():
            each.rewind()

    def _check_length(self, table: PagedTable) -> None:
        """A step must not depend on the length that the host knows, which a graph would never see change."""
        length = table.length - 1
        first, other = (self._again(table, n).logits.clone() for n in (length, length // 2))
        if torch.equal(first, other):
            return
        if torch.equal(first, self._again(table, length).logits) or not _close(first, other):
            raise WrongStepError("what it computes depends on the length of the cache as the host knows it")

    def check(self, out: Any) -> None:
        """Compare what the graph computed when it was made with what the model did in the same step.

        Raises:
            WrongStepError: they differ.
        """
        if not _close(out.logits, self._out.logits):
            raise WrongStepError("on pages alone it computes something else")

    # ---- Using it. ----

    def is_at(self, layers: Sequence[Any], table: PagedTable) -> bool:
        """Whether the tokens of these layers are where the graph reads and writes them."""
        return len(layers) == len(self._storages) and all(
            (type(layer) in (UniqueLayer, RingLayer) and layer.is_at(table, storage))
            if storage is not None
            else (has_states(layer) and self._states[i].is_of(layer))
            for i, (layer, storage) in enumerate(zip(layers, self._storages))
        )

    def take_states(self, layers: Sequence[Any]) -> bool:
        """Move the states of the layers that have some to where the graph reads them; False if they do not fit."""
        return all(has_states(layers[i]) and states.take(layers[i]) for i, states in self._states.items())

    @property
    def can_be_undone(self) -> bool:
        """Whether a step leaves what was there before it."""
        return not self._states

    def finds_weights(self) -> bool:
        """Whether the weights are where the graph reads them."""
        return self._unchanged.finds_weights()

    def is_outdated(self) -> bool:
        """Whether the model is made of something else by now, or set to something else. It takes a while to tell."""
        return self._unchanged.changed() is not None or self._behaviour.changed()

    def run(self, call: StepCall, table: PagedTable) -> None:
        """Run the step of ``call``, which ``table`` has counted already."""
        before = [n - 1 for n in table.lengths]
        counted, self._lengths = self._lengths, None  # unknown if this fails half-way
        if counted != before or self._layout is not table.layout:
            self._load(table, before)
        for name, value in call.tensors.items():
            self._inputs[name].copy_(value)
        self._replay()
        self._lengths = list(table.lengths)

    def _load(self, table: PagedTable, lengths: list[int]) -> None:
        pages = self._pages
        pages.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32, device="cpu"), non_blocking=True)
        if self._layout is not table.layout:
            pages.block_table.copy_(table.host_table(), non_blocking=True)
            self._layout = table.layout

    def _replay(self) -> None:
        if self._graph is None:
            self._out = self._step()
        else:
            with torch.cuda.device(self._device):
                self._graph.replay()

    def result(self, cache: Any) -> Any:
        """What the model returned, in tensors of its own and with the caller's cache."""
        return _copy(self._out, cache)


def _copy(value: Any, cache: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Cache):
        return cache
    if isinstance(value, dict):
        return type(value)(**{name: _copy(each, cache) for name, each in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(each, cache) for each in value)
    return value


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by no more than the order of summation explains."""
    if torch.equal(a, b):
        return True
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


def _can_be_captured(hook: Any) -> bool:
    """Hooks of ours, and those with which transformers collects what the outputs of a step are to hold."""
    return isinstance(hook, CacheHook) or getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def hook_inside(model: nn.Module) -> str | None:
    """Which hook would run when a step is captured, and never again; None if there is none."""
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        return "hooks are on all modules"
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"accelerate's hook is on {name or 'the model'}"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if module is not model and not all(map(_can_be_captured, hooks)):
            return f"a hook is on {name}"
    return None
