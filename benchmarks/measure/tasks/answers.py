"""A model's answers to prompts through plain ``generate()``: the document is read densely, once for all settings, and
what follows it is decoded with each of them."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import unique_attn
from unique_attn.hf.compat import DynamicCache, cache_argument

PREFILL_TOKENS = 32768  # of a forward, all rows together
CHUNK = (
    2048  # tokens of a row and a forward where layers have windows: over a whole prompt these cost as much as others
)


@torch.no_grad()
def read(model: Any, ids: Tensor) -> Any:
    """A ``DynamicCache`` of stock attention with the keys and values of ``ids`` ``[B, n]``, which have no padding."""
    dense(model)
    name = str(cache_argument(model))
    windows = any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=model.config).layers)
    chunk = min(CHUNK, ids.shape[1]) if windows else ids.shape[1]
    caches: list[Any] = []
    for rows in ids.split(max(1, PREFILL_TOKENS // chunk)):
        caches.append(DynamicCache(config=model.config))
        for part in rows.split(chunk, dim=1):
            model(part, use_cache=True, logits_to_keep=1, **{name: caches[-1]})
    first: Any = caches[0]
    if len(caches) > 1:  # layers with a window hold the ends of rows that are equally long
        for idx, layer in enumerate(first.layers):
            layer.keys = torch.cat([cache.layers[idx].keys for cache in caches])
            layer.values = torch.cat([cache.layers[idx].values for cache in caches])
    return first


@torch.no_grad()
def answer(model: Any, ids: Tensor, cache: Any, config: unique_attn.UniqueConfig | None, new_tokens: int) -> Tensor:
    """Greedy continuations of prompts, of which a cache holds the beginnings.

    Args:
        model: a causal language model of transformers.
        ids: int64 ``[B, n]``, no padding.
        cache: what :func:`read` returned for ``ids[:, :m]``; left as it is.
        config: settings for the last ``n - m`` tokens and the new ones; None for stock attention.
        new_tokens: most of a continuation.

    Returns:
        int64 ``[B, up to new_tokens]``.

    Raises:
        RuntimeError: no layer was sparse.
    """
    dense(model)
    if config is not None:
        unique_attn.enable(model, config)
    mine = copy.deepcopy(cache)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*past_key_values.*")  # the new name is not in all versions
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=mine,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=_padding(model),
            )
        if config is not None and not any(getattr(layer, "on_pages", False) for layer in mine.layers):
            raise RuntimeError(f"no layer of {type(model).__name__} was sparse")
    finally:
        dense(model)
    return out[:, ids.shape[1] :]


def dense(model: Any) -> None:
    """Have ``model`` attend as it comes."""
    unique_attn.disable(model)
    model.set_attn_implementation("sdpa")


def tidy(device: torch.device) -> None:
    """Give memory back that nobody needs, if more than half of a GPU is taken."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < total // 2:
            gc.collect()
            torch.cuda.empty_cache()


def _padding(model: Any) -> int:
    """A token for rows that end before the others."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(model.generation_config, name, None)
        if found is not None:
            return int(found[0] if isinstance(found, Sequence) else found)
    return 0
