"""What goes from a cache layer to the attention function: keys and values that know which layer they are of.

Between the two stands code of each model family, which may do anything with what ``update`` returned. So a layer
returns :class:`CachedTensor`: tensors that stand for all cached keys or values without holding them. The attention
function takes the new tokens and the layer from them and reads pages. Whoever else computes with them gets the keys or
values themselves, gathered at that moment, as from any other cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from unique_attn.config import UniqueConfig
from unique_attn.ops import NotDifferentiableError


class Step:
    """One update of a cache layer.

    Attributes:
        k: the new keys ``[B, H, T, D]``, as the model gave them.
        v: the new values, likewise.
        length: tokens of a row with these, padding included.
        full: all keys and values ``[B, H, length, D]``, once somebody has asked for them.
        refusal: why it is no step for pages, if the layer knew that without being asked.
        padding: left padding of each row, once a layer that is not on pages has looked at the mask.
        stored: how many of the first ``length`` places hold a token; None for all, and where a mask says it.
    """

    __slots__ = ("full", "k", "length", "padding", "refusal", "stored", "v")

    def __init__(self, k: Tensor, v: Tensor, length: int) -> None:
        self.k = k
        self.v = v
        self.length = length
        self.full: tuple[Tensor, Tensor] | None = None
        self.refusal: Refusal | None = None
        self.padding: list[int] | None = None
        self.stored: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.k.shape[2]


class Refusal(NamedTuple):
    """Why a step is attended to densely."""

    reason: str
    lasting: bool = False  # the layer will not use pages before it is reset
    quiet: bool = False  # nothing a user should be told
    prompts: bool = False  # a long prompt may be sparse even if it is lasting


class PagedLayer(Protocol):
    """What the attention function asks of a layer of a cache.

    Attributes:
        user: the attention module that was last found to be able to use pages, not kept alive by this.
    """

    user: weakref.ref[nn.Module] | None

    @property
    def config(self) -> UniqueConfig:
        """The settings of the cache."""

    @property
    def window(self) -> int:
        """Tokens that a query sees at most when it attends to pages, 0 for all."""

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[B]``: stored tokens of each row, padding not included. Only while on pages."""

    def refuses(self, step: Step, query: Tensor, mask: Tensor | None) -> Refusal | None:
        """Why ``query`` ``[B, Hq, T, D]`` under ``mask`` cannot attend to pages; None if it can."""

    def decode(self, step: Step, query: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to pages with ``query`` ``[B, Hq, T, D]``: ``out`` ``[B, T, Hq, D]``, ``lse`` and the pages read."""

    def lse_of_all(self, query: Tensor, scale: float | None) -> Tensor:
        """After :meth:`decode`: the logarithm of the normalizer over all tokens, ``[B, T, Hq]``."""

    def gather(self, step: Step, refusal: Refusal) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B, H, length, D]``, those of the step included."""


class CachedTensor(Tensor):
    """All cached keys, or all cached values, of a layer: ``[B, H, length, D]``, not gathered before they are needed."""

    layer: PagedLayer
    step: Step
    part: int  # 0: keys, 1: values

    @staticmethod
    def __new__(cls, layer: PagedLayer, step: Step, part: int) -> CachedTensor:
        new = step.v if part else step.k
        shape = (*new.shape[:2], step.length, new.shape[3])
        tensor: CachedTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        tensor.layer, tensor.step, tensor.part = layer, step, part
        return tensor

    def whole(self, refusal: Refusal | None = None) -> Tensor:
        """The keys or values themselves."""
        step = self.step
        if step.full is None:
            step.full = self.layer.gather(step, READ if refusal is None else refusal)
        return step.full[self.part]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func not in _FACTS:
            args, kwargs = tree_map_only(CachedTensor, CachedTensor.whole, (tuple(args), dict(kwargs)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """For C++ that is given one of these without Python looking at its arguments."""
        args, kwargs = tree_map_only(CachedTensor, CachedTensor.whole, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"CachedTensor({'values' if self.part else 'keys'}, shape={list(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.whole().__deepcopy__(memo)


READ = Refusal("it computes with the keys or values that it gets from its cache", lasting=True)

# What can be told of a tensor without its elements.
_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size", "is_floating_point")),
    *(getattr(Tensor, name) for name in ("__len__", "ndimension", "is_complex", "get_device")),
}


def hand_over(layer: PagedLayer, step: Step) -> tuple[CachedTensor, CachedTensor]:
    """What ``update`` returns."""
    return CachedTensor(layer, step, 0), CachedTensor(layer, step, 1)


def handed_over(key: Tensor, value: Tensor) -> tuple[PagedLayer, Step] | None:
    """The layer and the step that keys and values are of, or None if they are not what one ``update`` returned."""
    if type(key) is CachedTensor and type(value) is CachedTensor and key.step is value.step:
        return (key.layer, key.step) if (key.part, value.part) == (0, 1) else None
    return None


def whole(tensor: Tensor, refusal: Refusal | None = None) -> Tensor:
    """``tensor``, or what it stands for."""
    return tensor.whole(refusal) if isinstance(tensor, CachedTensor) else tensor


# ---- Gradients: pages keep no graph, and neither does sparse prefill. ----

NO_GRADIENT_OF_PAGES = (
    "attention over a cache on pages has no gradient: train without a cache, or decode under torch.no_grad()"
)
NO_GRADIENT_OF_PREFILL = (
    "sparse prefill has no gradient: call model.train(), which makes it dense, or run the model under torch.no_grad()"
)


class _Undifferentiable(torch.autograd.Function):
    """The identity, but a gradient that arrives at it is an error."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, source: Tensor, error: str) -> Tensor:
        ctx.error = error
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotDifferentiableError(ctx.error)


def undifferentiable(tensor: Tensor, source: Tensor, error: str = NO_GRADIENT_OF_PAGES) -> Tensor:
    """``tensor``, whose gradient is a named error if ``source``, on which it depends, requires one."""
    if torch.is_grad_enabled() and source.requires_grad:
        return _Undifferentiable.apply(tensor, source, error)
    return tensor
