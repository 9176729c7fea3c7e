"""Formats that a compressed index could have had, in plain PyTorch, to compare them with the one it has.

A format turns exact means and standard deviations into what an entry would hold. Sizes count every byte of an entry of
``directional``: codes and scales. Groups are of neighbouring channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unique_attn.index_format import decode_float8, decompress
from unique_attn.reference_index import compress, encode_float8

Quantizer = Callable[[Tensor], Tensor]
Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def grouped(quantize: Quantizer, size: int) -> Quantizer:
    """``quantize`` on groups of ``size`` channels."""
    return lambda x: quantize(x.unflatten(-1, (-1, size))).flatten(-2)


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale != 0, x / scale, 0.0)


def symmetric(bits: int, size: int, *, power_of_two: bool = False, best: bool = False) -> Quantizer:
    """Multiples of an fp16 scale that fits the largest, of a power of two, or of the scale with the least error."""
    most = 2 ** (bits - 1) - 1

    def quantize(x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True) / most
        result, error = torch.zeros_like(x), torch.full_like(largest, torch.inf)
        for factor in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7) if best else (1.0,):
            scale = torch.exp2(largest.log2().ceil()) if power_of_two else (largest * factor).half().float()
            each = _ratio(x, scale).round().clamp(-most, most) * scale
            its_error = (each - x).square().sum(-1, keepdim=True)
            result = torch.where(its_error < error, each, result)
            error = torch.minimum(error, its_error)
        return result

    return grouped(quantize, size)


def asymmetric(bits: int, size: int) -> Quantizer:
    """Steps from the smallest to the largest; both are fp16."""

    def quantize(x: Tensor) -> Tensor:
        low = x.amin(-1, keepdim=True).half().float()
        scale = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
        return low + _ratio(x - low, scale).round().clamp(0, 2**bits - 1) * scale

    return grouped(quantize, size)


def levels(values: list[float], size: int | None = None) -> Quantizer:
    """The nearest of some multiples of the largest, which is an fp16 number, in groups or over all channels."""
    table = torch.tensor(values)

    def quantize(x: Tensor) -> Tensor:
        largest = x.amax(-1, keepdim=True).half().float()
        return table[torch.bucketize(_ratio(x, largest), (table[1:] + table[:-1]) / 2)] * largest

    return quantize if size is None else grouped(quantize, size)


def float8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def apart(mean: Quantizer, std: Quantizer) -> Store:
    return lambda means, stds: (mean(means), std(stds))


def like_compressed(bits: int, size: int) -> Store:
    """The compressed format (``csrc/core/index/format.h``) with other means and groups."""
    most = 2 ** (bits - 1) - 1

    def store(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (each.unflatten(-1, (-1, size)) for each in (mean, std))
        first = x.abs().argmax(-1, keepdim=True)
        outlier = x.gather(-1, first).half().float()
        step = decode_float8(encode_float8(x.abs().scatter(-1, first, 0.0).amax(-1, keepdim=True) / most))
        scale = decode_float8(encode_float8(y.amax(-1, keepdim=True) / 4, up=True))
        means = _ratio(x, step).round().clamp(-most, most) * step
        means = torch.where((x - outlier).abs() < (x - means).abs(), outlier, means)
        low = torch.minimum(step * (most / 7), scale)
        stds = _ratio(y, scale).round().clamp(2, 4) * scale
        stds = torch.where((y - low).abs() < (y - stds).abs(), low, stds)
        return means.flatten(-2), stds.flatten(-2)

    return store


def shipped(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of the ops' format."""
    kept = decompress(compress(mean, std, "directional"), "directional", mean.shape[-1])
    return kept[0], kept[1]


@dataclass(frozen=True)
class Format:
    """How means and spreads would be stored, and in how many bits a channel."""

    name: str
    store: Store
    bits: float  # of a channel at D = 64: codes, and scales spread over the channels that share them

    @property
    def entry_bytes(self) -> int:
        """Of an entry of 64 channels, a multiple of 16."""
        return math.ceil(self.bits * 64 / 8 / 16) * 16


LINEAR2, LINEAR3 = (levels([i / (2**n - 1) for i in range(2**n)]) for n in (2, 3))
NOT_FROM_0 = levels([0.25, 0.5, 0.75, 1.0])
POWERS = levels([0.125, 0.25, 0.5, 1.0])
FORMATS = (
    Format("plain: 4-bit mean, scale per 32; 2-bit spread", apart(symmetric(4, 32), LINEAR2), 6.75),
    Format("plain, scales of least squared error", apart(symmetric(4, 32, best=True), LINEAR2), 6.75),
    Format("plain, powers of two as scales", apart(symmetric(4, 32, power_of_two=True), LINEAR2), 6.5),
    Format("plain, scale per 16", apart(symmetric(4, 16), LINEAR2), 7.25),
    Format("plain, scale per 64", apart(symmetric(4, 64), LINEAR2), 6.5),
    Format("plain, means from lowest to highest", apart(asymmetric(4, 32), LINEAR2), 7.25),
    Format("plain, 3-bit spread", apart(symmetric(4, 32), LINEAR3), 7.75),
    Format("plain, spreads 1/4, 1/2, 3/4, 1", apart(symmetric(4, 32), NOT_FROM_0), 6.75),
    Format("plain, spreads 1/8, 1/4, 1/2, 1", apart(symmetric(4, 32), POWERS), 6.75),
    Format("plain, 5-bit mean", apart(symmetric(5, 32), LINEAR2), 7.75),
    Format("plain, 5-bit mean, 1-bit spread", apart(symmetric(5, 32), levels([0.35, 1.0])), 6.75),
    Format("plain, 3-bit mean per 16, 3-bit spread", apart(symmetric(3, 16), LINEAR3), 7.25),
    Format("plain, 8-bit float (e4m3) mean", apart(float8, LINEAR2), 10.25),
    Format("`compressed`, but 5-bit means in groups of 32", like_compressed(5, 32), 8.0),
    Format("`compressed` with the groups of D > 64 (32)", like_compressed(4, 32), 7.0),
    Format("**`compressed`**", shipped, 8.0),
)


# ---- Keys with outliers: what a key bias does to some channels. The attention stays as it is. ----


def shifted(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """One channel in each half of a head gets a hundred times the size of the others; all logits of a query shift."""
    half = k.shape[-1] // 2
    offset = torch.zeros(k.shape[-1])
    offset[[half // 6, half + half // 6]] = torch.tensor([100.0, -100.0]) * k.std()
    return q, k + offset


def scaled(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The same channels are a hundred times as large in keys, and as small in queries."""
    half = k.shape[-1] // 2
    factor = torch.ones(k.shape[-1])
    factor[[half // 6, half + half // 6]] = 100.0
    return q / factor, k * factor


OUTLIERS = {"shifted": shifted, "scaled": scaled}
