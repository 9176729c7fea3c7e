"""Write new keys and values into a paged cache."""

from __future__ import annotations

import torch

from unique_attn.ops._autograd import reject_grad
from unique_attn.ops._shared import same_device

_OP = torch.ops.unique_attn.append_kv.default


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Copy token n of ``k`` and ``v`` to slot ``slot_mapping[n]`` of the caches, in place.

    Args:
        k: ``[N, H, D]`` new keys, unit channel stride, bf16/fp16/fp32 (fp64 on the CPU).
        v: like ``k``.
        k_cache: ``[num_blocks, H, block_size, D]``, any strides with unit channel stride, the dtype of ``k``. Written.
        v_cache: like ``k_cache``. Written.
        slot_mapping: int64 ``[N]``, ``block * block_size + offset``; a negative slot skips its token. Slots must
            be distinct: which of two tokens with one slot stays is not defined.

    Raises:
        ValueError: a wrong rank, shape, dtype, device or stride, naming the argument; on the CPU (on CUDA with
            UNIQUE_ATTN_CHECK=1) also a slot past the cache. Nothing is written then.
        NotDifferentiableError: an input requires grad while grad mode is on.
    """
    reject_grad("append_kv", k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    _OP(k, v, k_cache, v_cache, slot_mapping)


@torch.library.register_fake("unique_attn::append_kv")
def _(k, v, k_cache, v_cache, slot_mapping):  # type: ignore[no-untyped-def]
    same_device("append_kv", k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    return None
