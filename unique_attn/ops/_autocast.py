"""Training ops under ``torch.autocast``: as ``scaled_dot_product_attention``, they run in autocast's dtype."""

from __future__ import annotations

import torch


def autocast_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``tensors`` in the dtype of ``torch.autocast`` if that is on for their device, else as they are.

    fp64 stays, as everywhere in autocast. Gradients come back in the dtype that the tensor had.
    ``torch.library.register_autocast`` does not fit here: it has one dtype for good instead of autocast's own, and it
    would round theta and tau too.
    """
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
