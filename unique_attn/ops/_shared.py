"""What every op wrapper needs."""

from __future__ import annotations

import torch


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise if the tensors are not on one device. The dispatcher sends a mix of meta and real tensors to the fake
    kernels, which would return without computing anything."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    for name, device in given.items():
        if device != given[first]:
            raise ValueError(f"{op}: {name}: expected the device of {first}, {given[first]}, got {device}")


def softmax_scale(q: torch.Tensor) -> float:
    """``1 / sqrt(D)``; 1 for what the op will refuse."""
    shape = q.shape
    return float(shape[-1] ** -0.5) if shape and shape[-1] != 0 else 1.0
