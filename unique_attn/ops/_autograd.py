"""The ops of decoding and of prefill have no gradient. They say so by name instead of returning a silent zero."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class NotDifferentiableError(RuntimeError):
    """Raised when a gradient is asked of an op that has none."""


def _message(op: str, phase: str = "decode") -> str:
    return (
        f"unique_attn::{op} is a {phase} op and has no gradient. Call it under torch.no_grad() or detach its "
        "inputs; for training, run the model without a cache."
    )


def register_no_backward(op: str, phase: str) -> None:
    """Make the backward pass through a functional op of ``phase`` raise :class:`NotDifferentiableError`."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotDifferentiableError(_message(op, phase))

    torch.library.register_autograd(f"unique_attn::{op}", backward)


class _NoBackward(torch.autograd.Function):
    """A decode op whose backward pass is an error."""

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> Any:
        ctx.message = _message(op.name().partition("::")[2])
        return op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotDifferentiableError(ctx.message)


def without_backward(op: Any, differentiable: tuple[Tensor, ...], *args: Any) -> Any:
    """``op(*args)`` of a functional decode op. If one of the ``differentiable`` arguments requires grad, its backward
    pass raises :class:`NotDifferentiableError`.

    :func:`register_no_backward` would send every call from the dispatcher through Python, with or without gradients,
    which takes longer than all else that such an op does on the host.
    """
    if torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in differentiable):
        return _NoBackward.apply(op, *args)
    return op(*args)


def reject_grad(op: str, **tensors: Tensor | None) -> None:
    """Raise if a gradient would have to flow through an op that writes to its inputs."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:  # the dispatcher names what is none
                raise NotDifferentiableError(f"{name} requires grad, but {_message(op)}")


def reject_forward_ad(op: str, **tensors: Tensor) -> None:
    """Raise if one of ``tensors`` carries a tangent: ops that are only differentiated backwards would lose it."""
    if torch.autograd.forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotDifferentiableError(f"{op}: {name}: has no forward-mode derivative (jvp): use backward()")
