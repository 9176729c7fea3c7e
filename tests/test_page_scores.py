"""page_scores against the oracle's scores of the same index bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    DEVICES,
    DTYPES,
    INDEXES,
    NAMED_INDEXES,
    Case,
    Spec,
    accumulator,
    assert_close,
    assert_same,
    assert_selects_best,
    assert_threads_agree,
    build,
    examples,
    poisoned,
    specs,
)
from torch import Tensor

from unique_attn import ops, reference


def run(case: Case, **options: Any) -> Tensor:
    table = (case.block_table, case.seq_lens)
    return ops.page_scores(case.q, case.index, *table, **{**case.scoring, **options})


def magnitude(case: Case, weight: float | None) -> float:
    """A bound of the sums of absolute terms that make the scores."""
    parts = reference.decode_index(case.index, **case.stored)
    entry = sum(part.double().nan_to_num(0, 0, 0).abs().amax() for part in parts)
    q = case.q.double().nan_to_num(0, 0, 0).norm(dim=-1).max() if case.q.numel() else 0.0
    return float(q * entry) * case.spec.head_dim**0.5 * max(1.0, weight or 0.0)


def assert_scores(case: Case, scores: Tensor, **options: Any) -> None:
    """``case`` is on the CPU."""
    args = (case.q, case.index, case.block_table, case.seq_lens)
    scoring = {**case.scoring, **options}
    exact = reference.page_scores(*args, **scoring, rounded=False)
    single = reference.page_scores(*args, **scoring, compute_dtype=accumulator(case.spec.dtype))
    assert scores.dtype == single.dtype == ops.score_dtype(case.spec.dtype)
    assert_close(scores, exact, single, "scores", magnitude(case, options.get("spread_weight")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@given(data=st.data())
@examples(25)
def test_equals_the_oracle(device: str, rule: str, index_format: str, data: st.DataObject) -> None:
    case = build(data.draw(specs(rule=rule, index_format=index_format)), device)
    weight = data.draw(st.sampled_from([None, 0.0, 0.3, 7.0]), label="weight")
    assert_scores(case.to("cpu"), run(case, spread_weight=weight), spread_weight=weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
def test_long_rows(device: str, rule: str, index_format: str) -> None:
    """Enough pages that the work is cut into pieces, and a budget of query tokens of each size."""
    for dtype, group, tokens in [(torch.bfloat16, 4, 1), (torch.float32, 7, 3), (torch.float16, 3, 16)]:
        lengths = (3000, 17, 2049)
        case = build(
            Spec(lengths, tokens, 2, group, 64, 8, 4, dtype=dtype, rule=rule, index_format=index_format), device
        )
        assert_scores(case.to("cpu"), run(case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@pytest.mark.parametrize("pages_per_block", [1, 3, 8, 16, 24])
def test_entries_lie_in_pieces_of_any_length(device: str, rule: str, index_format: str, pages_per_block: int) -> None:
    """Pages of a block follow each other in memory or do not; blocks that a window left behind are gone."""
    paging = {"page_size": 4, "pages_per_block": pages_per_block, "rule": rule, "index_format": index_format}
    for group, tokens, head_dim, window in [(4, 1, 128, 0), (8, 1, 64, 700), (2, 5, 256, 0), (16, 3, 128, 900)]:
        spec = Spec((1999, 2, 800), tokens, 2, group, head_dim, dtype=torch.bfloat16, window=window, **paging)
        case = build(spec, device)
        if window:
            case.block_table[0, : (1999 - tokens - window) // (4 * pages_per_block)] = 2**30
        scores = run(case)
        assert_scores(case.to("cpu"), scores)
        blocks, heads, pages, size = case.index.shape
        padded = case.index.new_full((blocks, heads, pages + 1, size + 16), 0xFF)[:, :, 1:, :size]
        case.index = padded.copy_(case.index)
        assert_same(run(case), scores)


@pytest.mark.parametrize("device", DEVICES)
def test_invisible_pages_are_minus_infinity(device: str) -> None:
    case = build(Spec(lengths=(37, 0, 3), num_tokens=5, window=9), device)
    scores = run(case).cpu()
    for b, length in enumerate(case.spec.lengths):
        for t in range(5):
            visible = reference.visible_pages(length - 5 + t, 9, 4)
            expected = torch.tensor([page in visible for page in range(scores.shape[-1])])
            assert torch.equal((scores[b, t] > -torch.inf).all(0), expected)
            assert bool((scores[b, t][:, ~expected] == -torch.inf).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_one_head_decides_and_nan_is_kept(device: str, dtype: torch.dtype) -> None:
    """The maximum over the group: of numbers the largest, NaN if any head's score is NaN."""
    case = build(Spec(lengths=(64,), group=3, kv_heads=1, rule="mean", page_size=8, dtype=dtype), device)
    alone = [run(Case(**{**vars(case), "q": case.q[:, :, g : g + 1]})) for g in range(3)]
    assert_same(run(case), torch.stack(alone).amax(0))
    case.q[:, :, 1, 3] = torch.nan
    assert bool(run(case).isnan().all())


