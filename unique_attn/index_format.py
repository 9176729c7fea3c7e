"""How index entries are stored: their sizes, and what their bytes say. ``csrc/core/index/format.h`` defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from unique_attn.rules import MAX_HEAD_DIM, PAGE_SIZES, choices, format_id, rule_info

KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALAR_BYTES = 16  # slot of the one scalar that an exact entry may hold behind its vectors


def index_entry_bytes(rule: str, head_dim: int, dtype: torch.dtype, index_format: str = "exact") -> int:
    """Bytes of one index entry: one page and one KV head, keys of ``dtype`` with ``head_dim`` channels.

    A compressed entry is as large for every dtype.
    """
    info = rule_info(rule)
    if format_id(index_format, rule) == 0:
        return info.vectors * head_dim * dtype.itemsize + SCALAR_BYTES * info.scalar
    codes = head_dim // 2 + (head_dim // 4) * (info.spread_kind == "vector")
    return -(-(4 * num_groups(head_dim) + codes) // 16) * 16


def new_index(k_cache: Tensor, *, rule: str, page_size: int, index_format: str = "exact") -> Tensor:
    """Allocate the page index of a paged key cache.

    Args:
        k_cache: ``[num_blocks, H, block_size, D]``, any strides with unit channel stride.
        rule: name of the scoring rule.
        page_size: tokens per page; divides ``block_size``.
        index_format: ``exact`` (the keys' dtype), or ``compressed`` (4-bit means and 2-bit spreads with shared scales,
            described in ``csrc/core/index/format.h``; compressible rules: :data:`unique_attn.rules.RULES`).

    Returns:
        uint8 ``[num_blocks, H, block_size // page_size, entry_bytes]``, zeroed. The bytes belong to the rule;
        :func:`decode_index` shows what they hold.

    Raises:
        ValueError: unknown rule or format, wrong rank, dtype or head dimension, a page size that the ops do not take,
            or a block size that is no multiple of it.
    """
    if k_cache.dim() != 4:
        raise ValueError(f"k_cache: expected 4 dimensions [num_blocks, H, block_size, D], got {list(k_cache.shape)}")
    num_blocks, heads, block_size, head_dim = k_cache.shape
    if k_cache.dtype not in KEY_DTYPES:
        raise ValueError(f"k_cache: expected dtype {', '.join(map(str, KEY_DTYPES))}, got {k_cache.dtype}")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"k_cache: expected a head dimension that is a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
        )
    if type(page_size) is not int or page_size not in PAGE_SIZES:
        raise ValueError(f"page_size: expected {choices(PAGE_SIZES)}, got {page_size!r}")
    if block_size % page_size:
        raise ValueError(f"page_size: expected a divisor of the block size {block_size}, got {page_size}")
    entry = index_entry_bytes(rule, head_dim, k_cache.dtype, index_format)
    shape = (num_blocks, heads, block_size // page_size, entry)
    return torch.zeros(shape, dtype=torch.uint8, device=k_cache.device)


def decode_index(
    index: Tensor, *, rule: str, dtype: torch.dtype, index_format: str = "exact", head_dim: int | None = None
) -> tuple[Tensor, ...]:
    """The parts of every index entry.

    Args:
        index: uint8 ``[num_blocks, H, pages_per_block, entry_bytes]``.
        rule: the rule it was written with.
        dtype: of the keys.
        index_format: ``exact`` or ``compressed``.
        head_dim: D; needed for a compressed index.

    Returns:
        ``(mean,)`` for ``mean``; ``(mean, std)`` with ``std`` ``[num_blocks, H, pages_per_block]`` for ``unique``, and
        with ``std`` per channel for ``directional``; ``(max, min)`` for ``minmax``. Vectors are
        ``[num_blocks, H, pages_per_block, D]``. Views of an exact index in ``dtype``; of a compressed one
        fp32 copies, of its scalar fp64. Of another rule its vectors, then its scalar if it has one.

    Raises:
        ValueError: unknown rule or format, or a compressed index without ``head_dim``.
    """
    info = rule_info(rule)
    if format_id(index_format, rule) != 0:
        if head_dim is None:
            raise ValueError("head_dim: expected the head dimension of a compressed index, got None")
        return decompress(index, rule, head_dim)
    values: Tensor = index.view(dtype)
    slot = SCALAR_BYTES // dtype.itemsize if info.scalar else 0
    channels = (values.shape[-1] - slot) // info.vectors
    parts = values[..., : channels * info.vectors].split(channels, -1)
    return (*parts, values[..., channels * info.vectors]) if info.scalar else tuple(parts)


# ---- The compressed format. ----


def group_channels(head_dim: int) -> int:
    """Channels that share scales."""
    return 16 if head_dim <= 64 else 32


def num_groups(head_dim: int) -> int:
    return -(-head_dim // group_channels(head_dim))


def decode_float8(code: Tensor) -> Tensor:
    """What 8-bit floats stand for, fp32: they are the upper half of a positive fp16 without its sign."""
    return (code.to(torch.int16) << 7).view(torch.float16).float()


def grouped(x: Tensor) -> Tensor:
    """``[..., D]`` as ``[..., groups, channels]``, with zeros behind the last channel."""
    size, count = group_channels(x.shape[-1]), num_groups(x.shape[-1])
    return torch.nn.functional.pad(x, (0, size * count - x.shape[-1])).unflatten(-1, (count, size))


def decompress(index: Tensor, rule: str, head_dim: int) -> tuple[Tensor, ...]:
    """What compressed entries ``[..., entry_bytes]`` stand for, in the order of :func:`decode_index`."""
    info, groups = rule_info(rule), num_groups(head_dim)
    scales = index[..., : 4 * groups].unflatten(-1, (groups, 4))
    v = scales[..., :2].contiguous().view(torch.float16).float()
    s, t = decode_float8(scales[..., 2:3]), decode_float8(scales[..., 3:4])

    def codes(begin: int, width: int) -> Tensor:
        """``[..., groups, channels]`` numbers of ``width`` bits, zeros behind the last channel."""
        packed = index[..., begin : begin + head_dim * width // 8].long()
        shifts = torch.arange(0, 8, width, device=index.device)
        return grouped((packed[..., None] >> shifts & (1 << width) - 1).flatten(-2))

    def channels(values: Tensor) -> Tensor:
        return values.flatten(-2)[..., :head_dim]

    code = codes(4 * groups, 4)
    mean = channels(torch.where(code == 8, v, ((code ^ 8) - 8) * s))
    if info.spread_kind is None:
        return (mean,)
    if info.spread_kind == "scalar":
        return mean, t.squeeze(-1).double().square().sum(-1).sqrt()
    level = codes(4 * groups + head_dim // 2, 2)
    return mean, channels(torch.where(level == 0, torch.minimum(s, t), (level + 1) * t))
