"""Ops of training and prefill under ``torch.autocast``: they run in its dtype, as ``scaled_dot_product_attention``."""

from __future__ import annotations

import torch


def _is_on(device: str) -> bool:
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``tensors`` in the dtype of ``torch.autocast`` if that is on for their device, else as they are.

    fp64 stays, as everywhere in autocast. Gradients come back in the dtype that the tensor had.
    ``torch.library.register_autocast`` does not fit here: it has one dtype for good instead of autocast's own, and it
    would round theta and tau too.
    """
    device = tensors[0].device.type
    if not _is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def autocast_prefill(
    block_table: torch.Tensor | None, q: torch.Tensor, *keys: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """:func:`autocast_inputs` of queries and packed keys. With a ``block_table``, ``keys`` are caches and stay as they
    are; q gets their dtype instead."""
    if block_table is None:
        return autocast_inputs(q, *keys)
    if _is_on(q.device.type) and q.is_floating_point() and keys[0].is_floating_point():
        q = q.to(keys[0].dtype)
    return (q, *keys)
