"""Dense attention of rows over the keys and values of their blocks: of prompts, and of the layers in dense_layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from unique_attn.rules import MAX_QUERY_TOKENS
from unique_attn.vllm.layout import BlockViews
from unique_attn.vllm.rows import Rows

#: One mask is for so many queries, so that what masks take stays linear in the number of keys.
CHUNK = 512

DenseFunction = Callable[[Tensor, BlockViews, Rows, float, Tensor], None]


def torch_attention(q: Tensor, cache: BlockViews, rows: Rows, scale: float, out: Tensor) -> None:
    """PyTorch's attention, row by row: for vLLM's CPU platform, whose own kernel wants blocks of another layout.

    Args:
        q: ``[N, Hq, D]``, the new tokens of the rows; the last of each row's keys are theirs.
        cache: the blocks.
        rows: whose lengths the host knows.
        scale: factor of the logits.
        out: ``[N, Hq, D]``. Written.
    """
    assert rows.host_lens is not None
    begin, group = 0, q.shape[1] // cache.k.shape[1]
    for row, (count, length) in enumerate(zip(rows.query_lens, rows.host_lens)):
        if not count:
            continue
        blocks = rows.block_table[row, : -(-length // cache.k.shape[2])].long()
        # [blocks, H, block_size, D] -> [1, H, length, D]
        k, v = (part[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length] for part in (cache.k, cache.v))
        for first in range(0, count, CHUNK):
            last = min(first + CHUNK, count)
            seen = length - count + last
            queries = q[begin + first : begin + last].transpose(0, 1)[None]
            # Queries stand at the end of the keys that the last of them sees.
            mask = torch.ones((last - first, seen), dtype=torch.bool, device=q.device).tril_(seen - (last - first))
            attended = scaled_dot_product_attention(
                queries, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale, enable_gqa=group > 1
            )
            out[begin + first : begin + last] = attended[0].transpose(0, 1)
        begin += count


def flash_attention(function: Callable[..., Any], version: int, num_splits: int) -> DenseFunction:
    """vLLM's FlashAttention over blocks; lengths are read on the device, so that steps can be captured.

    Args:
        function: vLLM's ``flash_attn_varlen_func``.
        version: of FlashAttention.
        num_splits: of a row in steps that may be captured, which are short; it has its own choice in others.
    """

    def attend(q: Tensor, cache: BlockViews, rows: Rows, scale: float, out: Tensor) -> None:
        function(
            q=q,
            k=cache.k.transpose(1, 2),  # [num_blocks, block_size, H, D]
            v=cache.v.transpose(1, 2),
            out=out,
            cu_seqlens_q=rows.query_start,
            max_seqlen_q=rows.max_query_len,
            seqused_k=rows.seq_lens,
            max_seqlen_k=rows.max_seq_len,
            softmax_scale=scale,
            causal=True,
            window_size=[-1, -1],
            block_table=rows.block_table,
            fa_version=version,
            num_splits=num_splits if rows.max_query_len <= MAX_QUERY_TOKENS else 0,
        )

    return attend
