"""What an index entry holds and how it is stored, in plain PyTorch: the oracle of ``page_index`` and its bytes.

Part of :mod:`unique_attn.reference`, which exports it. ``csrc/core/index/format.h`` describes the compressed format;
:mod:`unique_attn.index_format` reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unique_attn.index_format import SCALAR_BYTES, decode_float8, grouped, index_entry_bytes

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
    raise ValueError(f"rule: expected one of mean, unique, directional, minmax, got {rule!r}")


def new_index(k_cache: Tensor, *, rule: str, page_size: int, index_format: str = "exact") -> Tensor:
    """Zeroed index ``[num_blocks, H, pages_per_block, entry_bytes]`` of bytes for a paged key cache."""
    num_blocks, heads, block_size, head_dim = k_cache.shape
    entry = encode_entry(torch.zeros(1, head_dim, dtype=torch.float64), rule, index_format, k_cache.dtype)
    shape = (num_blocks, heads, block_size // page_size, entry.shape[-1])
    return torch.zeros(shape, dtype=torch.uint8, device=k_cache.device)


def encode_entry(keys: Tensor, rule: str, index_format: str, dtype: torch.dtype) -> Tensor:
    """Bytes ``[..., entry_bytes]`` of the entry of keys ``[..., n, D]``, as it is stored for keys of ``dtype``."""
    if index_format not in ("exact", "compressed"):
        raise ValueError(f"index_format: expected exact or compressed, got {index_format!r}")
    if index_format == "compressed":
        mean, std = page_entry(keys, "directional")
        return compress(mean, std, rule)
    parts = []
    for part in page_entry(keys, rule):
        if part.dim() == keys.dim() - 1:  # a vector of channels
            parts.append(part.to(dtype))
            continue
        # The scalar, in a slot of its own. It sums over the channels: in fp16 it may leave the range that keys are in.
        slot = part.new_zeros((*part.shape, SCALAR_BYTES // dtype.itemsize), dtype=dtype)
        slot[..., 0] = part.clamp(max=torch.finfo(dtype).max).to(dtype)
        parts.append(slot)
    return torch.cat(parts, -1).contiguous().view(torch.uint8)


# ---- The compressed format. ----


def encode_float8(x: Tensor, *, up: bool = False) -> Tensor:
    """8-bit floats (5 bits of exponent, 3 of fraction) of numbers that are not negative, as int64.

    Rounded to nearest even, or up; what is larger than 61440 becomes that.
    """
    x = x.double().clamp(max=_FLOAT8_MAX)  # exact for fp32, and so is all that follows
    exponent = torch.where(x > 0, torch.frexp(x).exponent - 1, -14).clamp(min=-14)
    units = torch.ldexp(x, 3 - exponent)
    units = (units.ceil() if up else units.round()).long()
    return ((exponent.long() + 14) * 8 + units).clamp(max=0xF7)


def compress(mean: Tensor, std: Tensor, rule: str) -> Tensor:
    """Compressed entries uint8 ``[..., entry_bytes]`` of means and standard deviations ``[..., D]``."""
    if rule not in ("mean", "unique", "directional"):
        raise ValueError(f"rule: expected mean, unique or directional for a compressed index, got {rule!r}")
    head_dim = mean.shape[-1]
    x, y = grouped(mean.float()), grouped(std.float())
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
