"""page_boundary against the oracle's sort, and what it promises: exact, deterministic, chunked, per sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CUDA_DTYPES, DEVICES, DTYPES, assert_same, assert_threads_agree, examples, poisoned
from torch import Tensor
from training_cases import (
    BOUNDARIES,
    LAYOUTS,
    RULES,
    TrainCase,
    TrainSpec,
    assert_boundary,
    build,
    train_specs,
)

from unique_attn import ops, reference_train, train

INF = torch.inf


def index_of(case: TrainCase) -> Tensor:
    return train.packed_index(case.k, *case.packing, rule=case.spec.rule, page_size=case.spec.page_size)


def run(case: TrainCase, **options: Any) -> Tensor:
    return ops.page_boundary(
        case.q, index_of(case), *case.packing, case.spec.num_pages, **{**case.spec.scoring, **options}
    )


def whole_numbers(case: TrainCase) -> TrainCase:
    """Numbers from -3 to 3 instead, so that the scores of rule `mean` are exact in every dtype, with many ties."""
    random = torch.Generator().manual_seed(1)
    for x in (case.q, case.k):
        x.copy_(torch.randint(-3, 4, x.shape, generator=random))
    return case


# ---- Values. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(20)
def test_equals_the_oracle(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(train_specs(dtype=dtype, mode="soft")), device)
    assert_boundary(case, run(case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(10)
def test_equals_the_oracle_exactly_where_scores_are_exact(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Whole numbers: every score is exact, many are equal, and theta is the oracle's bit for bit."""
    case = whole_numbers(build(data.draw(train_specs(dtype=dtype, rule="mean", mode="hard")), device))
    spec = case.spec
    args = (case.q.cpu(), case.k.cpu(), case.cu_seqlens.cpu(), spec.num_pages)
    theta = run(case)
    assert_same(theta + 0.0, reference_train.page_boundary(*args, **spec.scoring).to(theta.dtype) + 0.0)  # -0 is 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("note", "scores", "wanted", "expected"), BOUNDARIES, ids=[row[0] for row in BOUNDARIES])
def test_by_hand(device: str, dtype: torch.dtype, note: str, scores: list[float], wanted: int, expected: float) -> None:
    """A sink page, a page of each score, and the query's own."""
    if device == "cuda" and dtype == torch.float64:
        dtype = torch.float32
    pages = torch.tensor([9.0, *scores, -9.0]).repeat_interleave(4).to(dtype).to(device)
    k = torch.zeros(len(pages), 1, 8, dtype=dtype, device=device)
    k[:, 0, 0] = pages
    q = torch.zeros(len(pages), 2, 8, dtype=dtype, device=device)
    q[:, 0, 0], q[:, 1, 0] = 1.0, 0.0 if any(s < 0 for s in scores) else 0.25
    q = q[:, :1] if any(s < 0 for s in scores) else q  # the other head scores less
    cu_seqlens = torch.tensor([0, len(pages)], dtype=torch.int32, device=device)
    index = train.packed_index(k, cu_seqlens, len(pages), rule="mean", page_size=4)
    theta = ops.page_boundary(q, index, cu_seqlens, len(pages), wanted + 2, rule="mean", page_size=4)
    assert float(theta[-1]) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "two values", "equal", "few large", "ascending", "descending"])
