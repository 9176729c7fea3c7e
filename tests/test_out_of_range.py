"""Lengths, tables, slots and pages with numbers out of range. The CPU's ops refuse them (test_bad_input); on CUDA
nothing is read back for that, and the kernels skip what no block holds: they neither read nor write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_cases import DEVICES, FORMATS, Case, Spec, assert_same, assert_same_step, build
from torch import Tensor

from unique_attn import ops

TABLE = 8 * 8  # tokens that a row of the table holds
TOO_LONG = (TABLE + 1, TABLE + 17, 2**31 - 1)
NO_BLOCK = (-1, -(2**31), 15, 2**30, 2**31 - 1)  # of 15 blocks
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Guarded:
    """Copies of tensors, each in the middle of more memory that must not change."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.kept: list[tuple[Tensor, Tensor, slice]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        margin = 1 << 14
        source = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().cpu())
        memory = torch.full((source.numel() + 2 * margin,), 97, device=self.device).to(tensor.dtype)
        inside = slice(margin, margin + source.numel())
        memory[inside] = source.to(self.device)
        self.kept.append((memory, memory.clone(), inside))
        return memory.as_strided(tensor.shape, tensor.stride(), margin + tensor.storage_offset())

    def check(self) -> None:
        for memory, before, inside in self.kept:
            assert_same(memory[: inside.start], before[: inside.start], "memory before a tensor")
            assert_same(memory[inside.stop :], before[inside.stop :], "memory after a tensor")


def example(dtype: torch.dtype, device: str, **changes: Any) -> tuple[Case, Guarded]:
    """Two sequences in pages of 4, blocks of 8, 8 of them to a row of the table; 15 blocks."""
    spec = Spec((61, 38), group=3, head_dim=64, dtype=dtype, seed=0, **changes)
    case, guarded = build(spec).to("cpu"), Guarded(device)
    assert case.block_table.shape == (2, 8)
    assert case.k_cache.shape[0] == 15
    names = ("q", "k", "v", "k_cache", "v_cache", "index", "block_table", "seq_lens")
    return replace(case, **{name: guarded(getattr(case, name)) for name in names}), guarded


def refused_or(device: str, call: Callable[[], Any]) -> Any:
    """What ``call`` returns on CUDA; on the CPU None, after it was refused."""
    if device == "cuda":
        return call()
    with pytest.raises(ValueError, match="expected"):
        call()
    return None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots(device: str, dtype: torch.dtype) -> None:
    case, guarded = example(dtype, device)
    k = case.k_cache[0, :, :7].transpose(0, 1).contiguous()
    slots = [5, 15 * 8, -1, 2**40, -(2**62), 9, 2**63 - 1]
    expected = [guarded(case.k_cache), guarded(case.v_cache)]
    good = [slot if 0 <= slot < 15 * 8 else -1 for slot in slots]
    ops.append_kv(k, k, *expected, torch.tensor(good, device=device))
    refused_or(device, lambda: ops.append_kv(k, k, case.k_cache, case.v_cache, torch.tensor(slots, device=device)))
    if device == "cuda":
        assert_same(case.k_cache, expected[0])
        assert_same(case.v_cache, expected[1])
    guarded.check()


