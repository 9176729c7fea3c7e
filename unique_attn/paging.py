"""Page-sparse decoding over paged keys and values: who owns which block, one layer's storage, one decode step.

Works on tensors alone; the Hugging Face cache and any other engine build on it. :class:`PagedTable` is the part that
all layers of a model share, :class:`LayerPages` what each layer has of its own.

Several tables may share one :class:`SharedPool`, and so the storage of its blocks: the forks of a cache. Each of them
may be used by another thread, if every use is inside :meth:`LayerPages.exclusive`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from unique_attn import ops
from unique_attn.block_storage import BlockStorage
from unique_attn.config import UniqueConfig
from unique_attn.page_table import OutOfStepError, PagedTable, SharedPool
from unique_attn.rules import MAX_GROUP, MAX_HEAD_DIM, MAX_PAGES, MAX_QUERY_TOKENS, PAGE_SIZES

__all__ = ["BlockStorage", "LayerPages", "OutOfStepError", "PagedTable", "SharedPool", "unsupported"]


class LayerPages:
    """Keys, values and page index of one layer: ``k``, ``v`` ``[num_blocks, H, block_size, D]`` and ``index``.

    Args:
        pool: whose blocks they are.
        storage: where they are, with at least the blocks of the pool.
        config: settings.
    """

    def __init__(self, pool: SharedPool, storage: BlockStorage, config: UniqueConfig) -> None:
        self.pool = pool
        self.config = config
        self.storage = storage
        if self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device)  # where the blocks were used last

    @property
    def k(self) -> Tensor:
        return self.storage.k

    @property
    def v(self) -> Tensor:
        return self.storage.v

    @property
    def index(self) -> Tensor:
        return self.storage.index

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
            yield

    def fit(self) -> None:
        """Grow to the blocks of the pool."""
        if self.pool.num_blocks <= self.storage.num_blocks:
            return
        if self.pool.num_blocks > self.storage.capacity:
            self.storage = self.storage.moved(self.pool.num_blocks, self.config)
        self.storage.fit(self.pool.num_blocks)

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
        new: tuple[Tensor, Tensor | None, Tensor | None],
        block_table: Tensor,
        seq_lens: Tensor,
        num_pages: int,
        scale: float | None,
        window: int = 0,
        budget_pages: Tensor | None = None,
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
            budget_pages=budget_pages,
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
        seq_lens, block_table = table.seq_lens(self.device), table.block_table(self.device)
        return self.attend(q, _unit_stride(k), _unit_stride(v), block_table, seq_lens, self.config.num_pages, scale)

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        block_table: Tensor,
        seq_lens: Tensor,
        num_pages: int,
        scale: float | None,
        budget_pages: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`decode`, for tokens that ``seq_lens`` counts; k and v are None if they are stored."""
        num_tokens = q.shape[1]

        def piece(begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
            lens = seq_lens if end == num_tokens else seq_lens - (num_tokens - end)
            new = (q[:, begin:end], None if k is None else k[:, begin:end], None if v is None else v[:, begin:end])
            return self.step(new, block_table, lens, num_pages, scale, budget_pages=budget_pages)

        if num_tokens <= MAX_QUERY_TOKENS:  # longer steps run in pieces
            return piece(0, num_tokens)
        borders = [*range(0, num_tokens, MAX_QUERY_TOKENS), num_tokens]
        outs, lses, pages = zip(*(piece(begin, end) for begin, end in pairwise(borders)))
        return torch.cat(outs, 1), torch.cat(lses, 1), torch.cat(pages, 1)

    @torch.no_grad()
    def lse_of_all(self, q: Tensor, block_table: Tensor, seq_lens: Tensor, length: int, scale: float | None) -> Tensor:
        """Logarithm of the softmax normalizers ``[B, T, Hq]`` of queries ``[B, T, Hq, D]`` over all tokens, at most
        ``length`` of a row; with those of selected pages, it tells the share of attention that these hold.
        """
        size = max(size for size in PAGE_SIZES if self.k.shape[2] % size == 0)
        count = -(-length // size)
        lses = []
        for begin in range(0, q.shape[1], MAX_QUERY_TOKENS):
            part = q[:, begin : begin + MAX_QUERY_TOKENS]
            lens = seq_lens - (q.shape[1] - begin - part.shape[1])
            shape = (q.shape[0], part.shape[1], self.k.shape[1])
            parts = []
            for first in range(0, count, MAX_PAGES):
                pages = torch.arange(first, min(count, first + MAX_PAGES), dtype=torch.int32, device=q.device)
                pages = torch.where(pages < -(-lens // size)[:, None], pages, -1)  # [B, pages]
                pages = pages[:, None, None].expand(*shape, -1).contiguous()
                given = (part, self.k, self.v, pages, block_table, lens)
                parts.append(ops.sparse_decode(*given, page_size=size, scale=scale)[1])
            lses.append(torch.stack(parts).logsumexp(0))
        return torch.cat(lses, 1)


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


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
