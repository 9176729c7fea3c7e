"""When the attention of a prompt is sparse: what has to hold of a call, its module and its mask."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from unique_attn.config import UniqueConfig
from unique_attn.hf.handover import Refusal
from unique_attn.hf.hooks import CacheHook, recorders
from unique_attn.hf.masks import MaskMemo
from unique_attn.hf.reasons import call_reason, kind_reason, module_reason, warn_dense
from unique_attn.ops._autocast import autocast_inputs
from unique_attn.prefill import PrefillRecord, sparse_prefill

_MASK = Refusal("the attention mask of a prompt is not causal with left padding")
_PACKED = Refusal("it is told where packed sequences begin")


class _Thread(threading.local):
    """What a thread knows of the mask of its current call."""

    def __init__(self) -> None:
        self.masks = MaskMemo()


_thread = _Thread()


def attend(
    hook: CacheHook,
    config: UniqueConfig,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
    refusal: Refusal | None,
) -> tuple[Tensor, Tensor] | None:
    """Sparse attention of the last T of L tokens, or None if the call is dense.

    Says why once if a user would not expect it: what ``config`` asks to be dense, a short context, training and
    sliding windows are no surprise.

    Args:
        hook: of the module, for :func:`unique_attn.record_prefill`.
        config: the settings of the cache, or of the model if there is none.
        module: the attention module.
        query: ``[B, Hq, T, D]``.
        key: ``[B, H, L, D]``, of which the last T tokens are those of the queries.
        value: like ``key``.
        mask: ``[B, 1, T, L]`` or None. Looked at once in a forward of the model.
        scaling: factor of the logits; None for ``1 / sqrt(D)``.
        dropout: probability.
        kwargs: the other arguments of the attention function.
        refusal: what the caller knows against it.

    Returns:
        ``out`` ``[B, T, Hq, D]``, 0 in padding, and ``lse`` ``[B, T, Hq]``, neither with a gradient.
    """
    num_tokens, length = query.shape[2], key.shape[2]
    layer_idx = getattr(module, "layer_idx", -1)
    if config.prefill == "dense" or module.training or layer_idx in config.dense_layers:
        return None
    if num_tokens <= config.max_decode_tokens or length <= config.prefill_above:
        return None
    q, k, v = autocast_inputs(query.detach(), key.detach(), value.detach())
    refusal = (
        module_reason(module)
        or kind_reason(module, q, k, v, kwargs)
        or call_reason(module, q, mask, dropout, kwargs)
        or (_PACKED if kwargs.get("cu_seq_lens_q") is not None else None)
        or refusal
    )
    padding = None
    if refusal is None:
        owner = hook if hook.outermost else getattr(module, "config", None)  # a hook may be that of a module alone
        padding = _thread.masks.padding(mask, query.shape[0], num_tokens, length, module, owner)
        if padding is None:
            refusal = _MASK
    if refusal is not None:
        if not refusal.quiet:
            warn_dense(module, refusal)
        return None
    assert padding is not None
    if length - min(padding) <= config.prefill_above:  # long by its padding alone
        return None
    out, lse, found = sparse_prefill(q, k, v, padding, config, scaling, layer_idx)
    for records in recorders(hook, PrefillRecord):
        records.extend(found)
    return out, lse
