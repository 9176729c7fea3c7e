"""Who owns which block of a paged cache: the part that all layers of a model share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unique_attn._runtime import PagePool, PoolFullError

if TYPE_CHECKING:
    from unique_attn.paging import LayerPages

SPARE_TOKENS = 256  # per sequence: that many more than there are fit into a new pool, or into one that grows
MIN_TABLE_WIDTH = 8  # blocks


def table_width(num_blocks: int) -> int:
    """Columns of a block table for rows of up to ``num_blocks`` blocks: 8, 12, 16, 24, 32, 48, ...

    Few widths, so that whatever depends on the shape of a table (plans, graphs, compiled code) is made seldom.
    """
    width = MIN_TABLE_WIDTH
    while width < num_blocks:
        half = width + width // 2
        if half >= num_blocks:
            return half
        width *= 2
    return width


class OutOfStepError(RuntimeError):
    """The layers of a cache did not all go through the same operations, so their contents no longer agree."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. A forward pass was interrupted (then reset() the cache), or some layers are skipped, cut or "
            "changed alone (then list them in dense_layers)."
        )


class SharedPool(PagePool):
    """A :class:`.PagePool` whose blocks several threads may use, each under the lock (:meth:`LayerPages.exclusive`)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size)
        self.lock = threading.RLock()


class Change(NamedTuple):
    """One operation on a :class:`PagedTable`, by which its layers tell whether they are at the same one."""

    name: str
    argument: Any

    def is_same(self, name: str, argument: Any) -> bool:
        if name != self.name:
            return False
        if argument is self.argument:
            return True
        if isinstance(argument, Tensor) or isinstance(self.argument, Tensor):
            both = isinstance(argument, Tensor) and isinstance(self.argument, Tensor)
            return both and argument.shape == self.argument.shape and torch.equal(argument, self.argument)
        return bool(argument == self.argument)


@dataclass
class _DeviceTables:
    seq_lens: Tensor | None = None  # int32 [B]
    block_table: Tensor | None = None  # int32 [B, max_blocks]
    padding: Tensor | None = None  # int64 [B]
    slots: tuple[int, int, Tensor] | None = None  # begin, end, int64 [B, end - begin]


class PagedTable:
    """The sequences of one cache in a :class:`.PagePool`: which block holds which token, for all layers at once.

    The layers of a model all go through the same operations, one layer after the other. The first layer to
    reach an operation has it carried out here, with the copies of blocks that it takes in the storage of every layer;
    the others find its ``Change``. To tell which is which, a layer passes the ``version`` it has reached;
    afterwards it is at the next one. A layer that fell out of step (an exception in the middle of a forward, say) gets
    an :class:`OutOfStepError`.

    Positions: row b holds ``length`` tokens, of which the first ``padding[b]`` are left padding that is not stored.
    """

    def __init__(self, pool: SharedPool, seqs: list[int], lengths: list[int], padding: list[int]) -> None:
        self.pool = pool
        self.storages: list[LayerPages] = []  # of the layers that are on pages
        self.seqs = seqs
        self.lengths = lengths  # stored tokens of each row
        self.padding = padding  # left padding of each row
        self.version = 0
        self.last: Change | None = None  # what led to this version
        self._ahead: int | None = 0  # blocks for which memory is being made; None if there was none
        self.layout = object()  # another one whenever a row gets other blocks
        self.lease: Any = None  # what lends the storage, if something does: kept as long as the table and its forks
        self._devices: dict[torch.device, _DeviceTables] = {}

    @classmethod
    def create(cls, length: int, padding: Sequence[int], block_size: int) -> PagedTable:
        """A pool and in it one sequence of ``length - padding[b]`` tokens for each row b."""
        lengths = [length - pad for pad in padding]
        blocks = sum(-(-(tokens + SPARE_TOKENS) // block_size) for tokens in lengths)
        pool = SharedPool(num_blocks=blocks, block_size=block_size)
        seqs = [pool.create() for _ in lengths]
        pool.append_many(seqs, lengths)
        return cls(pool, seqs, lengths, list(padding))

    # ---- Shape. ----

    @property
    def batch(self) -> int:
        return len(self.seqs)

    @property
    def length(self) -> int:
        """Tokens of a row, padding included; the same for every row."""
        return self.lengths[0] + self.padding[0] if self.seqs else 0

    # ---- Operations, each carried out once for all layers. ----

    def append(self, version: int, num_tokens: int) -> None:
        """Make room for ``num_tokens`` more tokens in every row."""
        self._once(version, "append", num_tokens, lambda: self._append(num_tokens))

    def truncate(self, version: int, length: int) -> None:
        """Drop the tokens from row position ``length`` on."""
        self._once(version, "truncate", length, lambda: self._truncate(length))

    def select(self, version: int, rows: Any) -> None:
        """Replace the rows by ``rows``, whatever can index a batch dimension; one row may appear several times."""
        self._once(version, "select", rows, lambda: self._select(self._row_numbers(rows)))

    def repeat(self, version: int, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        rows = [row for row in range(self.batch) for _ in range(repeats)]
        self._once(version, "repeat", repeats, lambda: self._select(rows))

    def _once(self, version: int, name: str, argument: Any, run: Callable[[], None]) -> None:
        self.check(version, name, argument)
        if version == self.version:
            run()
            self.last = Change(name, argument)
            self.version += 1

    def check(self, version: int, name: str, argument: Any) -> None:
        """Whether a layer that has reached ``version`` may do an operation.

        Raises:
            OutOfStepError: other layers did another one, or more of them.
        """
        if version == self.version:
            return
        if version != self.version - 1 or self.last is None or not self.last.is_same(name, argument):
            raise OutOfStepError(f"{name}: this layer is at operation {version}, its cache at {self.version}")

    def _append(self, num_tokens: int) -> None:
        counts, blocks = [num_tokens] * self.batch, self.pool.num_blocks
        try:
            copies = self.pool.append_many(self.seqs, counts)
        except PoolFullError as full:
            have = self.pool.num_blocks
            self.pool.grow(have + max(full.needed - full.free, self._spare_blocks()))
            copies = self.pool.append_many(self.seqs, counts)
        # In every layer now: what is to be copied stays as it is only until another sequence goes on.
        if copies or self.pool.num_blocks != blocks:
            for storage in self.storages:
                storage.fit()
                storage.copy_blocks(copies)
        size = self.pool.block_size
        new_blocks = copies or any(-(-n // size) != -(-(n + num_tokens) // size) for n in self.lengths)
        self.lengths = [n + num_tokens for n in self.lengths]
        if new_blocks:
            self.layout = object()
        for tables in self._devices.values():
            tables.slots = None
            if new_blocks:
                tables.block_table = None
            if tables.seq_lens is not None:  # advance on the device: nothing is uploaded in most steps
                tables.seq_lens = tables.seq_lens + num_tokens

    def grow_ahead(self) -> None:
        """Have memory for blocks to come, a few layers at each call, so that no step has to grow them all.

        To be called while the device is busy. Where there is none, that is left to the step that cannot do without.
        """
        if self._ahead is not None:
            try:
                self._grow_ahead(self._ahead)
            except torch.OutOfMemoryError:
                self._ahead = None  # asking again in every step would take time

    def _grow_ahead(self, ahead: int) -> None:
        pool = self.pool
        if ahead <= pool.num_blocks:
            if pool.num_free >= 2 * self.batch:
                return
            self._ahead = ahead = pool.num_blocks + self._spare_blocks()
        behind = [each.storage for each in self.storages if each.storage.num_blocks < ahead]
        a_few = -(-len(self.storages) * 2 // pool.block_size)  # done before the blocks that there are have been filled
        for storage in behind[:a_few]:
            if ahead <= storage.capacity:
                storage.fit(ahead)
        if len(behind) <= a_few:
            pool.grow(ahead)

    def _spare_blocks(self) -> int:
        return max(self.pool.num_blocks // 16, self.batch * SPARE_TOKENS // self.pool.block_size, 1)

    def _truncate(self, length: int) -> None:
        self.padding = [min(pad, length) for pad in self.padding]
        self.lengths = [length - pad for pad in self.padding]
        for seq, tokens in zip(self.seqs, self.lengths):
            self.pool.truncate(seq, tokens)
        self._forget()

    def _select(self, rows: list[int]) -> None:
        if rows == list(range(self.batch)):
            return
        seqs: list[int] = []
        kept: set[int] = set()
        for row in rows:  # the first use of a row keeps its sequence, further ones share its blocks
            seqs.append(self.pool.fork(self.seqs[row]) if row in kept else self.seqs[row])
            kept.add(row)
        for row, seq in enumerate(self.seqs):
            if row not in kept:
                self.pool.free(seq)
        self.seqs = seqs
        self.lengths = [self.lengths[row] for row in rows]
        self.padding = [self.padding[row] for row in rows]
        self._forget()

    def _forget(self) -> None:
        self.layout = object()
        self._devices.clear()

    def _row_numbers(self, rows: Any) -> list[int]:
        if isinstance(rows, Tensor):
            rows = rows.cpu()
        return [int(row) for row in torch.arange(self.batch, device="cpu")[rows].reshape(-1).tolist()]

    def advanced_elsewhere(self) -> None:
        """Lengths on devices are behind, because a captured step counts in its own."""
        for tables in self._devices.values():
            tables.seq_lens = None

    # ---- What the ops take. Made once per step and device, shared by the layers. ----

    def _on(self, device: torch.device) -> _DeviceTables:
        return self._devices.setdefault(device, _DeviceTables())

    def seq_lens(self, device: torch.device) -> Tensor:
        """int32 ``[B]``: stored tokens of each row."""
        tables = self._on(device)
        if tables.seq_lens is None:
            tables.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
        return tables.seq_lens

    def block_table(self, device: torch.device) -> Tensor:
        """int32 ``[B, max_blocks]``, -1 behind a row's last block."""
        tables = self._on(device)
        if tables.block_table is None:
            tables.block_table = self.host_table().to(device, non_blocking=True)
        return tables.block_table

    @property
    def width(self) -> int:
        """Columns of the block table."""
        return self.width_after(0)

    def width_after(self, num_tokens: int) -> int:
        """Columns of the block table once every row has ``num_tokens`` more tokens."""
        return table_width(-(-(max(self.lengths, default=0) + num_tokens) // self.pool.block_size))

    def host_table(self) -> Tensor:
        """The block table on the host."""
        return torch.from_numpy(self.pool.block_table(self.seqs, self.width))

    def padding_on(self, device: torch.device) -> Tensor:
        """int64 ``[B]``: left padding of each row."""
        tables = self._on(device)
        if tables.padding is None:
            tables.padding = torch.tensor(self.padding, dtype=torch.long, device="cpu").to(device, non_blocking=True)
        return tables.padding

    def slots(self, begin: int, end: int, device: torch.device) -> Tensor:
        """int64 ``[B, end - begin]``: slot of each token of the row positions ``[begin, end)``, -1 for padding."""
        tables = self._on(device)
        if tables.slots is None or tables.slots[:2] != (begin, end):
            slots = np.full((self.batch, end - begin), -1, dtype=np.int64)
            for row, (seq, pad) in enumerate(zip(self.seqs, self.padding)):
                first = max(begin, pad)
                if first < end:
                    slots[row, first - begin :] = self.pool.slots(seq, first - pad, end - pad)
            tables.slots = (begin, end, torch.from_numpy(slots).to(device, non_blocking=True))
        return tables.slots[2]

    # ---- Copies and the end. ----

    def fork(self) -> PagedTable:
        """A table with the same rows that shares all blocks until one of the two writes to them."""
        copy = PagedTable(self.pool, [self.pool.fork(s) for s in self.seqs], list(self.lengths), list(self.padding))
        copy.version, copy.last, copy.storages = self.version, self.last, list(self.storages)
        copy.layout, copy.lease = self.layout, self.lease
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedTable:
        return memo.setdefault(id(self), self.fork())

    def __del__(self) -> None:
        pool = getattr(self, "pool", None)
        if pool is not None:  # forks may live on in the pool
            for seq in self.seqs:
                pool.free(seq)
