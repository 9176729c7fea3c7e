"""Lists of key blocks for sparse prefill of one whole prompt: random ones, how full they are, and the setting of a
selection that makes them as full as wanted.

A list is a flag for every query block, head and key block, bool ``[slots, heads, key_blocks]``, or the packed mask of
it (:func:`unique_attn.ops.pack_block_mask`). The **visible** blocks of a query block are those that some query of it
sees; the **density** is the share of them that is listed, and what the work of attention is proportional to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unique_attn import ops

CHUNK = 128  # query blocks that are unpacked at a time


@dataclass(frozen=True)
class Blocks:
    """How one sequence, all of whose tokens are queries, is cut into blocks.

    Attributes:
        tokens: of the sequence.
        block_q: queries of a block.
        block_k: keys of a block.
    """

    tokens: int
    block_q: int = 128
    block_k: int = 64

    @property
    def queries(self) -> int:
        """Query blocks."""
        return -(-self.tokens // self.block_q)

    @property
    def keys(self) -> int:
        """Key blocks."""
        return -(-self.tokens // self.block_k)

    @property
    def slots(self) -> int:
        """Rows of a mask; the last may belong to no block."""
        return self.tokens // self.block_q + 1

    def visible(self, device: torch.device | None = None) -> Tensor:
        """int64 ``[queries]``: the key blocks that a query block sees, from the first on."""
        end = (torch.arange(self.queries, device=device) + 1) * self.block_q
        return (end.clamp(max=self.tokens) - 1) // self.block_k + 1

    def diagonal(self, device: torch.device | None = None) -> Tensor:
        """int64 ``[queries]``: the key block of a query block's first query; it and the later ones are the diagonal."""
        return torch.arange(self.queries, device=device) * self.block_q // self.block_k

    def seen(self, device: torch.device | None = None) -> Tensor:
        """bool ``[queries, keys]``."""
        return torch.arange(self.keys, device=device) < self.visible(device)[:, None]

    def forced(self, device: torch.device | None = None) -> Tensor:
        """bool ``[queries, keys]``: the first block and the diagonal."""
        block = torch.arange(self.keys, device=device)
        return self.seen(device) & ((block == 0) | (block >= self.diagonal(device)[:, None]))


def random_lists(blocks: Blocks, heads: int, density: float, generator: torch.Generator) -> Tensor:
    """bool ``[slots, heads, key_blocks]``: the forced blocks and random others, ``density`` of the visible ones in
    every row (within one block, so that the mean is right); more where more are forced."""
    device = generator.device
    kept = torch.zeros(blocks.slots, heads, blocks.keys, dtype=torch.bool, device=device)
    seen, forced = blocks.seen(device), blocks.forced(device)
    for head in range(heads):  # a head at a time: the ranks of all take gigabytes
        drawn = torch.rand(seen.shape, generator=generator, device=device)
        drawn = drawn.masked_fill(forced, -1).masked_fill(~seen, 2)
        rounding = torch.rand(blocks.queries, generator=generator, device=device)
        count = (density * blocks.visible(device) + rounding).long().maximum(forced.sum(-1))
        last = drawn.sort(-1).values.gather(-1, count[:, None] - 1)
        kept[: blocks.queries, head] = seen & (drawn <= last)
    return kept


def density(blocks: Blocks, mask: Tensor) -> float:
    """Of the packed ``mask`` int32 ``[slots, Hm, words]``."""
    seen = blocks.seen(mask.device)
    listed = 0
    for start in range(0, blocks.queries, CHUNK):
        rows = slice(start, min(start + CHUNK, blocks.queries))
        flags = ops.unpack_block_mask(mask[rows], blocks.keys)
        listed += int((flags & seen[rows, None]).sum())
    return listed / (mask.shape[1] * int(seen.sum()))


def find_setting(wanted: float, result: Callable[[float], float], *, steps: int = 24) -> tuple[float, float]:
    """Bisect for ``result(x) = wanted``, x from 0 to 1, of a function that does not fall.

    Returns:
        x and its result, whichever came closest.
    """
    low, high = 0.0, 1.0
    best: tuple[float, float] | None = None
    for _ in range(steps):
        x = (low + high) / 2
        found = result(x)
        if best is None or abs(found - wanted) < abs(best[1] - wanted):
            best = x, found
        if abs(found - wanted) <= 1e-3 * wanted:
            break
        low, high = (x, high) if found < wanted else (low, x)
    assert best is not None
    return best