def write_index(case: Case, guarded: Guarded, starts: list[int], most: int) -> Tensor:
    index = guarded(torch.full_like(case.index, 0xFF))
    start_lens = torch.tensor(starts, dtype=torch.int32, device=index.device)
    table = (case.block_table, start_lens, case.seq_lens)
    ops.page_index(case.k_cache, index, *table, max_new_tokens=most, **case.paging)
    return index


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_touched_pages(device: str, index_format: str, dtype: torch.dtype) -> None:
    case, guarded = example(dtype, device, index_format=index_format)
    whole = write_index(case, guarded, [0, 0], TABLE)
    for start in (-1, -9, -(2**31)):
        index = refused_or(device, lambda: write_index(case, guarded, [start, 0], TABLE))  # noqa: B023
        if index is not None:
            assert_same(index, whole)
    for start in (39, 2**31 - 1):
        alone = write_index(case, guarded, [0, 38], TABLE)
        index = refused_or(device, lambda: write_index(case, guarded, [0, start], TABLE))  # noqa: B023
        if index is not None:
            assert_same(index, alone)
    case.k_cache.nan_to_num_(0.0)  # the end of the last page too
    for length in TOO_LONG:
        case.seq_lens[0] = TABLE
        full = write_index(case, guarded, [0, 0], TABLE)
        case.seq_lens[0] = length
        index = refused_or(device, lambda: write_index(case, guarded, [0, 0], TABLE))
        if index is not None:
            assert_same(index, full)
    case.seq_lens[0] = 0
    none = write_index(case, guarded, [0, 0], TABLE)
    for length in (-1, -(2**31)):
        case.seq_lens[0] = length
        index = refused_or(device, lambda: write_index(case, guarded, [0, 0], TABLE))
        if index is not None:
            assert_same(index, none)
    case.seq_lens[0] = 61
    for block in NO_BLOCK:
        there = int(case.block_table[0, 3])
        case.block_table[0, 3] = block
        index = refused_or(device, lambda: write_index(case, guarded, [0, 0], TABLE))
        case.block_table[0, 3] = there
        if index is not None:
            assert bool((index[there] == 0xFF).all())
            others = [b for b in range(15) if b != there]
            assert_same(index[others], write_index(case, guarded, [0, 0], TABLE)[others])
    guarded.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_scores(device: str, index_format: str, dtype: torch.dtype, num_tokens: int) -> None:
    """Where the table names no block there is no entry: NaN, which ranks below every number."""
    case, guarded = example(dtype, device, index_format=index_format, num_tokens=num_tokens)
    case.k_cache.nan_to_num_(0.0)
    lengths = torch.zeros_like(case.seq_lens), torch.full_like(case.seq_lens, TABLE)
    table = torch.arange(15, device=device, dtype=torch.int32).repeat(2)[:16].view(2, 8).contiguous()
    ops.page_index(case.k_cache, case.index, table, *lengths, max_new_tokens=TABLE, **case.paging)
    case.block_table.copy_(table)

    def scores() -> Tensor:
        return ops.page_scores(case.q, case.index, case.block_table, case.seq_lens, **case.scoring)

    clean = scores()
    for block in NO_BLOCK:
        case.block_table[0, 3] = block
        got = refused_or(device, scores)
        case.block_table[0, 3] = table[0, 3]
        if got is not None and block != -(2**31):  # that number's pages have any score
            assert bool(got[0, ..., 6:8].isnan().all())
            got[0, ..., 6:8] = clean[0, ..., 6:8]
        if got is not None:
            assert_same(got[1], clean[1])
            assert_same(got[0, ..., :6], clean[0, ..., :6])
            assert_same(got[0, ..., 8:], clean[0, ..., 8:])
    case.seq_lens[0] = TABLE
    full = scores()
    for length in TOO_LONG:
        case.seq_lens[0] = length
        got = refused_or(device, scores)
        if got is not None:
            assert_same(got[1], full[1])
            assert_same(got[0, -1], full[0, -1])  # all that there is
    case.seq_lens[0] = 0
    none = scores()
    for length in (-1, -(2**31)):
        case.seq_lens[0] = length
        got = refused_or(device, scores)
        if got is not None:
            assert_same(got, none)
    guarded.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [4, 600])
