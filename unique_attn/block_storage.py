"""The memory of one layer's blocks: keys, values and page index, which grow in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unique_attn.config import UniqueConfig
from unique_attn.index_format import new_index
from unique_attn.memory import GrowingTensor, capacity_for

Kind = tuple[Any, ...]  # what storages must have in common to take each other's place


class BlockStorage:
    """``k``, ``v`` ``[capacity, H, block_size, D]`` and ``index``; the first ``num_blocks`` blocks may be used."""

    def __init__(self, k: GrowingTensor, v: GrowingTensor, index: GrowingTensor, kind: Kind | None = None) -> None:
        self._k, self._v, self._index = k, v, index
        self.kind = kind
        self.num_blocks, self.capacity = k.rows, k.capacity

    @classmethod
    def create(cls, num_blocks: int, like: Tensor, block_size: int, config: UniqueConfig) -> BlockStorage:
        """Storage of ``num_blocks`` blocks of ``block_size`` tokens of keys as ``like`` ``[B, H, L, D]``.

        Raises:
            torch.OutOfMemoryError: no memory for them.
        """
        shape = (like.shape[1], block_size, like.shape[3])
        block = torch.empty((1, *shape), dtype=like.dtype, device="meta")
        entries = _index_of(block, config).shape[1:]
        rows = max(1, num_blocks)
        capacity = capacity_for(rows, block.nbytes, like.device)
        k, v = (GrowingTensor(rows, capacity, shape, like.dtype, like.device) for _ in range(2))
        index = GrowingTensor(rows, capacity, entries, torch.uint8, like.device)
        index.tensor[:rows].zero_()
        return cls(k, v, index, kind_of(like, block_size, config))

    @classmethod
    def around(cls, k: Tensor, v: Tensor, config: UniqueConfig) -> BlockStorage:
        """Keys and values ``[num_blocks, H, block_size, D]`` that are in blocks already, and an index, not yet made."""
        with torch.inference_mode(False):  # the index may outlive the inference mode it began in
            index = _index_of(k, config)
        around = GrowingTensor.around
        return cls(around(k), around(v), around(index))

    @property
    def k(self) -> Tensor:
        return self._k.tensor

    @property
    def v(self) -> Tensor:
        return self._v.tensor

    @property
    def index(self) -> Tensor:
        return self._index.tensor

    @property
    def block_bytes(self) -> int:
        """Of keys, values and index of one block."""
        return sum(part[:1].nbytes for part in (self.k, self.v, self.index))

    def fit(self, num_blocks: int) -> None:
        """Have at least ``num_blocks`` blocks, up to ``capacity``; those that there are stay as they are."""
        if num_blocks <= self.num_blocks:
            return
        for part in (self._k, self._v, self._index):
            part.grow(num_blocks)
        with torch.inference_mode(False):
            self.index[self.num_blocks : num_blocks].zero_()
        self.num_blocks = num_blocks

    @torch.no_grad()
    def moved(self, num_blocks: int, config: UniqueConfig) -> BlockStorage:
        """A copy with room for ``num_blocks`` blocks and more to come."""
        like = self.k[:0].transpose(0, 1).flatten(1, 2)[None]  # [1, H, 0, D]
        copy = BlockStorage.create(num_blocks, like, self.k.shape[2], config)
        for to, of in ((copy.k, self.k), (copy.v, self.v), (copy.index, self.index)):
            to[: self.num_blocks].copy_(of[: self.num_blocks])
        return copy

    def trim(self) -> None:
        """Give all memory back; the places of the tensors stay."""
        for part in (self._k, self._v, self._index):
            part.trim()
        self.num_blocks = 0


def kind_of(like: Tensor, block_size: int, config: UniqueConfig) -> Kind:
    """Of storage that :meth:`BlockStorage.create` makes of these."""
    heads, dim = like.shape[1], like.shape[3]
    return (heads, dim, like.dtype, like.device, block_size, config.rule, config.page_size, config.index_format)


def _index_of(blocks: Tensor, config: UniqueConfig) -> Tensor:
    return new_index(blocks, rule=config.rule, page_size=config.page_size, index_format=config.index_format)
