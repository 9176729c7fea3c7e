"""Caches with random keys and values for the tests of UniqueCache and of the pages below it."""

from __future__ import annotations

import torch

from unique_attn import UniqueCache, UniqueConfig, reference
from unique_attn.hf.handover import handed_over, whole
from unique_attn.hf.layer import UniqueLayer
from unique_attn.hf.masks import causal_mask

HEADS, DIM, LAYERS = 2, 8, 2
CONFIG = UniqueConfig(page_size=4, budget=64, block_size=8, dense_below=0, max_decode_tokens=5)


def states(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, tokens, DIM), torch.randn(batch, HEADS, tokens, DIM)


def feed(cache, batch, tokens, *, padding=None, attend=True):
    """Update every layer as a model would; returns what was fed in. Decode steps attend."""
    fed = []
    for layer_idx in range(LAYERS):
        k, v = states(batch, tokens)
        fed.append((k, v))
        length = cache.get_seq_length(layer_idx) + tokens
        mask = causal_mask(torch.tensor(padding), tokens, length) if padding and any(padding) else None
        given = cache.update(k, v, layer_idx)
        assert given[0].shape == given[1].shape == (batch, HEADS, length, DIM)
        assert cache.get_seq_length(layer_idx) == length
        if attend:
            attend_to(given, mask)
    return fed


def attend_to(given, mask=None):
    """What the attention function does with what ``update`` returned: True if it was attended to on pages."""
    layer, step = handed_over(*given)
    batch, _, tokens, _ = step.k.shape
    query = torch.randn(batch, 2 * HEADS, tokens, DIM)
    refusal = layer.refuses(step, query, mask)
    if refusal is not None:
        assert whole(given[0], refusal).shape == given[0].shape
        return False
    out, lse, pages = layer.decode(step, query, None)
    assert out.shape == (batch, tokens, 2 * HEADS, DIM)
    assert lse.shape == out.shape[:3]
    assert pages.shape == (batch, tokens, HEADS, layer.config.num_pages)
    return True


def paged_cache(batch=2, length=11, padding=None, config=CONFIG) -> UniqueCache:
    cache = UniqueCache(config)
    feed(cache, batch, length - 1, padding=padding)
    feed(cache, batch, 1, padding=padding)
    assert all(layer.on_pages for layer in cache.layers)
    return cache


def index_is_exact(layer: UniqueLayer) -> None:
    """Every page of the layer has the entry that the oracle computes from its keys."""
    pages, table = layer._pages, layer._table
    index = pages.index[: pages.storage.num_blocks]
    expected = index.clone()
    lens = table.seq_lens(pages.device)
    reference.page_index(
        pages.k,
        expected,
        table.block_table(pages.device),
        lens * 0,
        lens,
        max_new_tokens=int(lens.max()),
        rule=pages.config.rule,
        page_size=pages.config.page_size,
    )
    for got, want in zip(
        *(reference.decode_index(i, rule="directional", dtype=pages.k.dtype) for i in (index, expected))
    ):
        torch.testing.assert_close(got, want)
