"""The two functions that transformers knows as ``"unique"``: attention and mask."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from unique_attn.config import UniqueConfig
from unique_attn.hf.compat import (
    config_family,
    eager_attention,
    eager_mask,
    family_of,
    is_plain_causal_step,
    is_traced,
    sdpa_attention_forward,
    sdpa_mask,
    warn_once,
)
from unique_attn.hf.handover import (
    NO_GRADIENT_OF_PREFILL,
    CachedTensor,
    PagedLayer,
    Refusal,
    Step,
    handed_over,
    undifferentiable,
    whole,
)
from unique_attn.hf.hooks import CacheHook, MassRecord, SelectionRecord, attach_late, hook_of, recorders
from unique_attn.hf.prefill import attend
from unique_attn.hf.reasons import (
    SINKS,
    UnsupportedFeatureError,
    call_reason,
    is_causal,
    kind_reason,
    module_reason,
    unknown_reason,
    warn_dense,
    window_of,
)
from unique_attn.hf.static_layer import COMPILED, LISTED, UniqueStaticLayer, traced_step
from unique_attn.ops._autocast import autocast_inputs

__all__ = ["UnsupportedFeatureError", "unique_attention_forward", "unique_mask"]

_BYSTANDER = Refusal("a model that shares its config was enabled, and its own was not", lasting=True)
_CHANGED = Refusal("it changes the keys or values that it gets from its cache", lasting=True)


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
    """Attention for transformers: decode steps of a cache with pages and long prompts run the ops, all else is dense.

    Args:
        module: the attention module that calls.
        query: ``[B, Hq, T, D]``.
        key: ``[B, H, L, D]``; what a layer of ours returned from ``update`` stands for that.
        value: like ``key``.
        attention_mask: ``[B, 1, T, L]`` or None, as :func:`unique_mask` made it.
        scaling: factor of the logits; ``1 / sqrt(D)`` if None.
        dropout: probability, used by dense attention only.
        kwargs: what the model family passes to every attention function.

    Returns:
        ``[B, T, Hq, D]``, and the attention weights if ``output_attentions`` asks for them (else None).

    Raises:
        UnsupportedFeatureError: an argument that is not known, or softcap or attention sinks in a family that has no
            eager attention, which alone could compute them.
        ValueError: the mask shows padding that a cache on pages did not keep, or a model and its cache differ in dtype.
    """
    unknown = unknown_reason(module, kwargs)
    hook = hook_of(module)
    if hook is None and not is_traced():
        hook = attach_late(module)
    given = traced_step(key, value, query.shape[2]) if is_traced() else handed_over(key, value)
    if given is None:
        key, value = _masked_part(key, value, attention_mask)
        changed = isinstance(key, CachedTensor) or isinstance(value, CachedTensor)
        key, value = whole(key, _CHANGED), whole(value, _CHANGED)
        dense = (module, query, key, value, attention_mask, scaling, dropout, kwargs)
        if hook is not None and hook.train is not None and module.training and query.shape[2] == key.shape[2]:
            return _training(hook, *dense, unknown)
        if changed:
            warn_dense(module, _CHANGED)
        elif hook is not None:
            if query.shape[2] == key.shape[2] and not is_traced():  # else nobody knows at which positions queries are
                out = _prefill(hook, hook.config, *dense, _BYSTANDER if hook.bystander else unknown)
                if out is not None:
                    return out, None
            _warn_of_other_caches(hook, module, query, key, value, kwargs)
        return dense_attention(*dense)

    layer, step = given
    assert hook is not None
    refusal = (
        (_BYSTANDER if hook.bystander else None)
        or _refusal(module, layer, step, query, attention_mask, dropout, kwargs)
        or unknown
    )
    if refusal is None:
        return _sparse(hook, module, layer, step, query, scaling, kwargs), None
    if not refusal.quiet:
        warn_dense(module, refusal)
    if hook.train is not None and module.training and torch.is_grad_enabled():
        warn_once(f"{_name(module)} has no training mask in calls that are given a cache", type(module), "cached")
    key, value = layer.gather(step, refusal) if is_traced() else (whole(key, refusal), whole(value, refusal))
    if step.stored is not None:
        key, value = key[:, :, : step.stored], value[:, :, : step.stored]
        attention_mask = None if attention_mask is None else attention_mask[..., : step.stored]
    key, value = _masked_part(key, value, attention_mask)
    _check_dtype(query, key, value)
    dense = (module, query, key, value, attention_mask, scaling, dropout, kwargs)
    prompts = refusal.prompts or not refusal.lasting
    out = _prefill(hook, layer.config, *dense, unknown) if prompts else None
    return dense_attention(*dense) if out is None else (out, None)


def unique_mask(**kwargs: Any) -> Tensor | None:
    """The mask function: the masks of ``sdpa``, or those of ``eager`` for families that have no other attention.

    Unlike ``sdpa``'s, it does not wait for the device in single-token steps. Takes and returns what transformers' mask
    functions do: ``[B, 1, T, L]``, bool for ``sdpa``, or None for a plain causal mask.

    Raises:
        UnsupportedFeatureError: the family would not call :func:`unique_attention_forward`.
    """
    config = kwargs.get("config")
    if config is not None:
        family = config_family(config)
        if not family.calls_interface:
            raise UnsupportedFeatureError(
                f"the family of {type(config).__name__} does not use transformers' AttentionInterface: load it with "
                "an attention implementation of its own"
            )
        if family.eager_only:
            mask: Tensor | None = eager_mask(**kwargs)
            return mask
    padding = kwargs.get("attention_mask")
    if padding is None or is_traced() or not is_plain_causal_step(kwargs):
        return sdpa_mask(**kwargs)
    length = kwargs["kv_length"]
    padding = torch.nn.functional.pad(padding[:, :length], (0, max(0, length - padding.shape[1])))
    if padding.device.type == "cpu" and bool(padding.all()):  # looking costs nothing there
        return None
    return padding[:, None, None, :]


# ---- Pages. ----


def _refusal(
    module: nn.Module,
    layer: PagedLayer,
    step: Step,
    query: Tensor,
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> Refusal | None:
    """Why a step is attended to densely; None if it reads pages. All that there is to compare is compared here."""
    if getattr(module, "layer_idx", None) in layer.config.dense_layers:
        return LISTED
    if isinstance(layer, UniqueStaticLayer) and is_traced():
        if layer.user is None or layer.user() is not module:
            return layer.unknown(step)
    elif layer.user is None or layer.user() is not module:
        lasting = module_reason(module, layer.window)
        if lasting is not None:
            return lasting
        layer.user = weakref.ref(module)
    q, k, v = autocast_inputs(query, step.k, step.v)
    return (
        kind_reason(module, q, k, v, kwargs, layer.window)
        or layer.refuses(step, query, mask)
        or call_reason(module, query, mask, dropout, kwargs)
    )


def _sparse(
    hook: CacheHook,
    module: nn.Module,
    layer: PagedLayer,
    step: Step,
    query: Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    out, lse, pages = layer.decode(step, query, scaling)
    if not is_traced():
        layer_idx = getattr(module, "layer_idx", -1)
        for selections in recorders(hook, SelectionRecord):
            selections.append(SelectionRecord(layer_idx, layer.seq_lens, pages))
        for masses in recorders(hook, MassRecord):
            masses.append(MassRecord(layer_idx, (lse - layer.lse_of_all(query, scaling)).exp()))
    return undifferentiable(_with_sinks(out, lse, kwargs), query)


def _with_sinks(out: Tensor, lse: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """``out`` ``[B, T, Hq, D]`` with the attention sinks of a call: each adds exp(sink) to the normalizer exp(lse)."""
    for name in SINKS:
        sinks = kwargs.get(name)
        if sinks is not None:
            out = (out.float() * torch.sigmoid(lse - sinks.detach().float()).unsqueeze(-1)).to(out.dtype)
    return out


# ---- Prompts. ----


def _prefill(
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
) -> Tensor | None:
    """Attention of a prompt with the settings ``config`` if it is sparse, else None."""
    found = attend(hook, config, module, query, key, value, mask, scaling, dropout, kwargs, refusal)
    if found is None:
        return None
    source = next((x for x in (query, key, value) if x.requires_grad), query)
    return undifferentiable(_with_sinks(*found, kwargs), source, NO_GRADIENT_OF_PREFILL)


# ---- Training. ----


def _training(
    hook: CacheHook,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
    unknown: Refusal | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the training mask where the layer and the call allow it, else dense."""
    assert hook.train is not None
    q, k, v = autocast_inputs(query, key, value)
    refusal = (
        module_reason(module)
        or kind_reason(module, q, k, v, kwargs)
        or call_reason(module, q, mask, dropout, kwargs)
        or unknown
    )
    if refusal is None and not is_causal(module, kwargs):
        refusal = Refusal("it is not causal")
    if refusal is None and any(kwargs.get(name) is not None for name in SINKS):
        refusal = Refusal("it uses attention sinks")
    out = hook.train.attend(module, q, k, v, mask, scaling, kwargs, refusal)
    if out is not None:
        return out, None
    mask = hook.train.dense_mask(mask, query, kwargs, windowed=window_of(module) != 0)
    return dense_attention(module, query, key, value, mask, scaling, dropout, kwargs)


