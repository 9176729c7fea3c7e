"""Page-sparse decoding over paged keys and values: who owns which block, one layer's storage, one decode step.

Works on tensors alone; the Hugging Face cache and any other engine build on it. :class:`PagedTable` is the part that
all layers of a model share, :class:`LayerPages` what each layer has of its own.

Several tables may share one :class:`SharedPool`, and so the storage of its blocks: the forks of a cache. Each of them
may be used by another thread, if every use is inside :meth:`LayerPages.exclusive`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unique_attn import ops
from unique_attn._runtime import PagePool, PoolFullError
from unique_attn.config import UniqueConfig
from unique_attn.rules import MAX_GROUP, MAX_HEAD_DIM, MAX_QUERY_TOKENS

SPARE_TOKENS = 256  # per sequence, in a new pool
TABLE_STEP = 8  # the width of a block table is a multiple of this, so that it rarely changes its shape


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
    the others find its :class:`Change`. To tell which is which, a layer passes the ``version`` it has reached;
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
        if version == self.version:
            run()
            self.last = Change(name, argument)
            self.version += 1
        elif version != self.version - 1 or self.last is None or not self.last.is_same(name, argument):
            raise OutOfStepError(f"{name}: this layer is at operation {version}, its cache at {self.version}")

    def _append(self, num_tokens: int) -> None:
        counts = [num_tokens] * self.batch
        try:
            copies = self.pool.append_many(self.seqs, counts)
        except PoolFullError as full:
            have = self.pool.num_blocks
            self.pool.grow(max(have + full.needed - full.free, have + have // 2))
            copies = self.pool.append_many(self.seqs, counts)
        # In every layer now: what is to be copied stays as it is only until another sequence goes on.
        for storage in self.storages:
            storage.fit()
            storage.copy_blocks(copies)
        size = self.pool.block_size
        new_blocks = copies or any(-(-n // size) != -(-(n + num_tokens) // size) for n in self.lengths)
        self.lengths = [n + num_tokens for n in self.lengths]
        for tables in self._devices.values():
            tables.slots = None
            if new_blocks:
                tables.block_table = None
            if tables.seq_lens is not None:  # advance on the device: nothing is uploaded in most steps
                tables.seq_lens = tables.seq_lens + num_tokens

    def _truncate(self, length: int) -> None:
        self.padding = [min(pad, length) for pad in self.padding]
        self.lengths = [length - pad for pad in self.padding]
        for seq, tokens in zip(self.seqs, self.lengths):
            self.pool.truncate(seq, tokens)
        self._devices.clear()

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
        self._devices.clear()

    def _row_numbers(self, rows: Any) -> list[int]:
        if isinstance(rows, Tensor):
            rows = rows.cpu()
        return [int(row) for row in torch.arange(self.batch, device="cpu")[rows].reshape(-1).tolist()]

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
            needed = max((-(-n // self.pool.block_size) for n in self.lengths), default=0)
            width = max(1, -(-needed // TABLE_STEP)) * TABLE_STEP
            table = torch.from_numpy(self.pool.block_table(self.seqs, width))
            tables.block_table = table.to(device, non_blocking=True)
        return tables.block_table

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
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedTable:
        return memo.setdefault(id(self), self.fork())

    def __del__(self) -> None:
        pool = getattr(self, "pool", None)
        if pool is not None:  # forks may live on in the pool
            for seq in self.seqs:
                pool.free(seq)


class LayerPages:
    """Keys, values and page index of one layer: ``k``, ``v`` ``[num_blocks, H, block_size, D]`` and ``index``."""

    def __init__(
        self, pool: SharedPool, keys: Tensor, config: UniqueConfig, storage: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Storage for the blocks of ``pool``; heads, head dim, dtype and device as ``keys`` ``[B, H, L, D]``.

        ``storage``: ``k`` and ``v`` to use instead of new ones; :meth:`reindex` them.
        """
        self.pool = pool
        self.config = config
        shape = (pool.num_blocks, keys.shape[1], pool.block_size, keys.shape[3])
        with torch.inference_mode(False):  # the cache may outlive the inference mode it began in
            if storage is None:
                new = torch.empty(shape, dtype=keys.dtype, device=keys.device)
                storage = new, torch.empty_like(new)
            self.k, self.v = storage
            if self.device.type == "cuda":
                self._stream = torch.cuda.current_stream(self.device)  # where the blocks were used last
            self.index = ops.new_index(
                self.k, rule=config.rule, page_size=config.page_size, index_format=config.index_format
            )

    @property
    def device(self) -> torch.device:
        return self.k.device

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While inside, no other thread uses the blocks of the pool. Work on another stream waits for that so far."""
        with self.pool.lock:
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device)
                if stream != self._stream:
                    stream.wait_stream(self._stream)
                    self._stream = stream
                    for tensor in (self.k, self.v, self.index):
                        tensor.record_stream(stream)
            yield

    def fit(self) -> None:
        """Grow to the blocks of the pool."""
        missing = self.pool.num_blocks - self.k.shape[0]
        if missing > 0:
            with torch.inference_mode(False):
                self.k, self.v, self.index = (_longer(old, missing) for old in (self.k, self.v, self.index))

    @torch.no_grad()
    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks ``src`` to ``dst``, given as pairs."""
        if copies:
            src, dst = torch.tensor(copies, device="cpu").to(self.device, non_blocking=True).unbind(1)
            for tensor in (self.k, self.v, self.index):
                tensor[dst] = tensor[src]

    @torch.no_grad()
    def write(self, k: Tensor, v: Tensor, table: PagedTable, begin: int) -> None:
        """Store ``k`` and ``v`` ``[B, H, n, D]`` at the row positions from ``begin`` on, and index their pages."""
        end = begin + k.shape[2]
        slots = table.slots(begin, end, self.device)
        for row in range(table.batch):  # row by row: views of k and v, where all at once would copy them
            ops.append_kv(
                _unit_stride(k[row].transpose(0, 1)), _unit_stride(v[row].transpose(0, 1)), self.k, self.v, slots[row]
            )
        seq_lens = table.seq_lens(self.device)
        after = table.length - end  # tokens that the table already has behind these
        self.reindex(table.block_table(self.device), seq_lens - after, k.shape[2])

    def reindex(self, block_table: Tensor, seq_lens: Tensor, num_tokens: int) -> None:
        """Index the pages of the last ``num_tokens`` of ``seq_lens`` ``[B]`` tokens, which are stored."""
        ops.page_index(
            self.k,
            self.index,
            block_table,
            (seq_lens - num_tokens).clamp_(min=0),
            seq_lens,
            max_new_tokens=num_tokens,
            rule=self.config.rule,
            page_size=self.config.page_size,
            index_format=self.config.index_format,
        )

    def gather(self, table: PagedTable, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` keys and values ``[B, H, length, D]`` of each row, zeros in the padding."""
        slots = table.slots(0, length, self.device)
        padding = (slots < 0)[:, None, :, None] if any(table.padding) else None
        size = self.k.shape[2]
        blocks, offsets = slots.clamp(min=0) // size, slots.clamp(min=0) % size

        def read(blocks_of: Tensor) -> Tensor:
            rows = blocks_of.transpose(1, 2)[blocks, offsets].transpose(1, 2).contiguous()
            return rows if padding is None else rows.masked_fill_(padding, 0)

        return read(self.k), read(self.v)

    def step(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        block_table: Tensor,
        seq_lens: Tensor,
        num_pages: int,
        scale: float | None,
        window: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``ops.unique_decode`` of q, k and v in ``new``, at most ``MAX_QUERY_TOKENS`` tokens, with the settings."""
        config = self.config
        return ops.unique_decode(
            *new,
            self.k,
            self.v,
            self.index,
            block_table,
            seq_lens,
            num_pages,
            rule=config.rule,
            page_size=config.page_size,
            spread_weight=config.spread_weight,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
            scale=scale,
            window=window,
            index_format=config.index_format,
        )

    @torch.no_grad()
    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, table: PagedTable, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store the last T tokens of every row, whose room the table has, and attend with their queries.

        Args:
            q: ``[B, T, Hq, D]``.
            k: ``[B, T, H, D]``.
            v: like ``k``.
            table: after its ``append`` of T tokens.
            scale: factor of the logits; ``None`` for ``1 / sqrt(D)``.

        Returns:
            ``out`` ``[B, T, Hq, D]``, ``lse`` ``[B, T, Hq]`` and the selected ``pages`` ``[B, T, H, num_pages]``.
        """
        num_tokens = q.shape[1]
        seq_lens, block_table = table.seq_lens(self.device), table.block_table(self.device)
        k, v = _unit_stride(k), _unit_stride(v)

        def piece(begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
            lens = seq_lens if end == num_tokens else seq_lens - (num_tokens - end)
            new = (q[:, begin:end], k[:, begin:end], v[:, begin:end])
            return self.step(new, block_table, lens, self.config.num_pages, scale)

        if num_tokens <= MAX_QUERY_TOKENS:  # longer steps run in pieces
            return piece(0, num_tokens)
        borders = [*range(0, num_tokens, MAX_QUERY_TOKENS), num_tokens]
        outs, lses, pages = zip(*(piece(begin, end) for begin, end in pairwise(borders)))
        return torch.cat(outs, 1), torch.cat(lses, 1), torch.cat(pages, 1)


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the ops cannot take these queries, keys and values (``[B, heads, n, D]``), or None if they can."""
    q_heads, kv_heads, dim = q.shape[1], k.shape[1], k.shape[3]
    if v.shape[1] != kv_heads or v.shape[3] != dim or q.shape[3] != dim:
        return f"query, key and value heads differ in size ({q.shape[3]}, {dim}, {v.shape[3]})"
    if dim % 8 or dim > MAX_HEAD_DIM:
        return f"its head dim {dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    if q_heads % kv_heads or q_heads // kv_heads > MAX_GROUP:
        return f"its {q_heads} query heads do not share {kv_heads} KV heads in groups of up to {MAX_GROUP}"
    if not _runs_on(q.device.type):
        return f"this build of the ops does not run on {q.device.type}"
    allowed = [torch.bfloat16, torch.float16, torch.float32] + [torch.float64] * (q.device.type == "cpu")
    if not (q.dtype == k.dtype == v.dtype and k.dtype in allowed):
        return f"the ops do not take {q.dtype}, {k.dtype}, {v.dtype}"
    return None


@torch.compiler.assume_constant_result
def _runs_on(device_type: str) -> bool:
    return _has_kernel(device_type)


@cache
def _has_kernel(device_type: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("unique_attn::unique_decode", key)


def _longer(tensor: Tensor, missing: int) -> Tensor:
    if tensor.is_cuda:  # it may have been allocated on another stream than that of the copy
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))])


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
