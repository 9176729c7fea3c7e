"""Attention of each query token over its selected pages."""

from __future__ import annotations

import torch

from unique_attn.ops._autograd import without_backward
from unique_attn.ops._shared import same_device, softmax_scale

_OP = torch.ops.unique_attn.sparse_decode.default


def sparse_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float | None = None,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q K_T^T) V_T`` over the tokens of the selected pages that a query may see (UNIQUE section 3).

    Args:
        q: ``[B, T, Hq, D]``, any strides; T from 1 to 16, ``Hq = G * H`` with G from 1 to 16.
        k_cache: ``[num_blocks, H, block_size, D]``, any strides with unit channel stride, the dtype of ``q``.
        v_cache: like ``k_cache``.
        pages: int32 ``[B, T, H, k]`` logical pages, contiguous; negative entries are skipped, none may repeat.
        block_table: int32 ``[B, max_blocks]``.
        seq_lens: int32 ``[B]``, tokens in the cache, the queries' own included. Token t stands at position
            ``seq_lens[b] - T + t`` and sees no later one.
        page_size: tokens per page.
        scale: factor of the logits, ``1 / sqrt(D)`` by default.
        window: tokens a query sees (its own included), 0 for all.

    Returns:
        ``out`` ``[B, T, Hq, D]`` in q's dtype and ``lse`` ``[B, T, Hq]`` fp32 (fp64 for fp64), the natural logarithm
        of the sum of exponentials, by which partial results can be merged. A query that sees no token gets 0 and -inf.

    Raises:
        ValueError: a wrong rank, shape, dtype, device or stride, naming the argument; on the CPU (on CUDA with
            UNIQUE_ATTN_CHECK=1) also a length, a page or a block that is out of range.
    """
    scale = softmax_scale(q) if scale is None else float(scale)
    return without_backward(
        _OP, (q, k_cache, v_cache), q, k_cache, v_cache, pages, block_table, seq_lens, page_size, scale, window
    )


@torch.library.register_fake("unique_attn::sparse_decode")
def _(q, k_cache, v_cache, pages, block_table, seq_lens, page_size, scale, window):  # type: ignore[no-untyped-def]
    same_device(
        "sparse_decode", q=q, k_cache=k_cache, v_cache=v_cache, pages=pages, block_table=block_table, seq_lens=seq_lens
    )
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)
