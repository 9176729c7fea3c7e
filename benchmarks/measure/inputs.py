"""Random inputs: paged caches in shuffled blocks, an index of random keys, random selections."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measure.sweep import heads
from examples.support.results import DTYPES
from unique_attn import ops


class Random:
    """Seeded tensors on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)

    def table(self, batch: int, blocks: int) -> torch.Tensor:
        """Block table of ``batch`` sequences with ``blocks`` blocks each, in shuffled physical order."""
        return self.permutation(batch * blocks).view(batch, blocks).to(torch.int32)

    def pages(self, shape: Sequence[int], visible: int, k: int) -> torch.Tensor:
        """``[*shape, k]`` distinct pages below ``visible``, ascending; every set is as likely as any other."""
        rows = 1
        for n in shape:
            rows *= n
        chosen = []
        for part in range(0, rows, max(1, (1 << 24) // visible)):
            count = min(rows - part, max(1, (1 << 24) // visible))
            keys = torch.rand(count, visible, generator=self.generator, device=self.device)
            chosen.append(keys.topk(k, dim=-1, sorted=False).indices)
        return torch.cat(chosen).sort(-1).values.to(torch.int32).view(*shape, k)


def storage(o: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that say how the index of a shape is stored; nothing for the only way there may be."""
    return {} if o.index_format == "exact" else {"index_format": o.index_format}


def scoring(o: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of every op that has to do with a shape's index."""
    return {"rule": o.rule, "page_size": o.page_size, **storage(o)}


def entry_bytes(o: argparse.Namespace) -> int:
    """One page and one KV head in the index of a shape."""
    return ops.index_entry_bytes(o.rule, o.head_dim, DTYPES[o.dtype], **storage(o))


class Shaped:
    """What the flags of a shape say, in numbers."""

    def __init__(self, o: argparse.Namespace, device: torch.device) -> None:
        self.o = o
        self.device = device
        self.dtype = DTYPES[o.dtype]
        self.q_heads, self.kv_heads = heads(o.heads)
        self.group = self.q_heads // self.kv_heads
        self.random = Random(device, self.dtype)

    def lens(self, n: int) -> torch.Tensor:
        return torch.full((self.o.batch,), n, dtype=torch.int32, device=self.device)

    def caches(self, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (blocks, self.kv_heads, self.o.block_size, self.o.head_dim)
        return self.random.normal(*shape), self.random.normal(*shape)

    def index(self, k_cache: torch.Tensor, table: torch.Tensor, tokens: int) -> torch.Tensor:
        """The index of ``tokens`` tokens of each sequence of ``table``."""
        index = ops.new_index(k_cache, **scoring(self.o))
        ends = torch.full((len(table),), tokens, dtype=torch.int32, device=self.device)
        starts = torch.zeros_like(ends)
        ops.page_index(k_cache, index, table, starts, ends, max_new_tokens=tokens, **scoring(self.o))
        return index

    def random_index(self, blocks: int, distinct: int = 256) -> torch.Tensor:
        """An index of ``blocks`` blocks without their keys: entries of ``distinct`` blocks of random keys, drawn."""
        count, block = min(distinct, blocks), self.o.block_size
        keys = self.random.normal(count, self.kv_heads, block, self.o.head_dim)
        table = torch.arange(count, dtype=torch.int32, device=self.device)[None]
        some = self.index(keys, table, count * block)
        drawn = torch.randint(len(some), (blocks,), generator=self.random.generator, device=self.device)
        return some[drawn]
