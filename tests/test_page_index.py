"""page_index against the oracle's unrounded entries, and the bytes that it must leave alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    DEVICES,
    INDEXES,
    NAMED_INDEXES,
    PAGE_SIZES,
    Case,
    Spec,
    accumulator,
    assert_close,
    assert_same,
    assert_threads_agree,
    build,
    examples,
    specs,
)
from torch import Tensor

from unique_attn import ops, reference

DIRECTIONAL = {"rule": "directional", "index_format": "exact"}


def entries(case: Case, compute_dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Parts ``[H, pages, ...]`` of each sequence's entries in ``compute_dtype``, in logical order, not rounded."""
    result = []
    for b, length in enumerate(case.spec.lengths):
        keys = reference.gather_tokens(case.k_cache, case.block_table[b], length).to(compute_dtype)
        pages = torch.split(keys, case.spec.page_size, dim=1) if length else ()
        each = [reference.page_entry(page, case.spec.rule) for page in pages]
        result.append(tuple(torch.stack(parts, dim=1) for parts in zip(*each, strict=True)))
    return result


def read(case: Case, index: Tensor, b: int) -> list[Tensor]:
    """Parts of the entries of sequence b, in logical order."""
    pages = torch.arange(-(-case.spec.lengths[b] // case.spec.page_size))
    blocks = case.block_table[b, pages // case.spec.pages_per_block].long()
    parts = ops.decode_index(index, **case.stored)
    return [part[blocks, :, pages % case.spec.pages_per_block].transpose(0, 1) for part in parts]


def assert_compressed(case: Case, index: Tensor, device: str) -> None:
    """Every entry has, byte for byte, what the oracle makes of the statistics that the op stores in an exact index."""
    dtype = accumulator(case.spec.dtype)  # in which they are not rounded
    exact = replace(case, k_cache=case.k_cache.to(dtype), spec=replace(case.spec, dtype=dtype, **DIRECTIONAL))
    exact.index = reference.new_index(exact.k_cache, **exact.paging)
    statistics = run(exact, torch.zeros_like(case.seq_lens), device)
    expected = reference.compress(*ops.decode_index(statistics, **exact.stored), case.spec.rule)
    for b, length in enumerate(case.spec.lengths):
        pages = torch.arange(-(-length // case.spec.page_size))
        blocks = case.block_table[b, pages // case.spec.pages_per_block].long()
        inner = pages % case.spec.pages_per_block
        assert_same(index[blocks, :, inner], expected[blocks, :, inner], f"entries of sequence {b}")


def assert_index(case: Case, index: Tensor, device: str) -> None:
    """Every entry is right: within the error bound, or the oracle's bytes; ``case`` and ``index`` are on the CPU."""
    if case.spec.index_format == "compressed":
        assert_compressed(case, index, device)
        return
    dtype = case.spec.dtype
    exact, single = entries(case, torch.float64), entries(case, accumulator(dtype))
    for b, length in enumerate(case.spec.lengths):
        if length:
            for i, part in enumerate(read(case, index, b)):
                assert_close(part, exact[b][i], single[b][i].to(dtype), f"part {i} of sequence {b}")


def run(case: Case, start_lens: Tensor, device: str, max_new_tokens: int | None = None) -> Tensor:
    """The op's index, over a poisoned one, on the CPU."""
    there = case.to(device)
    index = torch.full_like(there.index, 0xFF)
    ops.page_index(
        there.k_cache, index, there.block_table, start_lens.to(device), there.seq_lens,
        max_new_tokens=max([0, *case.spec.lengths]) if max_new_tokens is None else max_new_tokens,
        **case.paging,
    )  # fmt: skip
    return index.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@given(data=st.data())
@examples(15)
def test_whole_prefill_equals_the_oracle(device: str, rule: str, index_format: str, data: st.DataObject) -> None:
    case = build(data.draw(specs(rule=rule, index_format=index_format)), device).to("cpu")
    assert_index(case, run(case, torch.zeros_like(case.seq_lens), device), device)


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@examples(40)
def test_only_touched_pages_are_written(device: str, data: st.DataObject) -> None:
    case = build(data.draw(specs(shared=False)), device).to("cpu")
    spec = case.spec
    starts = [data.draw(st.integers(max(0, n - 40), n), label="start") for n in spec.lengths]
    most = max([0, *(n - s for n, s in zip(spec.lengths, starts, strict=True))])
    bound = most + data.draw(st.integers(0, 30), label="slack of max_new_tokens")
    index = run(case, torch.tensor(starts, dtype=torch.int32), device, bound)
    whole = run(case, torch.zeros_like(case.seq_lens), device)
    touched = torch.zeros(index.shape[0], index.shape[2], dtype=torch.bool)
    for b, (start, end) in enumerate(zip(starts, spec.lengths, strict=True)):
        for page in range(start // spec.page_size, -(-end // spec.page_size) if start < end else 0):
            block = case.block_table[b, page // spec.pages_per_block]
            touched[block, page % spec.pages_per_block] = True
    rows = touched[:, None].expand(index.shape[:3])
    assert_same(index[rows], whole[rows], "touched pages")
    assert bool((index[~rows] == 0xFF).all()), "a page without new tokens was written"


@pytest.mark.parametrize("device", DEVICES)
def test_token_by_token_equals_prefill(device: str) -> None:
    """Appending, with every prefix of a page: the same bits as computing the page at once."""
    for rule, index_format in INDEXES:
        case = build(
            Spec(lengths=(41, 9), rule=rule, index_format=index_format, page_size=8, dtype=torch.bfloat16), device
        )
        index = torch.zeros_like(case.index)
        zero = torch.zeros_like(case.seq_lens)
        for n in range(1, 42):
            lens = torch.tensor([n, min(n, 9)], dtype=torch.int32, device=device)
            starts = torch.tensor([n - 1, min(n - 1, 9)], dtype=torch.int32, device=device)
            options = case.paging
            ops.page_index(case.k_cache, index, case.block_table, starts, lens, max_new_tokens=1, **options)
            whole = torch.zeros_like(index)
            ops.page_index(case.k_cache, whole, case.block_table, zero, lens, max_new_tokens=41, **options)
            assert_same(index, whole, f"{rule} after {n} tokens")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_cancellation(device: str, dtype: torch.dtype) -> None:
    """Large mean, small spread: E[x^2] - E[x]^2 in fp32 would be off by more than 0.1."""
    for page_size in PAGE_SIZES:
        for rule in ("unique", "directional"):
            spec = Spec(lengths=(4 * page_size + 3,), rule=rule, page_size=page_size, dtype=dtype, head_dim=64)
            case = build(spec)
            case.k_cache.mul_(2.0**-4).add_(1000.0)
            index = run(case, torch.zeros_like(case.seq_lens), device)
            exact, tolerance = entries(case, torch.float64)[0], max(1e-5, torch.finfo(dtype).eps)
            for part, expected in zip(read(case, index, 0), exact, strict=True):
                torch.testing.assert_close(part.double(), expected, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), NAMED_INDEXES)
def test_nan_and_inf_stay_in_their_page(device: str, rule: str, index_format: str) -> None:
    spec = Spec(lengths=(40,), rule=rule, index_format=index_format, page_size=8, pages_per_block=1, head_dim=24)
    case = build(spec)
    clean = run(case, torch.zeros_like(case.seq_lens), device)
    case.k_cache[case.block_table[0, 1].long(), 0, 3, 5] = torch.nan
    case.k_cache[case.block_table[0, 3].long(), 1, 0, 23] = torch.inf
    index = run(case, torch.zeros_like(case.seq_lens), device)
    assert_index(case, index, device)
    before, after = read(case, clean, 0), read(case, index, 0)
    for old, new in zip(before, after, strict=True):
        for h, page in ((h, p) for h in range(2) for p in range(5) if (h, p) not in ((0, 1), (1, 3))):
            assert_same(new[h, page], old[h, page])


@pytest.mark.parametrize("device", DEVICES)
def test_constant_pages_have_no_spread(device: str) -> None:
    for rule, index_format in INDEXES:
        case = build(Spec(lengths=(37,), rule=rule, index_format=index_format, page_size=8), device)
        case.k_cache.fill_(0.1)
        index = torch.zeros_like(case.index)
        ops.page_index(
            case.k_cache, index, case.block_table, torch.zeros_like(case.seq_lens), case.seq_lens,
            max_new_tokens=37, rule=rule, index_format=index_format, page_size=8,
        )  # fmt: skip
        parts = read(case.to("cpu"), index.cpu(), 0)
        tolerance = 2.0**-11 if index_format == "compressed" else 1e-6  # the outlier is kept in fp16
        torch.testing.assert_close(parts[0], torch.full_like(parts[0], 0.1), rtol=tolerance, atol=0)
        if rule in ("unique", "directional"):
            assert float(parts[1].abs().max()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@pytest.mark.parametrize("size", [1e3, 9e3, 3e4, 65504.0])
def test_entries_of_large_fp16_keys_are_finite(device: str, rule: str, index_format: str, size: float) -> None:
    """The spread of `unique` sums over the channels and leaves the range of fp16 before any key does."""
    paging = {"rule": rule, "index_format": index_format, "page_size": 8}
    for head_dim in (64, 128, 256):
        case = build(Spec(lengths=(75, 9), dtype=torch.float16, head_dim=head_dim, **paging))
        case.k_cache.mul_(size).clamp_(-65504.0, 65504.0)
        index = run(case, torch.zeros_like(case.seq_lens), device)
        if index_format == "compressed":
            assert_compressed(case, index, device)
        expected = torch.full_like(index, 0xFF)
        reference.page_index(
            case.k_cache, expected, case.block_table, torch.zeros_like(case.seq_lens), case.seq_lens,
            max_new_tokens=75, **paging,
        )  # fmt: skip
        for b in range(2):
            for part, wanted in zip(read(case, index, b), read(case, expected, b), strict=True):
                assert bool(part.isfinite().all())
                if index_format == "exact":
                    torch.testing.assert_close(part, wanted, rtol=2.0**-10, atol=0.01)
        if (rule, index_format) == ("unique", "exact") and size * head_dim**0.5 > 2e5:
            assert bool((read(case, index, 0)[1] == 65504.0).all())


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch_and_new_index(device: str) -> None:
    for rule, index_format in INDEXES:
        case = build(Spec(lengths=(), rule=rule, index_format=index_format), device)
        index = case.index.clone()
        ops.page_index(
            case.k_cache, index, case.block_table, case.seq_lens, case.seq_lens,
            max_new_tokens=0, rule=rule, index_format=index_format, page_size=4,
        )  # fmt: skip
        assert_same(index, case.index)
        fresh = ops.new_index(case.k_cache, rule=rule, index_format=index_format, page_size=4)
        assert_same(fresh, reference.new_index(case.k_cache, rule=rule, index_format=index_format, page_size=4))
        assert fresh.shape[-1] == ops.index_entry_bytes(rule, case.spec.head_dim, case.spec.dtype, index_format)


@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
def test_threads_do_not_change_bits(rule: str, index_format: str) -> None:
    case = build(
        Spec(
            lengths=(700, 3, 250), rule=rule, index_format=index_format, page_size=8, head_dim=72, dtype=torch.bfloat16
        )
    )
    assert_threads_agree(lambda: run(case, torch.zeros_like(case.seq_lens), "cpu"))
