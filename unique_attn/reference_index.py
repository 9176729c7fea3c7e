"""What an index entry holds and how it is stored, in plain PyTorch: the oracle of ``page_index`` and its bytes.

Part of :mod:`unique_attn.reference`, which exports it. ``csrc/core/index/format.h`` describes the compressed format.
"""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_FORMATS = ("exact", "compressed")
SCALAR_BYTES = 16  # slot of the one scalar that an exact entry of `unique` stores behind its vector
_RULES = ("mean", "unique", "directional", "minmax")
_FLOAT8_MAX = 61440.0


def page_entry(keys: Tensor, rule: str) -> tuple[Tensor, ...]:
    """phi(page) of keys ``[..., n, D]``: two vectors, or one, or a vector and a scalar; not rounded."""
    mean = keys.mean(-2)
    var = (keys - mean.unsqueeze(-2)).square().mean(-2)  # two-pass: E[x^2] - E[x]^2 cancels
    if rule == "mean":
        return (mean,)
    if rule == "unique":
        return mean, var.sum(-1).sqrt()
    if rule == "directional":
        return mean, var.sqrt()
    if rule == "minmax":
        return keys.amax(-2), keys.amin(-2)
    raise ValueError(f"rule: expected one of {', '.join(_RULES)}, got {rule!r}")