# ---- Dense attention. ----


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
    """What the model computed before it was enabled, else ``sdpa``, or eager attention where sdpa cannot."""
    has_sdpa, hook = not family_of(module).eager_only, hook_of(module)
    stock = None if hook is None or hook.before is None else hook.before.implementation
    wanted = [name for name in SINKS if kwargs.get(name) is not None]
    wanted += ["output_attentions"] * bool(kwargs.get("output_attentions"))
    if kwargs.get("softcap") is not None and stock != "sdpa":  # transformers 4 has it left out by sdpa
        wanted.append("softcap")
    if has_sdpa and not wanted and stock != "eager":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    eager = eager_attention(type(module))
    if eager is not None:
        # Where sdpa has no mask it may be causal by itself; a family without sdpa always makes the mask that it needs.
        causal = has_sdpa and is_causal(module, kwargs)
        mask = additive_mask(attention_mask, query, key, causal)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if has_sdpa and wanted in ([], ["output_attentions"]):  # as stock: sdpa, which says that it has no weights
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    raise UnsupportedFeatureError(
        f"{_name(module)} asks for {', '.join(wanted) or 'eager attention'}, which sdpa cannot compute, and its family "
        "has no eager_attention_forward"
    )


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


def _masked_part(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """In a compiled call: keys and values without those for which there is no mask.

    What a compiled step gets of a static cache are its rows in whole pages, which are longer than the masks for them.
    """
    if not is_traced() or mask is None or mask.shape[-1] >= key.shape[2]:
        return key, value
    return key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]