def test_selection(device: str, dtype: torch.dtype, k: int) -> None:
    scores = torch.randn(2, 1, 2, 1024).to(dtype).to(device)
    table = torch.arange(1024, dtype=torch.int32, device=device).view(2, 512)
    lens = torch.tensor([4096, 4096], dtype=torch.int32, device=device)

    def select(window: int = 0, physical: bool = False) -> Tensor:
        blocks = {"block_table": table, "pages_per_block": 2} if physical else {}
        return ops.topk_pages(scores, lens, k, page_size=4, window=window, **blocks)

    full = select()
    for length in (4097, 2**31 - 1):
        lens[0] = length
        got = refused_or(device, select)
        if got is not None:
            assert_same(got, full)
        got = refused_or(device, lambda: select(window=8))
        if got is not None and length > 4104:  # the window lies past the scores
            assert bool((got[0] == -1).all())
    for length in (-1, -(2**31)):
        lens[0] = length
        got = refused_or(device, select)
        if got is not None:
            assert bool((got[0] == -1).all())
            assert_same(got[1], full[1])
    lens[0] = 4096
    expected = select(physical=True)
    for block in (-1, -(2**31), 2**30, 2**31 - 1):
        table[0, 0], table[0, 511] = block, block  # of the sink and the recent page
        got = refused_or(device, lambda: select(physical=True))
        if got is not None:
            hidden = expected.clone()
            hidden[0][(expected[0] // 2 == 0) | (expected[0] // 2 == 511)] = -1
            assert_same(got, hidden)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_pages", [4, 300])
def test_attention(device: str, dtype: torch.dtype, num_pages: int) -> None:
    """Pages that there are not, and pages without a block, are as -1."""
    case, guarded = example(dtype, device)
    case.k_cache.nan_to_num_(0.0)
    case.v_cache.nan_to_num_(0.0)
    case.seq_lens[0] = TABLE
    pages = torch.full((2, 1, 2, num_pages), -1, dtype=torch.int32, device=device)
    pages[..., :4] = torch.tensor([0, 5, 9, 15], device=device)

    def attend() -> tuple[Tensor, Tensor]:
        args = (case.q, case.k_cache, case.v_cache, pages, case.block_table, case.seq_lens)
        return ops.sparse_decode(*args, **case.attending)

    whole = attend()
    pages[:, :, :, 2] = -1
    without = attend()
    for page in (16, 2**26, 2**28, 2**30, 2**31 - 1):
        pages[0, 0, 1, 2] = page
        got = refused_or(device, attend)
        if got is not None:
            assert_same(got[0], without[0])
            assert_same(got[1], without[1])
    pages[:, :, :, 2] = 9
    there = int(case.block_table[0, 4])
    for block in NO_BLOCK:
        case.block_table[0, 4] = block
        got = refused_or(device, attend)
        if got is not None:
            assert_same(got[0][0], without[0][0])
            assert_same(got[0][1], whole[0][1])
    case.block_table[0, 4] = there
    for length in TOO_LONG:
        case.seq_lens[0] = length
        got = refused_or(device, attend)
        if got is not None:
            assert_same(got[0], whole[0])
    for length in (-1, -(2**31)):
        case.seq_lens[0] = length
        got = refused_or(device, attend)
        if got is not None:
            assert bool((got[0][0] == 0).all())
            assert bool((got[1][0] == -torch.inf).all())
            assert_same(got[0][1], whole[0][1])
    guarded.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [61, 65, 66, 90, 2**31 - 1, 2, 0, -1, -(2**31)])
@pytest.mark.parametrize("block", [None, -1, 15, 2**30])
@pytest.mark.parametrize("num_tokens", [3, 1])
def test_a_step_is_what_its_parts_are(
    device: str, index_format: str, dtype: torch.dtype, length: int, block: int | None, num_tokens: int
) -> None:
    """New tokens, some of them past the table, before the sequence, or in a block that there is not."""
    results, caches = [], []
    for fused in (True, False):
        case, guarded = example(dtype, device, index_format=index_format, num_tokens=num_tokens)
        for cache in (case.k_cache, case.v_cache):
            cache.nan_to_num_(0.0)
        case.index.zero_()
        case.seq_lens[0] = length
        if block is not None:
            case.block_table[0, 7] = block
        args = (case.q, case.k, case.v, case.k_cache, case.v_cache, case.index, case.block_table, case.seq_lens, 4)
        if device == "cpu" and (not 0 <= length <= TABLE or (length == 61 and block is not None)):
            refused_or(device, lambda: ops.unique_decode(*args, **case.scoring))  # noqa: B023
            return
        results.append(ops.unique_decode(*args, **case.scoring) if fused else step_by_step(case))
        caches.append((case.k_cache, case.v_cache, case.index))
        guarded.check()
    assert_same_step(*results)
    for a, b in zip(*caches, strict=True):
        assert_same(a, b)


def step_by_step(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The single ops; slots by hand."""
    num_tokens, slots = case.spec.num_tokens, []
    for b, length in enumerate(case.seq_lens.tolist()):
        for position in range(max(length, 0) - num_tokens, max(length, 0)):
            block = int(case.block_table[b, position // 8]) if 0 <= position < TABLE else -1
            slots.append(block * 8 + position % 8 if 0 <= block < 15 else -1)
    k, v = case.k.flatten(0, 1), case.v.flatten(0, 1)
    ops.append_kv(k, v, case.k_cache, case.v_cache, torch.tensor(slots, device=k.device))
    starts = (case.seq_lens.clamp(min=0) - num_tokens).clamp(min=0).int()
    ops.page_index(
        case.k_cache, case.index, case.block_table, starts, case.seq_lens, max_new_tokens=num_tokens, **case.paging
    )
    scores = ops.page_scores(case.q, case.index, case.block_table, case.seq_lens, **case.scoring)
    pages = ops.topk_pages(scores, case.seq_lens, 4, page_size=4)
    args = (case.q, case.k_cache, case.v_cache, pages, case.block_table, case.seq_lens)
    return *ops.sparse_decode(*args, **case.attending), pages
