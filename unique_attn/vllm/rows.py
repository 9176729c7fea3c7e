"""A batch of vLLM, cut into rows that decode and rows of prompts. Made once for all layers of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from unique_attn.config import UniqueConfig
from unique_attn.vllm import versions
from unique_attn.vllm.settings import num_pages


@dataclass
class DecodeRows:
    """Rows of one new token, or of one and its drafts. They come first in a batch."""

    num_tokens: int  #: of all rows, the padding of a captured step included
    per_row: int  #: T, new tokens of the longest row
    block_table: Tensor  #: int32 ``[rows, blocks]``, no wider than the batch needs
    seq_lens: Tensor  #: int32 ``[rows]``, new tokens included; 0 in padding
    places: (
        Tensor | None
    )  #: int64 ``[num_tokens]``, of each token in ``[rows, T]`` if rows differ: ragged, at the right
    budget: Tensor | None  #: int32 ``[rows]``, pages that a row may read, if that depends on its length


@dataclass
class Rows:
    """Rows with new tokens in any number, attended to densely or as a sparse prompt."""

    tokens: slice  #: of the batch
    query_start: Tensor  #: int32 ``[rows + 1]``, from 0
    seq_lens: Tensor  #: int32 ``[rows]``, new tokens included
    block_table: Tensor  #: int32 ``[rows, blocks]``
    max_query_len: int
    max_seq_len: int
    query_lens: list[int]  #: new tokens of each row
    host_lens: list[int] | None  #: lengths of each row as the host knows them
    key_start: Tensor | None = None  #: int32 ``[rows + 1]``, sums of ``seq_lens``; of sparse prompts alone
    start_lens: Tensor | None = None  #: int32 ``[rows]``, tokens before the new ones; of prompts alone


@dataclass
class Batch:
    """What all layers are given for one step. vLLM's metadata."""

    everything: Rows  #: all rows, for layers that are dense
    slots: Tensor  #: int64 ``[tokens]``, where keys and values go; negative for tokens that are not stored
    decode: DecodeRows | None = None
    prompts: Rows | None = None  #: all rows that do not decode, to index their pages
    segments: list[Rows] = field(default_factory=list)  #: the same in runs of rows that attend alike


class BatchCutter:
    """Cuts batches for one engine.

    Args:
        config: the settings.
        threshold: new tokens up to which a row decodes.
        block_size: tokens of a block.
        max_rows: of a batch.
        device: of the tables.
    """

    def __init__(
        self, config: UniqueConfig, threshold: int, block_size: int, max_rows: int, device: torch.device
    ) -> None:
        self.config = config
        self.threshold = threshold
        self.block_size = block_size
        self._most = num_pages(config)
        self._budget: Tensor | None = None
        if self._most > config.num_pages:  # at one address: captured steps read it
            self._budget = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def cut(self, common: Any) -> Batch:
        """``common``: vLLM's ``CommonAttentionMetadata``. Nothing is read from the device."""
        starts: list[int] = common.query_start_loc_cpu.tolist()
        query_lens = [end - begin for begin, end in pairwise(starts)]
        host_lens = versions.host_lengths(common)
        everything = Rows(
            slice(0, common.num_actual_tokens),
            common.query_start_loc,
            common.seq_lens,
            self._blocks(common.block_table_tensor, common.max_seq_len),
            common.max_query_len,
            common.max_seq_len,
            query_lens,
            host_lens,
        )
        num_decodes, num_tokens = versions.split_rows(common, self.threshold)
        batch = Batch(everything, common.slot_mapping)
        if any(query_lens[:num_decodes]):
            batch.decode = self._decode(everything, num_decodes, num_tokens)
        if num_decodes < len(query_lens):
            first = num_decodes
            batch.prompts = self._rows(everything, starts, first, len(query_lens))
            for sparse, run in groupby(range(first, len(query_lens)), lambda row: self._is_sparse(everything, row)):
                rows = [*run]
                batch.segments.append(self._rows(everything, starts, rows[0], rows[-1] + 1, sparse))
        return batch

    def _decode(self, everything: Rows, count: int, num_tokens: int) -> DecodeRows:
        query_lens = everything.query_lens[:count]
        per_row = max(query_lens)
        used = count
        while used > 1 and not query_lens[used - 1]:  # padding, for which a captured step has tokens
            used -= 1
        places = None
        if all(length == per_row for length in query_lens[:used]):
            if num_tokens >= count * per_row:  # there are
                used = count
            num_tokens = used * per_row
        else:
            values = [
                row * per_row + per_row - length + t
                for row, length in enumerate(query_lens[:used])
                for t in range(length)
            ]
            places, num_tokens = versions.copy_like(everything.seq_lens, values), len(values)
        seq_lens = everything.seq_lens[:used]
        table = everything.block_table[:used]
        return DecodeRows(num_tokens, per_row, table, seq_lens, places, self._budgets(seq_lens))

    def _budgets(self, seq_lens: Tensor) -> Tensor | None:
        if self._budget is None:
            return None
        budget = self._budget[: seq_lens.shape[0]]
        budget.fill_(self.config.num_pages)
        return budget.masked_fill_(seq_lens < self.config.dense_limit, self._most)

    def _rows(self, everything: Rows, starts: list[int], first: int, end: int, sparse: bool | None = None) -> Rows:
        """Rows from ``first`` to ``end`` of all; ``sparse`` None: those whose pages are to be indexed."""
        query_start = everything.query_start[first : end + 1] - starts[first]
        seq_lens = everything.seq_lens[first:end]
        host_lens = None if everything.host_lens is None else everything.host_lens[first:end]
        longest = everything.max_seq_len if host_lens is None else min(max(host_lens), everything.max_seq_len)
        query_lens = everything.query_lens[first:end]
        rows = Rows(
            slice(starts[first], starts[end]),
            query_start,
            seq_lens,
            self._blocks(everything.block_table[first:end], longest),
            max(query_lens),
            longest,
            query_lens,
            host_lens,
        )
        if sparse is None:
            rows.start_lens = seq_lens - query_start.diff()
        if sparse:
            rows.key_start = torch.nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        return rows

    def _is_sparse(self, everything: Rows, row: int) -> bool:
        if self.config.prefill == "dense" or everything.host_lens is None or not everything.query_lens[row]:
            return False
        return everything.host_lens[row] > self.config.prefill_above

    def _blocks(self, block_table: Tensor, max_seq_len: int) -> Tensor:
        """As many columns as the longest row needs: scores are no wider than the table. A view."""
        return block_table[:, : max(1, -(-max_seq_len // self.block_size))]
