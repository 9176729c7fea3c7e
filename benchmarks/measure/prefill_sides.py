"""The sides of ``benchmarks prefill``: attention over given lists, the whole call and its parts, dense attention."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import block_lists, prefill_flashinfer, prefill_peers
from benchmarks.measure.harness import Side, reason
from benchmarks.measure.prompts import Expected, Prompt
from unique_attn import ops

SELECTIONS = {"directional": "threshold", "unisparse": "top_p"}  # how each method chooses
DECADES = 8  # thresholds are sought from 1 down to 10^-8


class _Cached:
    """A function of an input set's number that is called once for each."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make, self.made = make, dict[int, Any]()

    def __call__(self, number: int) -> Any:
        if number not in self.made:
            self.made[number] = self.make(number)
        return self.made[number]


class Sparse:
    """What is timed at one length and density."""

    def __init__(self, options: argparse.Namespace, prompt: Prompt, density: float, flex: prefill_peers.Flex | None):
        self.o, self.prompt, self.wanted = options, prompt, density / 100
        self.kept = block_lists.random_lists(prompt.blocks, prompt.q_heads, self.wanted, prompt.generator)
        self.mask = _packed(self.kept)
        self.shared_mask: Tensor | None = None  # of lists per KV head
        self.plan_ms: dict[str, float] = {}
        self.flex = flex
        self.blocks: dict[str, Any] = {"block_q": prompt.blocks.block_q, "block_k": prompt.blocks.block_k}

    def pooling(self, method: str) -> dict[str, Any]:
        return {"method": method, "pool_q": self.o.pool_q, "pool_k": self.o.pool_k, **self.blocks}

    # ---- Given lists. ----

    def attend(self, number: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.prompt.sets[number]
        cu_seqlens, tokens = self.prompt.cu_seqlens, self.prompt.blocks.tokens
        return ops.block_sparse_attention(q, k, v, cu_seqlens, cu_seqlens, tokens, mask, **self.blocks)

    def lists_side(self) -> Side:
        expected = _Cached(lambda i: Expected(self.prompt, i, self.mask))
        return self._side(lambda i: self.attend(i, self.mask), lambda i, found: expected(i).check(*found))

    def flex_side(self) -> Side | None:
        """FlexAttention over the same lists; None if it is not wanted or cannot be called."""
        if self.flex is None:
            return None
        flex, rows, blocks = self.flex, self.prompt.rows, self.prompt.blocks
        flex.prepare(rows[0], blocks, self.kept)
        if flex.broken:
            return None
        flex_mask = flex.mask(blocks, self.kept)
        listed = self.mask
        if flex.merged:
            listed = _packed(flex.lists(blocks, self.kept))
        expected = _Cached(lambda i: Expected(self.prompt, i, listed))
        return self._side(
            lambda i: flex.attend(rows[i], flex_mask),
            lambda i, found: expected(i).check(found[0].transpose(0, 1)),
        )

    def shared_sides(self) -> tuple[dict[str, Side], dict[str, str]]:
        """Ours and FlashInfer's over other lists, one for each KV head, and why some of its backends are missing; none
        where it is not measured."""
        prompt = self.prompt
        if prefill_flashinfer.unusable(prompt.device, prompt.dtype):
            return {}, {}
        kept = block_lists.random_lists(prompt.blocks, prompt.kv_heads, self.wanted, prompt.generator)
        self.shared_mask = mask = _packed(kept)
        expected = _Cached(lambda i: Expected(prompt, i, mask))
        sides = {"shared_lists": self._side(lambda i: self.attend(i, mask), lambda i, x: expected(i).check(*x))}
        failed: dict[str, str] = {}
        for backend in prefill_flashinfer.backends(prompt.device):
            name = f"flashinfer_{backend}"
            try:
                peer = prefill_flashinfer.BlockSparse(prompt, kept, backend)
            except Exception as error:  # whatever it raises, kernels that are not there included
                failed[name] = reason(error)
                continue
            self.plan_ms[name] = peer.plan_ms
            sides[name] = self._side(peer, lambda i, x: expected(i).check(x.transpose(0, 1)))
        return sides, failed

    # ---- The whole call. ----

    def shares(self, number: int, method: str) -> Tensor:
        q, k, _ = self.prompt.sets[number]
        cu_seqlens, tokens = self.prompt.cu_seqlens, self.prompt.blocks.tokens
        return ops.composite_blocks(q, k, cu_seqlens, cu_seqlens, tokens, tokens, **self.pooling(method))

    def selected(self, shares: Tensor, setting: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        cu_seqlens = self.prompt.cu_seqlens
        return ops.select_blocks(shares, cu_seqlens, cu_seqlens, **setting, **self.blocks)

    def select(self, number: int, method: str, setting: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return self.selected(self.shares(number, method), setting)

    def call(self, number: int, method: str, setting: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.prompt.sets[number]
        cu_seqlens, tokens = self.prompt.cu_seqlens, self.prompt.blocks.tokens
        return ops.unique_prefill(q, k, v, cu_seqlens, cu_seqlens, tokens, tokens, **setting, **self.pooling(method))

    def find(self, method: str) -> tuple[dict[str, float], float]:
        """The setting that gives the wanted density on the first input set, and the density that it gives."""
        name, shares = SELECTIONS[method], self.shares(0, method)

        def value(x: float) -> float:
            return x if name == "top_p" else float(10 ** (-DECADES * x))

        def density(x: float) -> float:
            return block_lists.density(self.prompt.blocks, self.selected(shares, {name: value(x)})[0])

        x, found = block_lists.find_setting(self.wanted, density)
        return {name: value(x)}, found

    def call_sides(self, method: str, setting: Mapping[str, Any]) -> dict[str, Side]:
        masks = [self.select(i, method, setting) for i in range(len(self.prompt.sets))]  # not in a graph's capture
        expected = _Cached(lambda i: Expected(self.prompt, i, masks[i][0]))

        def check_call(i: int, found: tuple[Tensor, ...]) -> None:
            assert torch.equal(found[2], masks[i][0]), "the mask is not that of the ops by hand"
            torch.testing.assert_close(found[3], masks[i][1], rtol=0, atol=0)
            expected(i).check(*found[:2])

        def check_selection(i: int, found: tuple[Tensor, Tensor]) -> None:
            assert torch.equal(found[0], masks[i][0]), "the mask differs from run to run, or was not written"

        return {
            f"{method}_call": self._side(lambda i: self.call(i, method, setting), check_call),
            f"{method}_selection": self._side(lambda i: self.select(i, method, setting), check_selection),
            f"{method}_attention": self._side(
                lambda i: self.attend(i, masks[i][0]), lambda i, found: expected(i).check(*found)
            ),
        }

    def _side(self, run: Callable[[int], Any], check: Callable[[int, Any], object]) -> Side:
        return Side([partial(run, i) for i in range(len(self.prompt.sets))], self.prompt.bytes, check)


def _packed(kept: Tensor) -> Tensor:
    """The packed mask of lists bool ``[slots, heads, key_blocks]``."""
    return torch.cat([ops.pack_block_mask(part) for part in kept.split(block_lists.CHUNK)])


def dense_sides(prompt: Prompt, *, ours: bool) -> dict[str, Side]:
    """Our dense kernel of training if ``ours`` (on the CPU nobody would prefill by it), and PyTorch's backends."""
    expected = _Cached(lambda i: Expected(prompt, i, None))
    numbers = range(len(prompt.sets))

    def dense(i: int) -> tuple[Tensor, Tensor]:
        return ops.soft_mask_attention(*prompt.sets[i], prompt.cu_seqlens, prompt.blocks.tokens)

    def peer(i: int, name: str) -> Tensor:
        q, k, v = prompt.rows[i]
        return prefill_peers.sdpa(q, k, v, prefill_peers.BACKENDS[name])

    sides: dict[str, Side] = {}
    if ours:
        sides["dense"] = Side([partial(dense, i) for i in numbers], prompt.bytes, lambda i, x: expected(i).check(*x))
    for name in prefill_peers.BACKENDS if prompt.device.type == "cuda" else ("flash_attention",):
        calls = [partial(peer, i, name) for i in numbers]
        sides[f"sdpa_{name}"] = Side(calls, prompt.bytes, lambda i, x: expected(i).check(x[0].transpose(0, 1)))
    return sides


def extra_bytes(run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int | None:
    """Peak CUDA memory of a call beside its inputs and outputs."""
    if device.type != "cuda":
        return None
    run()  # what is allocated once and for all
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before - sum(x.numel() * x.itemsize for x in found)
