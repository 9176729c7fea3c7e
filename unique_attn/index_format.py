"""How an index entry is stored and what its bytes stand for; ``csrc/core/index/format.h`` describes the formats."""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_FORMATS = ("exact", "compressed")
SCALAR_BYTES = 16  # slot of the one scalar that an exact entry of `unique` stores behind its vector


def index_entry_bytes(rule: str, head_dim: int, dtype: torch.dtype, index_format: str = "exact") -> int:
    """Bytes of one entry: one page and one KV head, keys of ``dtype`` with ``head_dim`` channels."""
    if index_format == "exact":
        return (2 if rule in ("directional", "minmax") else 1) * head_dim * dtype.itemsize + SCALAR_BYTES * (
            rule == "unique"
        )
    codes = head_dim // 2 + (head_dim // 4) * (rule == "directional")
    return -(-(4 * num_groups(head_dim) + codes) // 16) * 16


def decode_index(
    index: Tensor, *, rule: str, dtype: torch.dtype, index_format: str = "exact", head_dim: int | None = None
) -> tuple[Tensor, ...]:
    """The parts of every entry, in the order of ``reference.page_entry``: views in ``dtype`` of an exact index, fp32
    copies (the scalar fp64) of what a compressed one stands for, which needs to be told ``head_dim``."""
    if index_format == "compressed":
        if head_dim is None:
            raise ValueError("head_dim: expected the head dimension of a compressed index, got None")
        return decompress(index, rule, head_dim)
    values: Tensor = index.view(dtype)
    if rule == "mean":
        return (values,)
    if rule == "unique":
        channels = values.shape[-1] - SCALAR_BYTES // dtype.itemsize
        return values[..., :channels], values[..., channels]
    half = values.shape[-1] // 2
    return values[..., :half], values[..., half:]


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
    """What compressed entries ``[..., entry_bytes]`` stand for, in the order of ``reference.page_entry``."""
    groups = num_groups(head_dim)
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
    if rule == "mean":
        return (mean,)
    if rule == "unique":
        return mean, t.squeeze(-1).double().square().sum(-1).sqrt()
    level = codes(4 * groups + head_dim // 2, 2)
    return mean, channels(torch.where(level == 0, torch.minimum(s, t), (level + 1) * t))