def write_index(case: Case) -> None:
    ops.page_index(
        case.k_cache, case.index, case.block_table, torch.zeros_like(case.seq_lens), case.seq_lens,
        max_new_tokens=max(case.spec.lengths), **case.paging,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
def test_a_bad_page_does_not_touch_the_others(device: str, rule: str, index_format: str) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for dtype in DTYPES[:3]:
            case = build(
                Spec(
                    lengths=(40,),
                    rule=rule,
                    index_format=index_format,
                    page_size=8,
                    dtype=dtype,
                    group=3,
                    pages_per_block=1,
                ),
                device,
            )
            write_index(case)
            clean = run(case)
            case.k_cache[case.block_table[0, 2].long(), :, 2, 5] = bad
            write_index(case)
            scores = run(case)
            others = [0, 1, 3, 4]
            assert_same(scores[..., others], clean[..., others])
            if rule != "minmax" or bad != bad:  # the bound may come from the other end
                assert not bool(scores[..., 2].isfinite().any())
            assert_scores(case.to("cpu"), scores)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), NAMED_INDEXES)
@pytest.mark.parametrize("size", [1.0, 1e3, 5e3, 1e4, 3e4])
def test_large_fp16_keys_select_as_fp32_entries_do(device: str, rule: str, index_format: str, size: float) -> None:
    """Scores of fp16 inputs are finite, and order the pages as those of fp32 do up to the rounding of their key: 2^-8,
    and 2^-10 of the entries. The one exception is a spread of `unique` that was cut to 65504: the order is the
    oracle's."""
    spec = Spec((700, 90), 2, 2, 3, 64, 8, 2, k=6, dtype=torch.float16, rule=rule, index_format=index_format)
    case = build(spec, device)
    case.k_cache.mul_(size).clamp_(-65504.0, 65504.0)
    write_index(case)
    scores = run(case)
    pages = torch.arange(scores.shape[-1], device=device)
    seen = pages < (case.seq_lens.view(2, 1, 1) - 2 + torch.arange(2, device=device)[:, None]) // 8 + 1
    assert bool(scores[seen[:, :, None].expand(scores.shape)].isfinite().all())
    assert_scores(case.to("cpu"), scores)
    selected = ops.topk_pages(scores, case.seq_lens, 6, page_size=8)
    assert_selects_best(selected, case, 6)

    parts = reference.decode_index(case.index, **case.stored)
    if rule == "unique" and bool((parts[1] >= 61440.0).any()):  # or 65504, the largest
        return
    wide = {"q": case.q.float(), "k_cache": case.k_cache.float(), "spec": replace(spec, dtype=torch.float32)}
    wide_case = replace(case, **wide)
    wide_case.index = ops.new_index(wide_case.k_cache, **wide_case.paging)
    write_index(wide_case)
    exact = run(wide_case)
    kept = torch.zeros_like(exact, dtype=torch.bool).scatter_(-1, selected.clamp(min=0).long(), True)
    free = seen[:, :, None] & (pages > 0) & (pages < seen.sum(-1)[:, :, None, None] - 1)
    worst_kept = exact.masked_fill(~kept | ~free, torch.inf).amin(-1)
    best_dropped = exact.masked_fill(kept | ~free, -torch.inf).amax(-1)
    largest = exact.masked_fill(~seen[:, :, None], 0.0).abs().amax(-1)
    assert bool((worst_kept >= best_dropped - 2.0**-7 * largest).all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_bad_query_does_not_touch_the_others(device: str) -> None:
    for rule, index_format in INDEXES:
        case = build(Spec(lengths=(40, 33), rule=rule, index_format=index_format, num_tokens=3, kv_heads=2), device)
        clean = run(case)
        case.q[0, 1, 0] = torch.nan
        scores = run(case)
        assert bool(scores[0, 1, 0, :9].isnan().all())
        scores[0, 1, 0] = clean[0, 1, 0]
        assert_same(scores, clean)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
def test_a_second_device() -> None:
    """What a launch knows of its device is not what it learned of another one."""
    for spec in (Spec((900, 40), group=4, head_dim=64, page_size=8, dtype=torch.bfloat16), Spec((900, 40), 3)):
        case = build(spec, "cuda:0")
        assert_same(run(case.to("cuda:1")), run(case))


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_are_written_whole(device: str) -> None:
    for spec in (Spec(), Spec(lengths=(0, 500, 3), num_tokens=4, dtype=torch.bfloat16, page_size=8)):
        case = build(spec, device)
        assert_same(poisoned(lambda: run(case)), run(case))  # noqa: B023


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device: str) -> None:
    case = build(Spec(lengths=()), device)
    assert run(case).shape == (0, 1, 2, case.block_table.shape[1] * 2)
    case = build(Spec(lengths=(0, 0), num_tokens=2), device)
    assert bool((run(case) == -torch.inf).all())
    case.block_table = case.block_table[:, :0]
    assert run(case).shape == (2, 2, 2, 0)


@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
def test_threads_do_not_change_bits(rule: str, index_format: str) -> None:
    spec = Spec(
        lengths=(1500, 3, 250),
        rule=rule,
        index_format=index_format,
        page_size=8,
        head_dim=72,
        group=3,
        dtype=torch.bfloat16,
    )
    case = build(spec)
    assert_threads_agree(lambda: run(case))
