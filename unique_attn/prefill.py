"""Sparse prefill of a batch: its rows through ``ops.unique_prefill``, and a record of the key blocks that were kept.

Works on tensors alone, as :mod:`unique_attn.paging` does for decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unique_attn import ops
from unique_attn.config import UniqueConfig

BLOCK_Q, BLOCK_K = 128, 64  # queries and keys of a block


class PrefillRecord(NamedTuple):
    """The key blocks to which one layer attended in one row of a batch, in one call."""

    layer_idx: int
    row: int
    num_queries: int  # without left padding, as the next one
    num_keys: int
    block_q: int
    block_k: int
    mask: Tensor  # int32 [slots, heads, words], the kept blocks as ops.unpack_block_mask reads them
    kept: Tensor  # fp32 [slots, heads], the share of the estimated attention that the kept blocks have

    @property
    def query_blocks(self) -> int:
        """Blocks of queries, the first rows of ``mask`` and ``kept``."""
        return -(-self.num_queries // self.block_q)

    @property
    def visible(self) -> int:
        """Pairs of a query block and a key block that some query of it may see, which dense attention computes."""
        ends = [min(self.num_queries, (i + 1) * self.block_q) for i in range(self.query_blocks)]
        return sum(-(-(self.num_keys - self.num_queries + end) // self.block_k) for end in ends)

    @property
    def density(self) -> Tensor:
        """Share of the visible blocks that was kept, fp32 ``[heads]`` on the device of the record."""
        blocks = ops.unpack_block_mask(self.mask[: self.query_blocks], -(-self.num_keys // self.block_k))
        return blocks.sum((0, 2)).float() / self.visible

    @property
    def mass(self) -> Tensor:
        """Share of the estimated attention on kept blocks, the mean over the query blocks, fp32 ``[heads]``."""
        return self.kept[: self.query_blocks].float().mean(0)


def sparse_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Sequence[int],
    config: UniqueConfig,
    scale: float | None = None,
    layer_idx: int = -1,
) -> tuple[Tensor, Tensor, list[PrefillRecord]]:
    """Causal attention of the last T tokens of each row to the key blocks that ``config.prefill`` selects.

    Args:
        query: ``[B, Hq, T, D]``; none of the three requires grad where gradients are recorded.
        key: ``[B, H, L, D]``.
        value: like ``key``.
        padding: tokens of each row, up to L, that are left padding: their keys are not seen.
        config: ``prefill``, ``threshold``, ``top_p`` and ``prefill_above`` are used: rows of no more tokens keep all
            blocks.
        scale: factor of the logits; ``1 / sqrt(D)`` if None.
        layer_idx: for the records.

    Returns:
        ``out`` ``[B, T, Hq, D]``; ``lse`` ``[B, T, Hq]`` fp32 (fp64 for fp64); a record of each row that is sparse.
        Queries that are padding get 0 and 0.
    """
    num_tokens, length, device = query.shape[2], key.shape[2], query.device
    bounds: dict[int, Tensor] = {}  # int32 [0, tokens] by tokens: rows mostly have as many
    outs, lses, records = [], [], []
    for row, hidden in enumerate(padding):
        num_keys = length - hidden
        if num_keys <= 0:  # a chunk of a prompt may end before a row begins
            outs.append(query.new_empty(0, query.shape[1], value.shape[3]))
            lses.append(query.new_empty(0, query.shape[1], dtype=_lse_dtype(query)))
            continue
        num_queries = min(num_tokens, num_keys)
        short = num_keys <= config.prefill_above
        for tokens in (num_queries, num_keys):
            if tokens not in bounds:  # made on the device, so nothing waits for it
                bounds[tokens] = torch.arange(0, tokens + 1, tokens, dtype=torch.int32, device=device)
        out, lse, mask, kept = ops.unique_prefill(
            _tokens(query[row], num_queries),
            _tokens(key[row], num_keys),
            _tokens(value[row], num_keys),
            bounds[num_queries],
            bounds[num_keys],
            num_queries,
            num_keys,
            method=config.prefill,
            threshold=0.0 if short else config.threshold,
            top_p=None if short else config.top_p,
            block_q=BLOCK_Q,
            block_k=BLOCK_K,
            scale=scale,
        )
        outs.append(out)
        lses.append(lse)
        if not short:
            records.append(PrefillRecord(layer_idx, row, num_queries, num_keys, BLOCK_Q, BLOCK_K, mask, kept))
    return _batch(outs, num_tokens), _batch(lses, num_tokens), records


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _tokens(x: Tensor, count: int) -> Tensor:
    """The last ``count`` tokens of ``[heads, tokens, D]`` as ``[count, heads, D]``, in place."""
    packed = x[:, x.shape[1] - count :].transpose(0, 1)
    return packed if packed.stride(-1) == 1 else packed.contiguous()


def _batch(rows: list[Tensor], num_tokens: int) -> Tensor:
    """Rows ``[up to num_tokens, ...]`` as ``[B, num_tokens, ...]``, with zeros before those that are shorter."""
    if len(rows) == 1 and rows[0].shape[0] == num_tokens:
        return rows[0][None]
    batch = rows[0].new_zeros((len(rows), num_tokens, *rows[0].shape[1:]))
    for place, row in zip(batch, rows, strict=True):
        place[num_tokens - row.shape[0] :] = row
    return batch