def test_many_candidates(device: str, dtype: torch.dtype, kind: str) -> None:
    """Rows that are long enough for a sample of their scores, with scores that make a sample mislead."""
    count, page_size, wanted = 5000, 4, 60
    noise = torch.randn(count, generator=torch.Generator().manual_seed(3))
    pages = {
        "normal": noise,
        "two values": (noise > 0).float(),
        "equal": torch.full((count,), 3.25),
        "few large": torch.where(noise > 2.6, noise, 0.0),  # fewer than wanted
        "ascending": torch.arange(count) / 4,
        "descending": -torch.arange(count) / 4,
    }[kind].to(torch.bfloat16)
    k = torch.zeros(count * page_size, 1, 8, dtype=dtype, device=device)
    k[:, 0, 0] = pages.repeat_interleave(page_size).to(dtype).to(device)
    q = torch.zeros_like(k)
    q[:, 0, 0] = 1.0
    cu_seqlens = torch.tensor([0, len(k)], dtype=torch.int32, device=device)
    index = train.packed_index(k, cu_seqlens, len(k), rule="mean", page_size=page_size)
    theta = ops.page_boundary(q, index, cu_seqlens, len(k), wanted + 2, rule="mean", page_size=page_size).cpu()
    for own in (100, 1100, 2200, 4200, 4999):
        ranked = pages[1:own].to(theta.dtype).sort(descending=True).values
        assert float(theta[own * page_size, 0]) == float((ranked[wanted - 1] + ranked[wanted]) / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_a_nan_query_counts_as_the_lowest_score(device: str, rule: str) -> None:
    """All its scores are NaN: theta is -inf, and no other query's theta changes."""
    case = build(TrainSpec((80,), rule=rule), device)
    clean = run(case)
    case.q[70, 1, 3] = torch.nan  # a head of KV head 0
    theta = run(case)
    assert float(theta[70, 0]) == -INF
    assert_same(torch.cat([theta[:70], theta[71:]]), torch.cat([clean[:70], clean[71:]]))
    assert_same(theta[70, 1:], clean[70, 1:])


@pytest.mark.parametrize("device", DEVICES)
def test_where_a_gate_begins(device: str) -> None:
    """Page borders: theta is finite from the first query on that has more than k' candidates."""
    for page_size in (4, 8, 64):
        for sink, recent, extra in [(1, 1, 1), (0, 1, 2), (2, 3, 1)]:
            length = (sink + recent + extra + 2) * page_size + 1
            spec = TrainSpec((length,), page_size=page_size, sink_pages=sink, recent_pages=recent)
            theta = run(build(replace(spec, num_pages=sink + recent + extra), device))
            first = (sink + recent + extra) * page_size
            assert bool((theta[:first] == -INF).all())
            assert bool(theta[first:].isfinite().all())
            theta = run(build(replace(spec, num_pages=sink + recent), device))  # k' = 0
            first = (sink + recent) * page_size
            assert bool((theta[:first] == -INF).all())
            assert bool((theta[first:] == INF).all())


@pytest.mark.parametrize("device", DEVICES)
def test_spread_has_the_documented_defaults(device: str) -> None:
    for rule, default in [("unique", 0.5), ("directional", 2.0)]:
        case = build(TrainSpec((60,), rule=rule), device)
        assert_same(run(case), run(case, spread_weight=default))
        assert not torch.equal(run(case), run(case, spread_weight=default / 2))
        assert_same(run(case, spread_weight=0.0), run(case, spread_weight=-0.0))


# ---- Packing, layouts, chunks. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@given(data=st.data())
@examples(8)
def test_packed_sequences_are_as_if_alone(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(train_specs(dtype=dtype, mode="hard")), device)
    packed = run(case)
    loose = replace(case, spec=replace(case.spec, lengths=(*case.spec.lengths, 10**6)))  # a bound that is not tight
    assert_same(run(loose), packed)
    for part in case.sequences:
        assert_same(run(case.alone(part)), packed[part])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_strides_do_not_matter(device: str, dtype: torch.dtype) -> None:
    spec = TrainSpec((70, 21), group=3, head_dim=40, dtype=dtype)
    expected = run(build(spec, device))
    for layout in LAYOUTS:
        assert_same(run(build(replace(spec, layout=layout), device)), expected, layout)
    case = build(spec, device)
    index = index_of(case)
    wide = torch.cat([index, torch.full_like(index, 0xFF)], dim=-1)[..., : index.shape[-1]]
    moved = wide.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (wide, moved):
        got = ops.page_boundary(case.q, strided, *case.packing, spec.num_pages, **spec.scoring)
        assert_same(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_many_tokens(device: str, rule: str) -> None:
    """More scores than one chunk holds on CUDA (256 MiB): a packed batch equals its sequences alone, and rows on
    both sides of every border of a chunk equal the oracle's."""
    lengths, heads = ((5003, 1, 0, 6998), 8) if device == "cuda" else ((1203, 1, 0, 798), 2)
    spec = TrainSpec(lengths, heads, 1, 8, dtype=torch.bfloat16, rule=rule, mode="hard", num_pages=40)
    case = whole_numbers(build(spec, device))
    theta = run(case)
    tokens = sum(lengths)
    for part in case.sequences:
        length = part.stop - part.start
        assert_same(run(case.alone(part)), theta[part])
        if rule != "mean" or length < 2:
            continue
        rows = torch.tensor([t for t in range(tokens) if part.start <= t < part.stop and t % 97 < 2]) - part.start
        q, k = case.q[part].cpu().double(), case.k[part].cpu().double()
        scores = reference_train.group_max(
            reference_train.head_scores(q[rows], k, rule, 4, spec.weight, torch.bfloat16)
        )
        mask = reference_train.candidate_mask(length, scores.shape[-1], 4, 1, 1)[rows]
        expected = reference_train.boundary(scores, mask, 38, torch.bfloat16)
        assert_same(theta[part].cpu()[rows] + 0.0, expected.float() + 0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_and_no_sequences(device: str) -> None:
    for lengths in ((), (0,), (0, 0), (1,), (0, 1, 0)):
        case = build(TrainSpec(lengths), device)
        theta = run(case)
        assert theta.shape == (sum(lengths), 2)
        assert bool((theta == -INF).all())


# ---- Determinism. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_repeats_and_stale_memory(device: str, dtype: torch.dtype, rule: str) -> None:
    for spec in (TrainSpec((300, 3, 0), group=3, head_dim=64, page_size=8), TrainSpec((500,), group=4, head_dim=128)):
        case = build(replace(spec, dtype=dtype, rule=rule, mode="hard"), device)
        first = run(case)
        for again in (run(case), poisoned(lambda: run(case))):  # noqa: B023
            assert_same(again, first)


def test_threads_do_not_change_bits() -> None:
    for dtype in CUDA_DTYPES:
        case = build(TrainSpec((301, 0, 57), group=3, head_dim=40, dtype=dtype, mode="hard"))
        assert_threads_agree(lambda: run(case))  # noqa: B023


@pytest.mark.parametrize("device", DEVICES)
def test_theta_carries_no_gradient(device: str) -> None:
    case = build(TrainSpec((60,)), device)
    case.q.requires_grad_()
    case.k.requires_grad_()
    assert not run(case).requires_grad
