"""Causal attention of blocks of queries over listed blocks of keys: sparse prefill."""

from __future__ import annotations

import torch

from unique_attn.ops._autocast import autocast_prefill
from unique_attn.ops._autograd import register_no_backward
from unique_attn.ops._shared import same_device, softmax_scale

_WORD_BITS = 32


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    mask: torch.Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over packed sequences, of each block of queries to the key blocks of its row of ``mask`` alone
    (UniSparse, arXiv 2512.14082, section 3).

    The queries of a sequence are the last of its tokens, so a chunk of a prompt attends to the keys before it too:
    query i of n, in a sequence of m keys, stands at position ``m - n + i`` and sees no later key. Query blocks are
    counted from a sequence's first query, key blocks from its first key. A listed block that lies in the future is not
    seen, and a block that no query of a block sees is not read. The diagonal is not listed by itself.

    Bitwise deterministic. Under ``torch.autocast`` q, k and v are cast to its dtype, as in
    ``scaled_dot_product_attention``; beside paged caches, which are not copied, q is cast to theirs.

    Args:
        q: ``[N, Hq, D]``, ``Hq = G * H`` with G from 1 to 16; bf16, fp16, fp32 (fp64 on the CPU); D a multiple of 8
            to 256.
        k: ``[Nk, H, D]``; with a ``block_table`` a paged cache ``[num_blocks, H, block_size, D]`` with channel stride
            1, other strides that are multiples of 8, and a block size that is a multiple of 16.
        v: like ``k``.
        cu_seqlens_q: int32 ``[B + 1]``, the first query of each sequence and N, ascending from 0. On the CPU the values
            are checked; on CUDA with UNIQUE_ATTN_CHECK=1.
        cu_seqlens_k: int32 ``[B + 1]``, the same of the keys; of paged ones the lengths, summed up. A sequence has at
            least as many keys as queries.
        max_seqlen_q: host-known upper bound of the queries of a sequence.
        mask: int32 ``[slots, Hm, words]``, contiguous: bit i of word w is key block ``32 * w + i``; from
            :func:`pack_block_mask`. Rows are those of :func:`query_block_slots`, at least ``N // block_q + B``. Hm is
            Hq (a row for every query head), H (the heads of a group share one) or 1. Blocks past the last word are
            not listed.
        block_q: queries of a block, 64 or 128.
        block_k: keys of a block, 64 or 128.
        scale: factor of the logits, ``1 / sqrt(D)`` by default.
        block_table: int32 ``[B, max_blocks]``, the cache's blocks that hold each sequence's keys, from its first one
            on; sequences may share them. Entries past a sequence's last key may hold anything. The others are checked
            where the values of ``cu_seqlens_k`` are; elsewhere, a key for which there is no block is zeros, and so is
            its value: nothing is read for it.

    Returns:
        ``out`` ``[N, Hq, D]`` in q's dtype and ``lse`` ``[N, Hq]`` fp32 (fp64 for fp64), the natural logarithm of the
        sum of exponentials. A query that sees no listed key gets 0 and -inf.

    Raises:
        ValueError: a wrong rank, shape, dtype, device, stride or number, naming the argument.
    """
    scale = softmax_scale(q) if scale is None else float(scale)
    q, k, v = autocast_prefill(block_table, q, k, v)
    return torch.ops.unique_attn.block_sparse_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, mask, block_q, block_k, scale, block_table
    )


def query_block_slots(cu_seqlens_q: torch.Tensor, block_q: int = 128) -> torch.Tensor:
    """Row of a block mask at which each sequence's first query block is; the others follow.

    Args:
        cu_seqlens_q: int32 ``[B + 1]``, the first query of each sequence and N.
        block_q: queries of a block.

    Returns:
        int32 ``[B + 1]``: ``cu_seqlens_q[b] // block_q + b``, at the end the number of rows. Between two sequences one
        row may belong to no block.
    """
    order = torch.arange(cu_seqlens_q.shape[0], dtype=cu_seqlens_q.dtype, device=cu_seqlens_q.device)
    return cu_seqlens_q // block_q + order


def pack_block_mask(kept: torch.Tensor) -> torch.Tensor:
    """The mask of :func:`block_sparse_attention` from one flag for every key block.

    Args:
        kept: bool ``[slots, Hm, key_blocks]``.

    Returns:
        int32 ``[slots, Hm, words]``, ``words = ceil(key_blocks / 32)``; spare bits are 0.

    Raises:
        ValueError: ``kept`` is not bool, or has no dimension.
    """
    if kept.dtype != torch.bool or kept.dim() == 0:
        raise ValueError(
            f"pack_block_mask: kept: expected bool [slots, Hm, key_blocks], got {kept.dtype} {list(kept.shape)}"
        )
    words = -(-kept.shape[-1] // _WORD_BITS)
    bits = torch.nn.functional.pad(kept, (0, words * _WORD_BITS - kept.shape[-1])).unflatten(-1, (words, _WORD_BITS))
    number = (bits.long() << torch.arange(_WORD_BITS, device=kept.device)).sum(-1)
    return torch.where(number >= 1 << 31, number - (1 << 32), number).int()  # bit 31 is the sign


def unpack_block_mask(mask: torch.Tensor, key_blocks: int) -> torch.Tensor:
    """What :func:`pack_block_mask` packed.

    Args:
        mask: int32 ``[slots, Hm, words]``.
        key_blocks: how many flags of a row to return, at most ``32 * words``.

    Returns:
        bool ``[slots, Hm, key_blocks]``.

    Raises:
        ValueError: ``mask`` is not int32 or has no dimension, or a row has fewer bits.
    """
    if mask.dtype != torch.int32 or mask.dim() == 0:
        raise ValueError(
            f"unpack_block_mask: mask: expected int32 [slots, Hm, words], got {mask.dtype} {list(mask.shape)}"
        )
    most = mask.shape[-1] * _WORD_BITS
    if not 0 <= key_blocks <= most:
        raise ValueError(f"unpack_block_mask: key_blocks: expected 0 to {most} (bits of a row), got {key_blocks}")
    place = torch.arange(_WORD_BITS, dtype=torch.int32, device=mask.device)
    return ((mask[..., None] >> place) & 1).bool().flatten(-2)[..., :key_blocks]


@torch.library.register_fake("unique_attn::block_sparse_attention")
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, mask, block_q, block_k, scale, block_table):  # type: ignore[no-untyped-def]
    tensors = {"k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "mask": mask}
    same_device("block_sparse_attention", q=q, **tensors, block_table=block_table)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=dtype)


register_no_backward("block_sparse_attention", "prefill")
