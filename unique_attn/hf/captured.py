"""Decode steps of a model on CUDA, captured by themselves: what an enabled model's forward does with a step.

A forward call for one new token of every row, on a cache whose layers are all on pages, is the same work every time but
for what is in the tensors. The first such call of a kind runs as any other and then once more in a graph; later ones
replay that, also over the caches of later calls of ``generate()``, because their pages have the same places (arena.py).
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unique_attn.hf.arena import Arena, Arenas
from unique_attn.hf.cache import config_of, state_of
from unique_attn.hf.cache_state import CacheState
from unique_attn.hf.compat import DynamicSlidingWindowLayer
from unique_attn.hf.graph import CannotCaptureError
from unique_attn.hf.hooks import CacheHook, SelectionRecord, recorders
from unique_attn.hf.layer import CAPTURES, UniqueLayer
from unique_attn.hf.ring import RingLayer, join_ring
from unique_attn.hf.states import has_states, states_of
from unique_attn.hf.step_graph import StepGraph, WrongStepError, hook_inside
from unique_attn.paging import PagedTable
from unique_attn.rules import MAX_PAGES

_TOO_FEW_REPLAYS = ((3, 1), (8, 4))  # so many graphs, and not so many replays of each on average: they do not pay
_logger = logging.getLogger("unique_attn")
_said: set[tuple[type, str]] = set()


class StepCall(NamedTuple):
    """A call of a model's forward for one token of every row.

    Attributes:
        cache_name: the argument that is the cache.
        cache: the cache among its arguments.
        mask: ``attention_mask``, or None.
        tensors: the other tensors, by their names.
        constants: everything else that is not None.
    """

    cache_name: str
    cache: Any
    mask: Tensor | None
    tensors: dict[str, Tensor]
    constants: dict[str, Any]

    @property
    def batch(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


def _let_go(arenas: weakref.ref[Arenas]) -> None:
    found = arenas()
    if found is not None:
        found.clear()


class CapturedSteps:
    """The captured steps of one model, which keeps this; see the module.

    Args:
        hook: the settings of the model.
        forward: the forward of its class.
    """

    def __init__(self, hook: CacheHook, forward: Callable[..., Any]) -> None:
        self._hook = hook
        self._names = list(inspect.signature(forward).parameters)[1:]
        self._model: weakref.ref[nn.Module] | None = None
        self._arenas = Arenas()
        self._why_not: str | None = None  # no step of this model is captured any more
        self._captures = self._replays = 0

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing: a copy of a model gets its own when it is called."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def run(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What ``forward(model, *args, **kwargs)`` returns if a captured step does it, else None: nothing was done."""
        if torch.is_grad_enabled() or model.training or self._why_not is not None or not self._is_mine(model):
            return None
        kwargs = {**dict(zip(self._names, args)), **kwargs}
        name = next((name for name, value in kwargs.items() if state_of(value) is not None), "")
        state = state_of(kwargs.get(name))
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if state is None or not isinstance(ids, Tensor) or ids.device.type not in CAPTURES or ids.dim() < 2:
            return None
        config = state.config
        if config.graphs == "off" or ids.shape[1] > config.max_decode_tokens or _is_captured(ids.device):
            return None
        if state.table is None:
            if state.lease is None:
                state.lease = self._arenas.lend()  # for the pages that this step may begin
            return None
        if ids.shape[1] != 1:
            return None
        if state.table.lease is None or not state.table.storages or recorders(self._hook, SelectionRecord):
            return None
        call = _call(kwargs, name, ids.device)
        if isinstance(call, str):
            _say(model, call)
            return None
        if not _mask_agrees(state, call):
            return None
        return self._step(model, forward, call, state)

    def extended(self, before: Any, after: Mapping[str, Any]) -> None:
        """``generate()`` has put ones behind the mask ``before``: it needs no look if that one did not."""
        state = next((state for value in after.values() if (state := state_of(value)) is not None), None)
        if state is not None and before is not None and state.trusts(before):
            state.trust(after.get("attention_mask"))

    def close(self) -> None:
        """The model does without: let go of its graphs and of the places that no cache uses, at once."""
        self._arenas.clear()

    # ---- What a call asks for. ----

    def _is_mine(self, model: nn.Module) -> bool:
        if self._model is None:
            self._model = weakref.ref(model)
            # Graphs know what the model is made of, so without this it would be freed by the garbage collector only.
            weakref.finalize(model, _let_go, weakref.ref(self._arenas)).atexit = False
        return self._model() is model  # replicas of nn.DataParallel share what the model keeps

    # ---- A step. ----

    def _step(self, model: nn.Module, forward: Callable[..., Any], call: StepCall, state: CacheState) -> Any:
        table = state.table
        assert table is not None
        with table.storages[0].exclusive():
            arena: Arena = table.lease.arena
            kind = _kind(call, table.width_after(1))
            graph = arena.graphs.get(kind)
            if graph is None:
                return self._first(model, forward, call, state, arena)
            layers = call.cache.layers
            if not graph.is_at(layers, table):
                reason = _join(call.cache, table)
                if reason is not None:
                    _say(model, reason)
                    return None
            fits = graph.finds_weights() and (
                graph.is_at(layers, table) or (graph.take_states(layers) and graph.is_at(layers, table))
            )
            if not fits or (not graph.can_be_undone and graph.is_outdated()):
                arena.graphs.clear()
                return self._first(model, forward, call, state, arena)
            arena.graphs.move_to_end(kind)
            self._replays += 1
            paged = [layer for layer in layers if not has_states(layer)]
            table.advanced_elsewhere()
            table.append(table.version, 1)
            for layer in paged:
                layer.advance()
            graph.run(call, table)
            # What the device need not wait for.
            table.grow_ahead()
            if graph.can_be_undone and graph.is_outdated():
                table.truncate(table.version, table.length - 1)
                for layer in paged:
                    layer.take_back()
                arena.graphs.clear()
                return self._first(model, forward, call, state, arena)
            return graph.result(call.cache)

    def _first(
        self, model: nn.Module, forward: Callable[..., Any], call: StepCall, state: CacheState, arena: Arena
    ) -> Any:
        """A step that runs as any other, and is captured afterwards for those to come."""
        if any(self._captures >= some and self._replays < self._captures * each for some, each in _TOO_FEW_REPLAYS):
            self._why_not = "its steps differ too often for graphs to pay"
            _say(model, self._why_not)
            return None
        arguments = {**call.tensors, **call.constants, call.cache_name: call.cache, "attention_mask": call.mask}
        before = Before.of(call.cache)
        out = forward(model, **{name: value for name, value in arguments.items() if value is not None})
        table = state.table
        if table is None or table.lease is None or table.lease.arena is not arena:
            return out
        after = list(call.cache.layers)
        reason = hook_inside(model) or _join(call.cache, table, before)
        if reason is not None:
            call.cache.layers[:] = after  # rings still lack the step
            _say(model, reason)
            return out
        self._captures += 1
        try:
            graph = StepGraph(model, forward, call, table, before.states, arena)
            graph.check(out)
            if not graph.take_states(call.cache.layers):
                raise WrongStepError("the states of its layers have no fixed shape")
        except torch.OutOfMemoryError as error:
            reason = f"there was no memory for a graph ({str(error).splitlines()[0]})"
        except CannotCaptureError as error:
            reason = (
                f"a graph cannot hold one, which waits for the device or copies from the host: {error} For a mixture "
                "of experts try model.set_experts_implementation('batched_mm')"
            )
        except (NotImplementedError, WrongStepError) as error:
            reason = str(error)
        except Exception as error:  # of the model, which may count on a cache of another kind
            reason = f"{type(error).__name__} on pages alone: {error}"
        else:
            arena.keep(_kind(call, table.width), graph)
            return out
        # What was tried may have written something else: the step is repeated as any other.
        self._give_up(model, reason)
        before.restore(call.cache, table)
        return forward(model, **{name: value for name, value in arguments.items() if value is not None})

    def _give_up(self, model: nn.Module, reason: str) -> None:
        self._why_not = reason
        self._arenas.clear()
        _say(model, reason)


