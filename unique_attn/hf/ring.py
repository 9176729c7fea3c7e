"""A sliding-window layer of a cache whose tokens are in a ring of blocks, which captured steps write to and read."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from unique_attn import ops
from unique_attn.block_storage import BlockStorage
from unique_attn.config import UniqueConfig
from unique_attn.hf.compat import DynamicSlidingWindowLayer
from unique_attn.paging import LayerPages, PagedTable


def ring_blocks(window: int, block_size: int) -> int:
    """Blocks of a row: those that a window may touch, and one that is not needed while it is written to."""
    return -(-window // block_size) + 2


def ring_table(batch: int, width: int, blocks: int, device: torch.device) -> Tensor:
    """int32 ``[B, width]``: a block table in which a row's blocks come again after ``blocks`` of them.

    Only what is in the window is ever read, and by then nothing has been written over it.
    """
    rows = torch.arange(batch, device=device)[:, None] * blocks
    return (rows + torch.arange(width, device=device)[None] % blocks).to(torch.int32)


class RingLayer(DynamicSlidingWindowLayer):
    """A stock layer with a sliding window in another place.

    :meth:`advance` counts what captured steps store. Whoever asks for keys or values, transformers included, gets them
    as the stock layer would have them, and the ring is left.
    """

    pages: LayerPages | None
    table: PagedTable
    user: weakref.ref[Any] | None
    _lock: Any
    _keys: Tensor | None
    _values: Tensor | None
    _dtype: torch.dtype

    @classmethod
    def enter(cls, stock: DynamicSlidingWindowLayer, pages: LayerPages, table: PagedTable, lock: Any) -> RingLayer:
        """A layer with the contents of ``stock``, written into the ring of ``pages``."""
        layer = cls.__new__(cls)
        for name, value in vars(stock).items():
            layer.__dict__["_" + name if name in ("keys", "values") else name] = value
        layer.pages, layer.table, layer._lock = pages, table, lock
        layer.user = None
        layer._write()
        return layer

    # ---- What transformers sees. ----

    @property
    def keys(self) -> Tensor | None:
        """``[B, H, up to window - 1, D]``: the ring is left."""
        self.leave()
        return self._keys

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self.leave()
        self._keys = value

    @property
    def values(self) -> Tensor | None:
        """Like :attr:`keys`."""
        self.leave()
        return self._values

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self.leave()
        self._values = value

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the stock layer, which counts the new tokens before it looks at the old ones."""
        self.leave()
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> RingLayer:
        self.leave()
        layer = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            layer.__dict__[name] = value if name in ("_lock", "table") else copy.deepcopy(value, memo)
        return layer

    def __copy__(self) -> RingLayer:
        self.leave()
        layer = type(self).__new__(type(self))
        vars(layer).update(vars(self))
        return layer

    def __reduce__(self) -> Any:
        return self.as_stock().__reduce_ex__(2)

    def as_stock(self) -> DynamicSlidingWindowLayer:
        """A stock layer with the same contents, for which the ring is left."""
        self.leave()
        stock = DynamicSlidingWindowLayer.__new__(DynamicSlidingWindowLayer)
        ours = ("_dtype", "_lock", "pages", "table", "user")
        kept = {name: value for name, value in vars(self).items() if name not in ours}
        kept["keys"], kept["values"] = kept.pop("_keys"), kept.pop("_values")
        vars(stock).update(kept)
        return stock

    # ---- Captured steps. ----

    def settled(self) -> tuple[LayerPages, PagedTable] | None:
        """Pages and table, or None if the ring was left."""
        return None if self.pages is None else (self.pages, self.table)

    def is_at(self, table: PagedTable, storage: BlockStorage) -> bool:
        """Whether the layer is in the ring of ``storage`` and belongs to ``table``."""
        return self.pages is not None and self.pages.storage is storage and self.table is table

    def advance(self) -> None:
        """Count a token that a captured step stores."""
        self.cumulative_length += 1

    def take_back(self) -> None:
        """Undo :meth:`advance`."""
        self.cumulative_length -= 1

    def leave(self) -> None:
        """Be a stock layer again."""
        if vars(self).get("pages") is None:
            return
        with self._lock, torch.inference_mode(False), torch.no_grad():
            pages = self.pages
            if pages is None:
                return
            slots = self._slots()
            padding = (slots < 0)[:, None, :, None]
            size = pages.k.shape[2]
            blocks, offsets = slots.clamp(min=0) // size, slots.clamp(min=0) % size
            found = (part.transpose(1, 2)[blocks, offsets].transpose(1, 2) for part in (pages.k, pages.v))
            self._keys, self._values = (part.masked_fill(padding, 0).to(self._dtype) for part in found)
            self.pages = None

    def _write(self) -> None:
        pages, keys, values = self.pages, self._keys, self._values
        assert pages is not None
        assert keys is not None
        assert values is not None
        self._dtype = keys.dtype
        slots = self._slots()[:, -keys.shape[2] :]
        for row in range(keys.shape[0]):  # row by row: views of keys and values, where all at once would copy them
            k, v = (part[row].transpose(0, 1).to(pages.k.dtype) for part in (keys, values))
            ops.append_kv(k, v, pages.k, pages.v, slots[row])
        self._keys = self._values = None

    def _slots(self) -> Tensor:
        """int64 ``[B, n]``: where the last n tokens are that the stock layer would hold; -1 for padding."""
        pages, table = self.pages, self.table
        assert pages is not None
        size = pages.k.shape[2]
        length = min(self.cumulative_length, self.sliding_window - 1)
        first = self.cumulative_length - length
        padding = table.padding_on(pages.device)
        tokens = torch.arange(first, first + length, device=pages.device)[None] - padding[:, None]
        blocks = ring_blocks(self.sliding_window, size)
        rows = torch.arange(table.batch, device=pages.device)[:, None] * blocks
        slots = (rows + tokens // size % blocks) * size + tokens % size
        return torch.where(tokens < 0, -1, slots)


def join_ring(stock: Any, number: int, table: PagedTable, length: int, config: UniqueConfig) -> RingLayer | str:
    """A ring with the contents of a stock layer, or why there can be none.

    Args:
        stock: of the kind that it is named after.
        number: of the layer.
        table: of the other layers.
        length: tokens of a row that the layer should have seen.
        config: settings.
    """
    if getattr(stock, "record_past", False):
        return "it keeps tokens before its window"
    if not stock.is_initialized or stock.keys is None or stock.keys.shape != stock.values.shape:
        return "it has no keys and values of one size"
    if stock.keys.shape[0] != table.batch or stock.cumulative_length != length:
        return "it holds other tokens than the others"
    pages = table.lease.ring(number, table, stock, config)
    layer = RingLayer.enter(stock, pages, table, table.pool.lock)
    table.lease.arena.in_ring[number] = weakref.ref(layer)
    return layer
