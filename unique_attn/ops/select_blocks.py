"""Turn shares of attention into a mask of blocks."""

from __future__ import annotations

import torch

from unique_attn.ops._autograd import register_no_backward
from unique_attn.ops._shared import same_device

_WORD_BITS = 32


def select_blocks(
    shares: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    threshold: float | None = None,
    top_p: float | None = None,
    min_blocks: int = 0,
    max_blocks: int | None = None,
    block_q: int = 128,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks that matter to each block of queries (UniSparse, arXiv 2512.14082, section 3; the threshold is
    ours).

    Of the key blocks that a block of queries sees, the first one and those on the diagonal (which hold positions of its
    queries) are always kept. With them come, by share, largest first, and lower blocks first among equals, the fewest
    blocks such that all shares of at least ``threshold`` are in, or those that are in have ``top_p`` of the row's sum;
    at least ``min_blocks`` and at most ``max_blocks`` blocks, the ones that are always kept included. NaN is kept
    before any number: what cannot be estimated is not dropped.

    Shares count as 0 to 1 and are summed in fixed point: the result is the same on every device.

    Args:
        shares: ``[slots, Hm, key_blocks]`` fp32 (fp64 on the CPU, used as fp32), contiguous, from
            :func:`composite_blocks` or an estimate of your own.
        cu_seqlens_q: int32 ``[B + 1]``, as in :func:`block_sparse_attention`.
        cu_seqlens_k: int32 ``[B + 1]``, likewise.
        threshold: keep shares from here on, 0 to 1. Either this or ``top_p``.
        top_p: keep this part of each row's sum, 0 to 1; at 1 all blocks, as with a ``threshold`` of 0.
        min_blocks: of a row, as far as it sees so many.
        max_blocks: of a row; None for any number.
        block_q: queries of a block, 64 or 128.
        block_k: keys of a block, 64 or 128.

    Returns:
        ``mask`` int32 ``[slots, Hm, ceil(key_blocks / 32)]`` as :func:`block_sparse_attention` takes it, and ``kept``
        fp32 ``[slots, Hm]``, the part of the row's sum that is kept (1 where there is nothing to keep).

    Raises:
        ValueError: a wrong rank, shape, dtype, device or number, or both or neither of ``threshold`` and ``top_p``,
            naming the argument.
        NotDifferentiableError: a gradient is asked for.
    """
    return torch.ops.unique_attn.select_blocks(
        shares, cu_seqlens_q, cu_seqlens_k, threshold, top_p, min_blocks, max_blocks, block_q, block_k
    )


@torch.library.register_fake("unique_attn::select_blocks")
def _(shares, cu_seqlens_q, cu_seqlens_k, *options):  # type: ignore[no-untyped-def]
    same_device("select_blocks", shares=shares, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    slots, heads, key_blocks = shares.shape
    mask = shares.new_empty((slots, heads, (key_blocks + _WORD_BITS - 1) // _WORD_BITS), dtype=torch.int32)
    return mask, shares.new_empty((slots, heads), dtype=torch.float32)


register_no_backward("select_blocks", "prefill")
