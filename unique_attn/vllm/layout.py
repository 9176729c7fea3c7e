"""Where keys, values and page index are inside of a block of vLLM's cache.

vLLM gives every layer a tensor ``[num_blocks, H, block_size, C]``, in which a head's ``block_size * C`` elements of a
block lie in one run (layouts LBHNC and BLHNC). It allocates, shares, moves and reloads whole blocks, and does not look
into them. So a run holds::

    keys [block_size, D] | values [block_size, D] | index [block_size / page_size, entry_bytes]

where C is as many elements per token as that takes. The index goes wherever its keys go: prefix caching, preemption,
offloading and transfers of blocks need to know nothing of it, and vLLM counts it as part of its cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unique_attn.config import UniqueConfig
from unique_attn.index_format import index_entry_bytes


@dataclass(frozen=True)
class BlockViews:
    """Views of the cache of one layer, as the ops take them."""

    k: Tensor  #: ``[num_blocks, H, block_size, D]``
    v: Tensor  #: like ``k``
    index: Tensor  #: uint8 ``[num_blocks, H, block_size // page_size, entry_bytes]``


def content_bytes(config: UniqueConfig, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token and KV head: its key, its value and its share of the index, in whole elements of ``dtype``."""
    entry = index_entry_bytes(config.rule, head_dim, dtype, config.index_format)
    share = -(-entry // config.page_size)
    return 2 * head_dim * dtype.itemsize + -(-share // dtype.itemsize) * dtype.itemsize


def block_views(cache: Tensor, config: UniqueConfig, head_dim: int) -> BlockViews:
    """Keys, values and index of a layer's cache, without a copy.

    Args:
        cache: ``[num_blocks, H, block_size, C]`` in the keys' dtype, C from :func:`content_bytes`; the elements of a
            block and head are contiguous.
        config: ``rule``, ``page_size`` and ``index_format`` are used.
        head_dim: D.

    Raises:
        ValueError: another C, other strides, or a block that is not a whole number of pages.
    """
    num_blocks, heads, block_size, content = cache.shape
    size = cache.element_size()
    expected = content_bytes(config, head_dim, cache.dtype) // size
    if content != expected:
        raise ValueError(f"cache: expected {expected} elements per token and head, got {list(cache.shape)}")
    if cache.stride()[2:] != (content, 1):
        raise ValueError(f"cache: expected the elements of a block and head in one run, got strides {cache.stride()}")
    if block_size % config.page_size:
        raise ValueError(f"cache: expected blocks of whole pages of {config.page_size} tokens, got {block_size} tokens")
    begin, (of_block, of_head) = cache.storage_offset(), cache.stride()[:2]
    shape, strides = (num_blocks, heads, block_size, head_dim), (of_block, of_head, head_dim, 1)
    entry = index_entry_bytes(config.rule, head_dim, cache.dtype, config.index_format)
    raw = cache.view(torch.uint8)
    return BlockViews(
        cache.as_strided(shape, strides, begin),
        cache.as_strided(shape, strides, begin + block_size * head_dim),
        raw.as_strided(
            (num_blocks, heads, block_size // config.page_size, entry),
            (of_block * size, of_head * size, entry, 1),
            raw.storage_offset() + 2 * block_size * head_dim * size,
        ),
    )
