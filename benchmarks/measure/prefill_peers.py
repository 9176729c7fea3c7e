"""What others offer for prefill: dense attention of PyTorch by backend, and FlexAttention over the same blocks.

FlashInfer has a file of its own, :mod:`prefill_flashinfer`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.harness import reason, time_cpu, time_cuda

BACKENDS = {"flash_attention": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, scale: float | None = None) -> Tensor:
    """Causal attention ``[1, Hq, N, D]`` by one backend alone."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)


# ---- FlexAttention. ----

# Ways to call it. The first leaves everything to PyTorch; the others are its settings for Hopper, where they were not
# the default of every version, and variations of them. The fastest at the first shape is kept.
FLEX_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "128x64, 8 warps": {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "num_warps": 8},
    "128x64, 4 warps": {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "num_warps": 4},
}


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _lists(flags: Tensor) -> tuple[Tensor, Tensor]:
    """int32 counts ``[1, heads, rows]`` and block numbers ``[1, heads, rows, key_blocks]``, the listed ones first."""
    counts = flags.sum(-1, dtype=torch.int32)
    order = [each.int().argsort(dim=-1, descending=True, stable=True).int() for each in flags]  # of a head at a time
    return counts[None], torch.stack(order)[None]


def flex_mask(blocks: Blocks, kept: Tensor) -> Any:
    """FlexAttention's block mask of lists ``[slots, heads, key_blocks]``: those on the diagonal are masked, the others
    are whole."""
    from torch.nn.attention.flex_attention import BlockMask

    flags = kept[: blocks.queries].transpose(0, 1) & blocks.seen(kept.device)
    whole = torch.arange(blocks.keys, device=kept.device) < blocks.diagonal(kept.device)[:, None]
    part, full = _lists(flags & ~whole), _lists(flags & whole)
    given: dict[str, Any] = {"BLOCK_SIZE": (blocks.block_q, blocks.block_k), "mask_mod": _causal}
    given["seq_lengths"] = (blocks.tokens, blocks.tokens)
    if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters:
        given["compute_q_blocks"] = False  # the backward pass reads them; older versions always make them
    return BlockMask.from_kv_blocks(*part, *full, **given)


@contextmanager
def _usual_mode() -> Iterator[None]:
    """Without deterministic mode, of which compiled code would be compiled once more."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Flex:
    """Compiled FlexAttention over lists, for one shape after another.

    Block sizes are those of the lists; if it refuses them at the first shape, 128 x 128: pairs of key blocks of which
    one is listed, which is more than asked for.

    Attributes:
        tokens: what it is compiled for.
        option: the key of ``FLEX_OPTIONS`` that was the fastest at the first shape, None before.
        merged: key blocks are taken in pairs.
        failed: why some ways cannot be called.
        broken: why it cannot be called for this shape; empty if it can.
    """

    def __init__(self, options: Mapping[str, Mapping[str, Any]] = FLEX_OPTIONS, *, compiled: bool = True) -> None:
        self.options = options
        self.compiled = compiled
        self.tokens = 0
        self.option: str | None = None
        self.merged = False
        self.failed: dict[str, str] = {}
        self.broken = ""
        self.compile_seconds = 0.0
        self._calls: dict[str, Any] = {}

    def attend(self, rows: Sequence[Tensor], mask: Any, option: str | None = None) -> Tensor:
        """``[1, Hq, N, D]`` of q, k and v in that layout."""
        from torch.nn.attention.flex_attention import flex_attention

        option = option or self.option
        assert option is not None
        if option not in self._calls:
            self._calls[option] = torch.compile(flex_attention, dynamic=False) if self.compiled else flex_attention
        with _usual_mode():
            out: Tensor = self._calls[option](
                *rows, block_mask=mask, enable_gqa=True, kernel_options=dict(self.options[option]) or None
            )
        return out

    def prepare(self, rows: Sequence[Tensor], blocks: Blocks, kept: Tensor) -> None:
        """Compile for a shape, if that is a new one; at the first, find the fastest way. ``broken`` if it fails."""
        if self.tokens == blocks.tokens:
            return
        self.tokens, self.broken = blocks.tokens, ""
        if self.compiled:
            torch._dynamo.reset()  # a shape needs only its own code, and there is a limit
            self._calls.clear()
        start = time.perf_counter()
        try:
            if self.option is None:
                self._choose(rows, blocks, kept)
            else:
                self.attend(rows, self.mask(blocks, kept))
        except Exception as error:  # whatever a compiler raises
            self.broken = reason(error)
        self.compile_seconds += time.perf_counter() - start

    def described(self) -> dict[str, Any]:
        """For the JSON: how it was called."""
        block = [128, 128] if self.merged else [128, 64]
        return {
            "way": self.option,
            "block_size": block,
            "ways_that_failed": self.failed,
            "compile_seconds": round(self.compile_seconds, 1),
        }

    def _choose(self, rows: Sequence[Tensor], blocks: Blocks, kept: Tensor) -> None:
        timed = time_cuda if rows[0].is_cuda else time_cpu
        for self.merged in (False, True):
            mask = self.mask(blocks, kept)
            taken: dict[str, float] = {}
            for option in self.options:
                try:
                    self.attend(rows, mask, option)
                    taken[option] = min(timed(partial(self.attend, rows, mask, option)) for _ in range(3))
                except Exception as error:  # whatever a compiler raises
                    name = f"{option}{', pairs of key blocks' if self.merged else ''}"
                    self.failed[name] = reason(error)
            if taken:
                self.option = min(taken, key=lambda option: taken[option])
                return
        raise RuntimeError("; ".join(f"{way}: {why}" for way, why in self.failed.items()))

    def mask(self, blocks: Blocks, kept: Tensor) -> Any:
        if not self.merged:
            return flex_mask(blocks, kept)
        return flex_mask(Blocks(blocks.tokens, 128, 128), pairs(blocks, kept))

    def lists(self, blocks: Blocks, kept: Tensor) -> Tensor:
        """What it attends to for lists ``kept``, in the blocks of ``kept``."""
        if not self.merged:
            return kept
        return pairs(blocks, kept).repeat_interleave(128 // blocks.block_k, -1)[..., : blocks.keys]


def pairs(blocks: Blocks, kept: Tensor) -> Tensor:
    """Lists of blocks of 128 keys of which some part is in ``kept``."""
    parts = 128 // blocks.block_k
    padded = F.pad(kept, (0, -blocks.keys % parts))
    return padded.unflatten(-1, (-1, parts)).any(-1)