def index_entry_bytes(rule: str, head_dim: int, dtype: torch.dtype, index_format: str = "exact") -> int:
    """Bytes of one entry: one page and one KV head, keys of ``dtype`` with ``head_dim`` channels."""
    if index_format == "exact":
        return (2 if rule in ("directional", "minmax") else 1) * head_dim * dtype.itemsize + SCALAR_BYTES * (
            rule == "unique"
        )
    codes = head_dim // 2 + (head_dim // 4) * (rule == "directional")
    return -(-(4 * num_groups(head_dim) + codes) // 16) * 16


def new_index(k_cache: Tensor, *, rule: str, page_size: int, index_format: str = "exact") -> Tensor:
    """Zeroed index ``[num_blocks, H, pages_per_block, entry_bytes]`` of bytes for a paged key cache."""
    num_blocks, heads, block_size, head_dim = k_cache.shape
    entry_bytes = index_entry_bytes(rule, head_dim, k_cache.dtype, index_format)
    shape = (num_blocks, heads, block_size // page_size, entry_bytes)
    return torch.zeros(shape, dtype=torch.uint8, device=k_cache.device)


def encode_entry(keys: Tensor, rule: str, index_format: str, dtype: torch.dtype) -> Tensor:
    """Bytes ``[..., entry_bytes]`` of the entry of keys ``[..., n, D]``, as it is stored for keys of ``dtype``."""
    if index_format == "compressed":
        mean, std = page_entry(keys, "directional")
        return compress(mean, std, rule)
    exact = page_entry(keys, rule)
    if rule == "unique":  # sums over the channels: in fp16 it may leave the range that the keys are in
        exact = exact[0], exact[1].clamp(max=torch.finfo(dtype).max)
    parts = [part.to(dtype) for part in exact]
    if rule == "unique":
        slot = parts[0].new_zeros((*parts[0].shape[:-1], SCALAR_BYTES // dtype.itemsize))
        slot[..., 0] = parts[1]
        parts[1] = slot
    return torch.cat(parts, -1).contiguous().view(torch.uint8)


def decode_index(
    index: Tensor, *, rule: str, dtype: torch.dtype, index_format: str = "exact", head_dim: int | None = None
) -> tuple[Tensor, ...]:
    """The parts of every entry, in the order of :func:`page_entry`: views in ``dtype`` of an exact index, fp32 copies
    (the scalar fp64) of what a compressed one stands for, which needs to be told ``head_dim``."""
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


def encode_float8(x: Tensor, *, up: bool = False) -> Tensor:
    """8-bit floats (5 bits of exponent, 3 of fraction) of numbers that are not negative, as int64.

    Rounded to nearest even, or up; what is larger than 61440 becomes that.
    """
    x = x.double().clamp(max=_FLOAT8_MAX)  # exact for fp32, and so is all that follows
    exponent = torch.where(x > 0, torch.frexp(x).exponent - 1, -14).clamp(min=-14)
    units = torch.ldexp(x, 3 - exponent)
    units = (units.ceil() if up else units.round()).long()
    return ((exponent.long() + 14) * 8 + units).clamp(max=0xF7)


def decode_float8(code: Tensor) -> Tensor:
    """What 8-bit floats stand for, fp32: they are the upper half of a positive fp16 without its sign."""
    return (code.to(torch.int16) << 7).view(torch.float16).float()


def _grouped(x: Tensor) -> Tensor:
    """``[..., D]`` as ``[..., groups, channels]``, with zeros behind the last channel."""
    size, count = group_channels(x.shape[-1]), num_groups(x.shape[-1])
    return torch.nn.functional.pad(x, (0, size * count - x.shape[-1])).unflatten(-1, (count, size))


def compress(mean: Tensor, std: Tensor, rule: str) -> Tensor:
    """Compressed entries uint8 ``[..., entry_bytes]`` of means and standard deviations ``[..., D]``."""
    if rule not in ("mean", "unique", "directional"):
        raise ValueError(f"rule: expected mean, unique or directional for a compressed index, got {rule!r}")
    head_dim = mean.shape[-1]
    x, y = _grouped(mean.float()), _grouped(std.float())
    size = x.abs()
    first = size.argmax(-1, keepdim=True)
    rest = size.scatter(-1, first, 0.0).amax(-1, keepdim=True)
    spread = {
        "mean": lambda: torch.zeros_like(rest),
        "unique": lambda: y.square().sum(-1, keepdim=True).sqrt(),
        "directional": lambda: y.amax(-1, keepdim=True) * 0.25,
    }[rule]()
    finite = (x.isfinite() & y.isfinite()).all(-1, keepdim=True) & spread.isfinite()
    x, y, rest, spread = (torch.where(finite, each, 0.0) for each in (x, y, rest, spread))
    outlier = x.gather(-1, first).clamp(-65504.0, 65504.0).half()
    step, scale = encode_float8(rest / 7), encode_float8(spread, up=rule == "directional")
    s, t, v = decode_float8(step), decode_float8(scale), outlier.float()

    code = torch.where(s > 0, x / s, 0.0).round().clamp(-7, 7)
    code = torch.where((x - v).abs() < (x - code * s).abs(), -8, code.long())
    code = torch.where(finite, code, -8).flatten(-2)[..., :head_dim] & 15
    multiple = torch.where(t > 0, y / t, 0.0).round().clamp(2, 4)
    low = (y - torch.minimum(s, t)).abs() < (y - multiple * t).abs()
    level = torch.where(low | (t == 0), 0, multiple.long() - 1).flatten(-2)[..., :head_dim]

    half_bits = torch.where(finite, outlier.view(torch.int16).long() & 0xFFFF, 0x7E00)
    scales = torch.cat([half_bits & 0xFF, half_bits >> 8, step, scale], -1).flatten(-2)
    parts = [scales, code[..., 0::2] | code[..., 1::2] << 4]
    if rule == "directional":
        parts.append(sum(level[..., i::4] << 2 * i for i in range(4)))  # type: ignore[arg-type]
    entry = torch.cat(parts, -1)
    padding = index_entry_bytes(rule, head_dim, torch.float32, "compressed") - entry.shape[-1]
    return torch.nn.functional.pad(entry, (0, padding)).to(torch.uint8)


def decompress(index: Tensor, rule: str, head_dim: int) -> tuple[Tensor, ...]:
    """What compressed entries ``[..., entry_bytes]`` stand for, in the order of :func:`page_entry`."""
    groups = num_groups(head_dim)
    scales = index[..., : 4 * groups].unflatten(-1, (groups, 4))
    v = scales[..., :2].contiguous().view(torch.float16).float()
    s, t = decode_float8(scales[..., 2:3]), decode_float8(scales[..., 3:4])

    def codes(begin: int, width: int) -> Tensor:
        """``[..., groups, channels]`` numbers of ``width`` bits, zeros behind the last channel."""
        packed = index[..., begin : begin + head_dim * width // 8].long()
        shifts = torch.arange(0, 8, width, device=index.device)
        return _grouped((packed[..., None] >> shifts & (1 << width) - 1).flatten(-2))

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
