"""Settings of sparse prefill that the tests of the drop-in share, and attention under masks that are made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hf_helpers import ALWAYS_SPARSE, tiny
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import unique_attn as ua
from unique_attn import reference_prefill
from unique_attn.hf.compat import eager_attention
from unique_attn.hf.reasons import SINKS, window_of

# Decoding reads every page of contexts up to 512 tokens.
EXACT = replace(ALWAYS_SPARSE, prefill="directional", threshold=0.0, prefill_above=64)  # drops nothing
SPARSE = replace(EXACT, threshold=0.7)
PAPER = replace(EXACT, prefill="unisparse", threshold=None, top_p=0.3)
FAMILIES = ["llama", "qwen2", "gemma3", "gpt-oss"]
FULL = {"llama": {0, 1, 2}, "qwen2": {0, 1}, "gemma3": {1, 2}, "gpt-oss": {1, 2}}  # layers without a window
PADDING = [0, 70]
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def enabled(config: ua.UniqueConfig = SPARSE, family: str = "llama", **kwargs: Any):
    return ua.enable(tiny(family, **kwargs), config)


def on(device: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.no_grad()
def score(model, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Logits of all tokens that are no padding."""
    return model(**inputs, **kwargs).logits[inputs["attention_mask"].bool()]


def density(records: list[ua.PrefillRecord]) -> float:
    return float(torch.stack([record.density.mean() for record in records]).mean())


# ---- Masks by hand: the oracle selects blocks, and plain PyTorch attends under the mask that they make. ----


def handmade_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    config: ua.UniqueConfig = module.config.handmade
    num_tokens, length = query.shape[2], key.shape[2]
    few = num_tokens <= config.max_decode_tokens or length <= config.prefill_above
    if few or window_of(module) != 0 or module.layer_idx in config.dense_layers:
        return stock_attention(module, query, key, value, attention_mask, scaling, **kwargs)
    padding = [0] * len(query)
    if attention_mask is not None:
        last = attention_mask[:, 0, -1].expand(len(query), -1)
        padding = (length - (last if last.dtype == torch.bool else last == 0).sum(-1)).tolist()
    sinks = next((kwargs[name] for name in SINKS if kwargs.get(name) is not None), None)
    rows = []
    for b, hidden in enumerate(padding):
        row = handmade_row(query[b], key[b, :, hidden:], value[b, :, hidden:], config, scaling, sinks)
        rows.append(torch.nn.functional.pad(row, (0, 0, 0, 0, num_tokens - len(row), 0)))
    return torch.stack(rows).to(query.dtype), None


def handmade_row(q, k, v, config, scaling, sinks):
    """Queries ``[Hq, T, D]``, of which those of the sequence are the last, keys and values ``[H, L, D]``."""
    length = k.shape[1]
    q = q[:, -min(q.shape[1], length) :]
    bounds_q, bounds_k = (torch.tensor([0, x.shape[1]], dtype=torch.int32) for x in (q, k))
    packed = [x.transpose(0, 1) for x in (q, k)]
    shares = reference_prefill.composite_blocks(
        *packed, bounds_q, bounds_k, length, method=config.prefill, scale=scaling
    )
    mask, _ = reference_prefill.select_blocks(
        shares, bounds_q, bounds_k, threshold=config.threshold, top_p=config.top_p
    )
    seen = reference_prefill.key_mask(mask, 0, q.shape[1], length, 128, 64).transpose(0, 1)  # [Hm, T, L]
    seen = seen.repeat_interleave(len(q) // len(seen), 0)
    keys, values = (x.repeat_interleave(len(q) // len(x), 0).double() for x in (k, v))
    logits = q.double() @ keys.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    logits = logits.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, q.shape[1], 1)], -1)
    return (logits.softmax(-1)[..., :length] @ values).transpose(0, 1)


def stock_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    if any(kwargs.get(name) is not None for name in SINKS):
        return eager_attention(type(module))(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
