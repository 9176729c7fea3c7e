"""The two functions that transformers knows as ``"unique"``: attention and mask."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from unique_attn.cache import UniqueLayer
from unique_attn.config import UniqueConfig
from unique_attn.decode import unsupported
from unique_attn.hf.compat import (
    eager_attention,
    family_supports_sdpa,
    is_plain_causal_step,
    sdpa_attention_forward,
    sdpa_mask,
    warn_once,
)
from unique_attn.hf.hooks import AttentionHook, SelectionRecord, attach, hook_of
from unique_attn.hf.training import dense_mask
from unique_attn.ops import NotDifferentiableError
from unique_attn.ops._autocast import autocast_inputs

SLIDING = "it has a sliding window"
_EAGER_ONLY = ("softcap", "s_aux", "sinks")  # arguments by which sdpa would compute something else


class UnsupportedFeatureError(NotImplementedError):
    """A model asks for a kind of attention that neither the ops nor the dense fallbacks compute."""


def unique_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers: decode steps of a cache on pages run the ops, all else is dense.

    Args:
        module: the attention module that calls.
        query: ``[B, Hq, T, D]``.
        key: ``[B, H, L, D]``, or only the new ``[B, H, T, D]`` when the cache layer is on pages.
        value: like ``key``.
        attention_mask: ``[B, 1, T, L]`` or None, as ``sdpa`` takes it.
        scaling: factor of the logits; ``1 / sqrt(D)`` if None.
        dropout: probability, used by dense attention only.
        kwargs: what the model family passes to every attention function.

    Returns:
        ``[B, T, Hq, D]``, and the attention weights if ``output_attentions`` asks for them (else None).

    Raises:
        UnsupportedFeatureError: softcap, attention sinks or weights are asked for, and the family has no eager
            attention that could compute them.
    """
    dense = (module, query, key, value, attention_mask, scaling, dropout, kwargs)
    hook = hook_of(module)
    if hook is not None and hook.train is not None and _trains(hook, module, query, key):
        return _training(hook, *dense)
    if torch.compiler.is_compiling():
        return dense_attention(*dense)
    hook = hook or attach(module, UniqueConfig())  # without enable(): from the next call on
    layer = hook.take_layer()
    if layer is None:
        return dense_attention(*dense)
    returned, awaits_decode = layer.returned, layer.awaits_decode
    layer.announce(None)
    if returned is None:  # the module attends to something that is not in this layer
        return dense_attention(*dense)

    reason = lasting_reason(module, query, key, value, kwargs)
    if key is not returned[0] or value is not returned[1]:
        if awaits_decode:
            raise UnsupportedFeatureError(f"{_name(module)} changes the keys or values that it gets from its cache")
        reason = "it changes the keys or values that it gets from its cache"
    _remember(hook, module, reason)
    if not awaits_decode:
        return _undifferentiable(dense_attention(*dense), layer, query)

    passing = reason or passing_reason(dropout, kwargs)
    if passing is not None:
        warn_once(f"{_name(module)} is dense in this call: {passing}", type(module), passing)
        key, value = layer.gather()
        return _undifferentiable(
            dense_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs), layer, query
        )
    return _undifferentiable((_sparse(hook, layer, query, scaling, kwargs.get("s_aux")), None), layer, query)


def _trains(hook: AttentionHook, module: nn.Module, query: Tensor, key: Tensor) -> bool:
    """Whether a call is a training forward: no cache, or one that is filled for nothing, as models do by default."""
    if not module.training or (hook.cached and not torch.is_grad_enabled()):  # generate() of a model in training mode
        return False
    if query.shape[2] != key.shape[2] and hook.cached:
        warn_once(f"{_name(module)} has no training mask in this call: it continues a cache", type(module), "continues")
    return query.shape[2] == key.shape[2]


