"""Places for the pages of a model's layers that outlive a cache, so that a step captured there serves the next one."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from unique_attn.block_storage import BlockStorage, kind_of
from unique_attn.config import UniqueConfig
from unique_attn.hf.ring import ring_blocks
from unique_attn.ops._autocast import autocast_inputs
from unique_attn.paging import LayerPages, PagedTable, SharedPool

MAX_GRAPHS = 8  # of one arena: the least recently used one goes first
MAX_IDLE = 2  # arenas that no cache uses
_IDLE_SHARE = 64  # an idle arena keeps its memory up to this part of the device


class Arena:
    """The storage of one cache at a time, layer by layer, and the steps that were captured over it.

    Attributes:
        storages: of the layers that are on pages, in the order in which they turned to them.
        rings: of layers with a sliding window, by the number of the layer.
        graphs: captured steps by the facts of a call.
    """

    def __init__(self) -> None:
        self.storages: list[BlockStorage] = []
        self.rings: dict[int, BlockStorage] = {}
        self.in_ring: dict[int, weakref.ref[Any]] = {}  # the layer whose tokens a ring holds
        self.graphs: OrderedDict[Any, Any] = OrderedDict()
        self.memory_pool: Any = None  # that all graphs allocate from

    def storage(self, number: int, pool: SharedPool, like: Tensor, config: UniqueConfig) -> BlockStorage:
        """The storage of the layer ``number`` with room for the blocks of ``pool``; see :meth:`BlockStorage.create`."""
        wanted = kind_of(like, pool.block_size, config)
        if number < len(self.storages):
            found = self.storages[number]
            if found.kind == wanted and found.capacity >= pool.num_blocks:
                found.fit(pool.num_blocks)
                return found
        self.graphs.clear()
        del self.storages[number:]
        self.storages.append(BlockStorage.create(pool.num_blocks, like, pool.block_size, config))
        return self.storages[number]

    def ring(self, number: int, blocks: int, block_size: int, like: Tensor, config: UniqueConfig) -> BlockStorage:
        """The ring of the layer ``number``, which whoever had it leaves."""
        layer = self.in_ring.pop(number, lambda: None)()
        if layer is not None:
            layer.leave()
        found = self.rings.get(number)
        if found is None or found.kind != kind_of(like, block_size, config) or found.capacity < blocks:
            self.graphs.clear()
            found = self.rings[number] = BlockStorage.create(blocks, like, block_size, config)
        found.fit(blocks)
        return found

    def keep(self, key: Any, graph: Any) -> None:
        self.graphs[key] = graph
        while len(self.graphs) > MAX_GRAPHS:
            self.graphs.popitem(last=False)

    def trim(self) -> None:
        """Give memory back that is worth it; the graphs stay valid, because the places stay."""
        places = [*self.storages, *self.rings.values()]
        num_bytes = sum(each.num_blocks * each.block_bytes for each in places)
        device = self.storages[0].k.device if self.storages else None
        if device is None or device.type != "cuda":
            return
        if num_bytes > torch.cuda.get_device_properties(device).total_memory // _IDLE_SHARE:
            for each in places:
                each.trim()


class Arenas:
    """The arenas of a model that no cache uses at the moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Arena] = []
        self._all: weakref.WeakSet[Arena] = weakref.WeakSet()

    def lend(self) -> Lease:
        """One for a cache that is about to turn to pages: the one used last, or a new one."""
        with self._lock:
            arena = self._idle.pop() if self._idle else Arena()
            self._all.add(arena)
            return Lease(self, arena)

    def take_back(self, arena: Arena) -> None:
        device = arena.storages[0].k.device
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return  # waiting would end the capture; the arena goes
            torch.cuda.synchronize(device)  # whoever is next may use it from another stream
        arena.trim()
        with self._lock:
            self._idle.append(arena)
            del self._idle[:-MAX_IDLE]

    def clear(self) -> None:
        """Let go of all graphs, and of the arenas that no cache uses."""
        with self._lock:
            for arena in self._all:
                arena.graphs.clear()
            self._idle.clear()


class Lease:
    """An arena for as long as somebody holds this."""

    def __init__(self, arenas: Arenas, arena: Arena) -> None:
        self._arenas = arenas
        self.arena = arena

    def storage(self, number: int, pool: SharedPool, like: Tensor, config: UniqueConfig) -> BlockStorage:
        """As :meth:`Arena.storage`."""
        return self.arena.storage(number, pool, like, config)

    def ring(self, number: int, table: PagedTable, stock: Any, config: UniqueConfig) -> LayerPages:
        """A ring for the tokens of a stock layer with a sliding window."""
        size = table.pool.block_size
        (like,) = autocast_inputs(stock.keys[:, :, :0])
        blocks = table.batch * ring_blocks(stock.sliding_window, size)
        return LayerPages(table.pool, self.arena.ring(number, blocks, size, like, config), config)

    def __del__(self) -> None:
        arenas = getattr(self, "_arenas", None)
        if arenas is not None and torch is not None and self.arena.storages:
            arenas.take_back(self.arena)