def _call(kwargs: dict[str, Any], cache_name: str, device: torch.device) -> StepCall | str:
    """The call with these arguments, or why it is not one to be captured."""
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in kwargs.items():
        if value is None or name in (cache_name, "attention_mask"):
            continue
        if isinstance(value, Tensor):
            if value.device != device:
                return f"{name} is on another device"
            tensors[name] = value
        elif isinstance(value, (bool, int, float, str)):
            constants[name] = value
        else:
            return f"it is given {name}, a {type(value).__name__}"
    if "position_ids" not in tensors:
        return "it is not told position_ids"
    for name in ("labels", "output_attentions"):
        if name in tensors or constants.get(name):
            return f"it is given {name}"
    if constants.get("use_cache") is False:
        return "use_cache is False"
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or mask.device != device):
        return "its attention_mask is not [B, length]"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode is on"
    return StepCall(cache_name, kwargs[cache_name], mask, tensors, constants)


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _kind(call: StepCall, width: int) -> Any:
    """Calls of one kind, with block tables of this width, run the same graph."""
    device = call.device.type
    return (
        width,
        tuple((name, x.shape, x.dtype) for name, x in call.tensors.items()),
        (call.cache_name, *call.constants.items()),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


class Before(NamedTuple):
    """What a step changes in the layers of a cache that are not on pages, as it was before.

    Attributes:
        windows: stock layers with a sliding window, by their numbers.
        states: of layers with states, by their numbers.
    """

    windows: dict[int, DynamicSlidingWindowLayer]
    states: dict[int, dict[tuple[str, int], Tensor]]

    @classmethod
    def of(cls, cache: Any) -> Before:
        before = cls({}, {})
        for i, layer in enumerate(cache.layers):
            if type(layer) is RingLayer:
                before.windows[i] = layer.as_stock()
            elif type(layer) is DynamicSlidingWindowLayer:
                before.windows[i] = copy.copy(layer)  # a step replaces its tensors
            elif has_states(layer):
                before.states[i] = {place: x.clone() for place, x in states_of(layer).items()}
        return before

    def restore(self, cache: Any, table: PagedTable) -> None:
        """Have the cache as it was before the step, which ``table`` has counted."""
        table.truncate(table.version, table.length - 1)
        for i, layer in enumerate(cache.layers):
            if i in self.windows:
                cache.layers[i] = self.windows[i]
            elif i in self.states:
                for (name, number), state in self.states[i].items():
                    getattr(layer, name)[number].copy_(state)
            else:
                layer.take_back()


def _join(cache: Any, table: PagedTable, before: Before | None = None) -> str | None:
    """Have all layers of a cache where captured steps read them; why that cannot be, or None.

    ``before`` is given if the last step is to be repeated, which needs the first token of its window once more.
    """
    config = config_of(cache)
    for i, layer in enumerate(cache.layers):
        if type(layer) in (UniqueLayer, RingLayer):
            settled = layer.settled()
            if settled is not None and settled[1] is table:
                continue
        if type(layer) is UniqueLayer:
            if settled is not None or i not in config.dense_layers:
                return f"layer {i} is dense"
            if table.width * config.block_size > MAX_PAGES * config.page_size:
                return f"layer {i} is dense, and its pages are more than {MAX_PAGES}"
            if not layer.enter(table):
                return f"layer {i} holds other tokens than the others"
        elif type(layer) in (DynamicSlidingWindowLayer, RingLayer):
            stock, repeated = (layer, 0) if before is None else (before.windows[i], 1)
            ring = join_ring(stock, i, table, table.length - repeated, config)
            if isinstance(ring, str):
                return f"layer {i} has a sliding window, and {ring}"
            if repeated:
                ring.advance()
            cache.layers[i] = ring
        elif not has_states(layer):
            return f"layer {i} has a cache of its own kind ({type(layer).__name__})"
    return None


def _mask_agrees(state: CacheState, call: StepCall) -> bool:
    """Whether the mask of a call is known to hide left padding alone; if not, the step runs as any other, and says."""
    table = state.table
    assert table is not None
    if call.mask is None:
        return not any(table.padding)
    if state.trusts(call.mask):
        return True
    if call.mask.shape != (table.batch, table.length + 1):
        return False
    agrees = state.agrees(call.mask[:, None, None].bool(), table, 1, table.length + 1, state)
    state.trust(call.mask if agrees else None)
    return agrees


def _say(model: nn.Module, reason: str) -> None:
    """Say why steps run uncaptured, once for a class of models and a reason."""
    key = (type(model), reason)
    if key not in _said:
        _said.add(key)
        _logger.warning("unique_attn: decode steps of %s run without a CUDA graph: %s", type(model).__name__, reason)
