"""topk_pages: the exact set of a stable sort, from scores of every kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICES, PAGE_SIZES, assert_same, assert_threads_agree, examples, poisoned
from torch import Tensor

from unique_attn import ops, reference

SCORE_DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def check(scores: Tensor, seq_lens: Tensor, k: int, device: str, **options: Any) -> Tensor:
    if device == "cuda" and scores.dtype == torch.float64:
        scores = scores.float()
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    pages = ops.topk_pages(scores.to(device), seq_lens.to(device), k, **there)
    assert_same(pages, reference.topk_pages(scores, seq_lens, k, **options), "pages")
    return pages


def row_of_kind(kind: str, count: int, k: int, random: torch.Generator) -> Tensor:
    """``count`` scores that are hard for a radix selection in one way."""
    noise = torch.randn(count, generator=random)
    if kind == "normal":
        return noise
    if kind == "all equal":
        return torch.full((count,), 3.25)
    if kind == "two values":
        return torch.where(noise > 0, 1.0, 1.0078125)  # neighbours in bf16
    if kind == "ascending":
        return torch.arange(count).float()
    if kind == "descending":
        return -torch.arange(count).float()
    if kind == "all NaN":
        return torch.full((count,), math.nan)
    if kind == "numbers among -inf":
        row = torch.full((count,), -math.inf)
        chosen = torch.randperm(count, generator=random)[: k // 2 + 1]
        row[chosen] = noise[chosen]
        return row
    if kind == "NaN everywhere":
        return torch.where(torch.rand(count, generator=random) < 0.7, math.nan, noise)
    if kind == "NaN below -inf":
        return torch.where(noise < 0, math.nan, -math.inf)
    if kind == "zeros of both signs":
        return torch.where(noise < 0, -0.0, 0.0)
    if kind == "around zero":  # denormals and zeros of both signs
        return (noise * 1.5).round() * 2.0**-133
    if kind == "few values":
        return (2 * noise).round()
    if kind == "low bits":  # differ only in the last byte of fp32
        return (torch.full((count,), 1.0).view(torch.int32) + (noise * 40).int()).view(torch.float32)
    if kind == "extremes":
        values = torch.tensor([math.inf, -math.inf, 3.38e38, -3.38e38, 1e-40, -1e-40, 0.0, math.nan])
        return values[torch.randint(len(values), (count,), generator=random)]
    if kind == "cluster":  # neighbours in all dtypes but fp64, with outliers
        row = 1 + noise.double() * 2.0**-20
        for outlier in (1e30, -1e30):
            row[int(torch.randint(count, (), generator=random))] = outlier
        return row
    if kind == "outliers that halve":
        return torch.where(torch.rand(count, generator=random) < 0.02, 2.0 ** (noise * 30), noise * 2.0**-100)
    # The CPU samples a row at about equal distances: here most of a sample may be the best scores, or the worst.
    stripes = torch.arange(count) % max(count // 256, 4) < 3
    if kind == "stripes above":
        return noise + 100 * stripes
    if kind == "stripes below":
        return noise - 100 * stripes
    raise AssertionError(kind)


KINDS = [
    "normal", "all equal", "two values", "ascending", "descending", "all NaN", "numbers among -inf",
    "NaN everywhere", "NaN below -inf", "zeros of both signs", "around zero", "few values", "low bits", "extremes",
    "cluster", "outliers that halve", "stripes above", "stripes below",
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@examples(120)
def test_equals_the_oracle(device: str, data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from(PAGE_SIZES), label="page_size")
    count = data.draw(st.one_of(st.integers(1, 40), st.integers(1, 700)), label="P")
    batch, tokens = data.draw(st.integers(0, 3), label="B"), data.draw(st.sampled_from([1, 1, 2, 7, 16]), label="T")
    heads = data.draw(st.integers(1, 3), label="H")
    sink, recent = data.draw(st.integers(0, 5), label="sink"), data.draw(st.integers(0, 5), label="recent")
    k = data.draw(st.one_of(st.integers(1, 20), st.integers(1, 300)), label="k")
    k = max(k, sink + recent, 1)
    border = st.builds(lambda n, d: n * page_size + d, st.integers(0, count), st.integers(-1, 1))
    near_k = st.builds(lambda d: k * page_size + d, st.integers(-2, page_size + 1))
    length = st.one_of(st.integers(0, count * page_size), border, near_k, st.just(count * page_size))
    lens = [min(count * page_size, max(0, data.draw(length, label="seq_len"))) for _ in range(batch)]
    window = data.draw(st.one_of(st.just(0), st.integers(1, count * page_size + 3)), label="window")
    kind = data.draw(st.sampled_from(KINDS), label="kind")
    dtype = data.draw(st.sampled_from(SCORE_DTYPES), label="dtype")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    rows = [row_of_kind(kind, count, k, random) for _ in range(batch * tokens * heads)]
    scores = torch.stack(rows).to(dtype) if rows else torch.zeros(0, dtype=dtype)
    options: dict[str, Any] = {}
    if data.draw(st.booleans(), label="budget"):
        budgets = [data.draw(st.integers(-2, k + 3), label="budget") for _ in range(batch)]
        options["budget_pages"] = torch.tensor(budgets, dtype=torch.int32)
    if data.draw(st.booleans(), label="physical"):
        per_block = data.draw(st.integers(1, 4), label="pages_per_block")
        width = -(-count // per_block)
        table = torch.randint(0, 999, (batch, width), generator=random, dtype=torch.int32)
        options |= {"block_table": table, "pages_per_block": per_block}
    check(
        scores.view(batch, tokens, heads, count), torch.tensor(lens, dtype=torch.int32), k, device,
        page_size=page_size, sink_pages=sink, recent_pages=recent, window=window, **options,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_scores(device: str, kind: str) -> None:
    """Rows longer than any block of threads, in each dtype, for small and large k."""
    random = torch.Generator().manual_seed(5)
    for dtype in SCORE_DTYPES:
        for count, k in [(5000, 64), (3000, 2048), (129, 128), (70000, 100)]:
            scores = torch.stack([row_of_kind(kind, count, k, random) for _ in range(2)]).view(1, 1, 2, count)
            lens = torch.tensor([count * 8 - 3], dtype=torch.int32)
            check(scores.to(dtype), lens, k, device, page_size=8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks(device: str, kind: str) -> None:
    """Rows of several chunks, where they begin on no vector; k at which blocks and lists of candidates change."""
    random = torch.Generator().manual_seed(10)
    for dtype in [torch.bfloat16, torch.float32]:
        for count, k in [(40001, 64), (16389, 65), (33000, 129), (33003, 256), (20001, 257), (24575, 512), (9000, 513)]:
            scores = torch.stack([row_of_kind(kind, count, k, random) for _ in range(3)]).view(1, 1, 3, count)
            lens = torch.tensor([count * 4], dtype=torch.int32)
            check(scores.to(dtype), lens, k, device, page_size=4)
            check(scores.to(dtype), lens - 9, k, device, page_size=4, window=count * 3 + 5, sink_pages=3)


@pytest.mark.parametrize("device", DEVICES)
def test_many_long_rows(device: str) -> None:
    """More rows than a device has multiprocessors; best scores last, together, and all in the same few threads."""
    random = torch.Generator().manual_seed(11)
    count = 17000
    rows = [
        row_of_kind(kind, count, 64, random) for kind in ("ascending", "normal", "few values", "numbers among -inf")
    ]
    together, strided = rows[1] / 64, rows[1] / 64
    together[9000:13000] += 4
    strided[torch.arange(count) // 8 % 512 < 70] += 4
    scores = torch.stack([*rows, together, strided]).repeat(50, 1).view(2, 1, 150, count)
    lens = torch.tensor([count * 4, count * 4 - 3], dtype=torch.int32)
    for dtype in [torch.bfloat16, torch.float32]:
        check(scores.to(dtype), lens, 64, device, page_size=4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_million_pages(device: str, dtype: torch.dtype) -> None:
    count = 2**20
    random = torch.Generator().manual_seed(6)
    kinds = ["normal", "few values", "numbers among -inf"]
    scores = torch.stack([row_of_kind(kind, count, 4096, random) for kind in kinds]).view(1, 1, 3, count).to(dtype)
    lens = torch.tensor([count * 4], dtype=torch.int32)
    check(scores, lens, 4096, device, page_size=4)
    check(scores, lens - 5, 1, device, page_size=4, sink_pages=0)


@pytest.mark.parametrize("device", DEVICES)
def test_every_k_on_a_short_row(device: str) -> None:
    scores = torch.randn(2, 1, 2, 33, generator=torch.Generator().manual_seed(7)).bfloat16()
    for seq_len in (1, 4, 5, 64, 127, 128, 129, 132):
        lens = torch.tensor([seq_len, 0], dtype=torch.int32)
        for k in range(2, 36):
            check(scores, lens, k, device, page_size=4)


@pytest.mark.parametrize("device", DEVICES)
def test_forced_pages_beat_any_score(device: str) -> None:
    """Sink and recent pages are taken with the worst scores, count toward k, and a small budget keeps the newest."""
    scores = torch.full((1, 1, 1, 10), 5.0)
    scores[..., [0, 1, 8, 9]] = math.nan
    lens = torch.tensor([80], dtype=torch.int32)

    def select(budget: int, window: int = 0) -> list[int]:
        pages = check(
            scores, lens, 6, device, page_size=8, sink_pages=2, recent_pages=2, window=window,
            budget_pages=torch.tensor([budget], dtype=torch.int32),
        )  # fmt: skip
        return [page for page in pages.flatten().tolist() if page >= 0]

    assert select(6) == [0, 1, 2, 3, 8, 9]
    assert select(100) == [0, 1, 2, 3, 8, 9]
    assert select(4) == [0, 1, 8, 9]
    assert select(3) == [0, 8, 9]
    assert select(2) == [8, 9]
    assert select(1) == [9]
    assert select(0) == []
    assert select(6, window=35) == [5, 6, 7, 8, 9]
    assert select(6, window=1) == [9]


@pytest.mark.parametrize("device", DEVICES)
def test_scores_past_the_own_page_do_not_count(device: str) -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, math.inf, math.nan]).expand(1, 1, 1, 6).contiguous()
    pages = check(scores, torch.tensor([14], dtype=torch.int32), 3, device, page_size=4, sink_pages=0)
    assert pages.flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("device", DEVICES)
def test_physical_pages_read_no_junk(device: str) -> None:
    scores = torch.arange(8.0).flip(0).view(1, 1, 1, 8)
    table = torch.tensor([[5, 2, -1, 2**30]], dtype=torch.int32)
    options = {"page_size": 4, "block_table": table, "pages_per_block": 2}
    pages = check(scores, torch.tensor([13], dtype=torch.int32), 5, device, **options)
    assert pages.flatten().tolist() == [10, 11, 4, 5, -1]


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_give_the_same_bits(device: str) -> None:
    scores = row_of_kind("few values", 4 * 20000, 64, torch.Generator().manual_seed(8)).view(2, 1, 2, 20000)
    scores, lens = scores.to(device), torch.tensor([160000, 90001], dtype=torch.int32, device=device)
    first = ops.topk_pages(scores, lens, 64, page_size=8)
    for _ in range(5):
        assert_same(ops.topk_pages(scores, lens, 64, page_size=8), first)
    assert_same(poisoned(lambda: ops.topk_pages(scores, lens, 64, page_size=8)), first)


def test_threads_do_not_change_bits() -> None:
    scores = row_of_kind("few values", 6 * 3000, 64, torch.Generator().manual_seed(9)).view(2, 1, 3, 3000)
    lens = torch.tensor([24000, 901], dtype=torch.int32)
    assert_threads_agree(lambda: ops.topk_pages(scores, lens, 64, page_size=8))


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device: str) -> None:
    lens = torch.zeros(0, dtype=torch.int32, device=device)
    assert ops.topk_pages(torch.zeros(0, 2, 3, 9, device=device), lens, 4, page_size=8).shape == (0, 2, 3, 4)
    lens = torch.zeros(2, dtype=torch.int32, device=device)
    pages = ops.topk_pages(torch.zeros(2, 1, 1, 0, device=device), lens, 4, page_size=8)
    assert pages.tolist() == [[[[-1] * 4]]] * 2