def _check_dtype(query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = autocast_inputs(query, key, value)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"past_key_values: expected keys and values of the model's dtype, {q.dtype}, got {k.dtype} and {v.dtype}: "
            "the cache was filled before the model was cast; make a new one"
        )


def _warn_of_other_caches(
    hook: CacheHook, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> None:
    """Say once that a module which continues a sequence got its earlier keys from something without pages.

    Only a cache that was passed to the model is looked at: one that the model makes in a first forward is given pages
    when it comes back.
    """
    if query.shape[2] >= key.shape[2]:
        return
    refusal = _BYSTANDER if hook.bystander else None
    refusal = refusal or module_reason(module) or kind_reason(module, query, key, value, kwargs)
    if refusal is not None:
        if not refusal.quiet:
            warn_dense(module, refusal)
        return
    if is_traced():
        if query.shape[2] <= hook.config.max_decode_tokens:
            warn_once(f"{_name(module)} is dense: {COMPILED.reason}", type(module), "compiled")
        return
    warn_once(
        f"{_name(module)} is dense: its keys are not those of a layer of a DynamicCache or StaticCache (latent, "
        "quantized, offloaded and encoder-decoder caches have no pages, static ones before transformers 5 neither, and "
        "a layer that is called by itself gets none)",
        type(module),
        "cache",
    )


def _name(module: nn.Module) -> str:
    return type(module).__name__