def _training(
    hook: AttentionHook,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention with the training mask where the layer and the call allow it, else dense."""
    assert hook.train is not None
    layer = None if torch.compiler.is_compiling() else hook.take_layer()
    if layer is not None:
        layer.announce(None)
    q, k, v = autocast_inputs(query, key, value)
    reason = lasting_reason(module, q, k, v, kwargs) or passing_reason(dropout, kwargs)
    if kwargs.get("s_aux") is not None:
        reason = reason or "it uses attention sinks"
    if hook.shares_kv:
        reason = reason or "layers of its model share keys and values"
    out = hook.train.attend(module, q, k, v, mask, scaling, kwargs, hook.cached, reason)
    if out is not None:
        return out, None
    return dense_attention(module, query, key, value, dense_mask(mask, query, kwargs), scaling, dropout, kwargs)


def unique_mask(**kwargs: Any) -> Tensor | None:
    """The mask function: ``sdpa``'s masks, but without waiting for the device in single-token steps.

    Takes and returns what transformers' mask functions do: a bool ``[B, 1, T, L]``, or None for a plain causal mask.
    """
    padding = kwargs.get("attention_mask")
    if padding is None or torch.compiler.is_compiling() or not is_plain_causal_step(kwargs):
        return sdpa_mask(**kwargs)
    length = kwargs["kv_length"]
    padding = torch.nn.functional.pad(padding[:, :length], (0, max(0, length - padding.shape[1])))
    if padding.device.type == "cpu" and bool(padding.all()):  # looking costs nothing there
        return None
    return padding[:, None, None, :]


def lasting_reason(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> str | None:
    """Why this module can never use pages, or None if it can."""
    if kwargs.get("sliding_window") is not None or _is_sliding(module):
        return SLIDING
    if not _is_causal(module, kwargs):
        return "it is not causal"
    if kwargs.get("softcap") is not None:
        return "it softcaps its logits"
    for name in ("position_bias", "sinks", "indices"):
        if kwargs.get(name) is not None:
            return f"it uses {name}"
    s_aux = kwargs.get("s_aux")
    if s_aux is not None and tuple(s_aux.shape) != (query.shape[1],):
        return f"its attention sinks have shape {list(s_aux.shape)}"
    if s_aux is None and not family_supports_sdpa(type(module)):
        return "its family does not support sdpa"
    return unsupported(query, key, value)


def passing_reason(dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why this call cannot read pages, or None if it can."""
    if kwargs.get("output_attentions"):
        return "output_attentions needs all weights"
    return "it uses dropout" if dropout > 0 else None


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the stock implementations compute: ``sdpa``, or the family's eager attention where sdpa cannot."""
    wanted = [name for name in _EAGER_ONLY if kwargs.get(name) is not None]
    wanted += ["output_attentions"] * bool(kwargs.get("output_attentions"))
    if wanted or not family_supports_sdpa(type(module)):
        eager = eager_attention(type(module))
        if eager is not None:
            mask = additive_mask(attention_mask, query, key, _is_causal(module, kwargs))
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        if wanted and wanted != ["output_attentions"]:
            raise UnsupportedFeatureError(f"{_name(module)} asks for {', '.join(wanted)}, which sdpa cannot compute")
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def additive_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """A mask for sdpa as one that eager attention can add to its logits."""
    if mask is None:
        num_tokens, length = query.shape[2], key.shape[2]
        if num_tokens == 1 or not causal:
            return None
        mask = torch.ones(1, 1, num_tokens, length, dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


def _sparse(
    hook: AttentionHook, layer: UniqueLayer, query: Tensor, scaling: float | None, s_aux: Tensor | None
) -> Tensor:
    out, lse, pages = layer.decode(query.detach().transpose(1, 2), scaling)
    if hook.records is not None:
        hook.records.append(SelectionRecord(layer.layer_idx, layer.seq_lens, pages))
    if s_aux is not None:  # a sink adds exp(s_aux) to the normalizer exp(lse)
        out = (out.float() * torch.sigmoid(lse - s_aux.detach().float()).unsqueeze(-1)).to(out.dtype)
    return out


def _remember(hook: AttentionHook, module: nn.Module, reason: str | None) -> None:
    hook.dense_reason, hook.known = reason, True
    if reason is not None and reason != SLIDING:
        warn_once(f"{_name(module)} stays dense: {reason}", type(module), reason)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _is_sliding(module: nn.Module) -> bool:
    config, layer_idx = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types is not None and layer_idx is not None and layer_idx < len(types):
        return "sliding" in types[layer_idx] or "chunked" in types[layer_idx]
    return getattr(module, "sliding_window", None) is not None


def _name(module: nn.Module) -> str:
    return type(module).__name__


class _Undifferentiable(torch.autograd.Function):
    """The identity, but a gradient that arrives at it is an error: pages keep no graph."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotDifferentiableError(
            "attention over a cache on pages has no gradient: train without a cache, or decode under torch.no_grad()"
        )


def _undifferentiable(
    result: tuple[Tensor, Tensor | None], layer: UniqueLayer, query: Tensor
) -> tuple[Tensor, Tensor | None]:
    if not ((layer.on_pages or layer.lost_graph) and torch.is_grad_enabled() and query.requires_grad):
        return result
    return _Undifferentiable.apply(result[0], query), result[1]
