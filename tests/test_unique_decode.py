"""unique_decode: the ops in one call. Its own selection and its own attention are tested together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CUDA_DTYPES,
    DEVICES,
    INDEXES,
    Case,
    Spec,
    assert_same,
    assert_same_step,
    assert_selects_best,
    assert_step,
    assert_threads_agree,
    build,
    examples,
    poisoned,
    specs,
    step,
)
from torch import Tensor

from unique_attn import ops, reference


def forget_last_tokens(case: Case) -> None:
    """Put NaN where the step's own tokens go, and 0xFF in the index of the pages that they touch."""
    spec = case.spec
    slots = reference.step_slots(case.block_table, case.seq_lens, spec.num_tokens, case.k_cache.shape[2])
    for slot in slots.tolist():
        if slot >= 0:
            block, offset = divmod(slot, case.k_cache.shape[2])
            case.k_cache[block, :, offset] = torch.nan
            case.v_cache[block, :, offset] = torch.nan
            case.index[block, :, offset // spec.page_size] = 0xFF


def by_single_ops(case: Case, num_pages: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The step made of the single ops, in place."""
    spec, tables = case.spec, (case.block_table, case.seq_lens)
    slots = reference.step_slots(*tables, spec.num_tokens, case.k_cache.shape[2])
    ops.append_kv(case.k.flatten(0, 1), case.v.flatten(0, 1), case.k_cache, case.v_cache, slots)
    starts = (case.seq_lens - spec.num_tokens).clamp(min=0)
    ops.page_index(case.k_cache, case.index, case.block_table, starts, case.seq_lens,
                   max_new_tokens=spec.num_tokens, **case.paging)  # fmt: skip
    scores = ops.page_scores(case.q, case.index, *tables, **case.scoring)
    selecting = {**case.attending, **options}
    pages = ops.topk_pages(scores, case.seq_lens, num_pages, **selecting)
    out, lse = ops.sparse_decode(case.q, case.k_cache, case.v_cache, pages, *tables, **case.attending)
    assert_same(pages, reference.topk_pages(scores.cpu(), case.seq_lens.cpu(), num_pages,
                                            **{n: o.cpu() if isinstance(o, Tensor) else o
                                               for n, o in selecting.items()}))  # fmt: skip
    return out, lse, pages


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@given(data=st.data())
@examples(25)
def test_equals_the_single_ops_and_the_oracle(device: str, rule: str, index_format: str, data: st.DataObject) -> None:
    case = build(data.draw(specs(rule=rule, index_format=index_format)), device)
    options: dict[str, Any] = {"sink_pages": data.draw(st.integers(0, 2)), "recent_pages": data.draw(st.integers(0, 2))}
    num_pages = max(case.spec.k, options["sink_pages"] + options["recent_pages"])
    if data.draw(st.booleans(), label="budget"):
        budget = [data.draw(st.integers(0, num_pages + 1)) for _ in case.spec.lengths]
        options["budget_pages"] = torch.tensor(budget, dtype=torch.int32, device=device)
    forget_last_tokens(case)
    one, parts = case.clone(), case.clone()
    result = step(one, num_pages, **options)
    assert_same_step(result, by_single_ops(parts, num_pages, **options))
    for name in ("k_cache", "v_cache", "index"):
        assert_same(getattr(one, name), getattr(parts, name), name)
    assert_step(case, one, result, num_pages, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_without_new_keys(device: str) -> None:
    """k and v None: the tokens are in the cache already, and only the index is written."""
    case = build(Spec((61, 7), 3, page_size=8), device)
    with_kv, without = case.clone(), case.clone()
    without.index[without.index != 0] = 0xFF
    without.index.copy_(case.index)
    expected = step(with_kv, 4)
    got = step(without, 4, new_keys=False)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)
    for name in ("k_cache", "v_cache", "index"):
        assert_same(getattr(without, name), getattr(with_kv, name), name)
    assert_same(without.k_cache, case.k_cache)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("new_keys", [True, False])
@pytest.mark.parametrize("num_pages", [4, 40])
def test_into_memory_of_the_caller(device: str, new_keys: bool, num_pages: int) -> None:
    """`out` in the middle of a larger tensor, as an engine's buffer; with few and with many pages, which are split."""
    case = build(Spec((400, 7), 3, page_size=8, head_dim=64), device)
    given = case.clone()
    expected = step(case, num_pages, new_keys=new_keys)
    buffer = torch.full((case.q.shape[0] + 2, *case.q.shape[1:]), torch.nan, device=device, dtype=case.q.dtype)
    out, lse, pages = step(given, num_pages, new_keys=new_keys, out=buffer[1:-1])
    assert out.data_ptr() == buffer[1].data_ptr()
    for got, each in zip((buffer[1:-1], lse, pages), expected, strict=True):
        assert_same(got, each)
    assert buffer[[0, -1]].isnan().all()
    for name in ("k_cache", "v_cache", "index"):
        assert_same(getattr(given, name), getattr(case, name), name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "index"])
def test_results_overwrite_no_argument(device: str, name: str) -> None:
    """`out` may begin in the middle of what the step reads."""
    case = build(Spec((61, 7), 1, page_size=8, head_dim=64), device)
    flat = getattr(case, name).flatten().view(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(case.q.nbytes)])  # room behind it
    setattr(case, name, flat[: -case.q.nbytes].view(getattr(case, name).dtype).view(getattr(case, name).shape))
    end = flat.numel() - case.q.nbytes
    out = flat[end - 16 : end - 16 + case.q.nbytes].view(case.q.dtype).view(case.q.shape)
    before = case.clone()
    with pytest.raises(ValueError, match=f"^unique_decode: out: expected memory of its own, got some of {name}$"):
        step(case, 4, out=out)
    assert_same(getattr(case, name), getattr(before, name))
    step(case, 4, out=flat[end:].view(case.q.dtype).view(case.q.shape))


@pytest.mark.parametrize("device", DEVICES)
def test_new_tokens_without_a_slot_are_not_written(device: str) -> None:
    """The padding of an engine's captured steps; else as with all slots. Pages of such tokens alone are not indexed."""
    case = build(Spec((61, 7, 12, 18), 3, page_size=8), device)
    forget_last_tokens(case)
    slots = reference.step_slots(case.block_table, case.seq_lens, 3, case.k_cache.shape[2])
    whole, one, parts = case.clone(), case.clone(), case.clone()
    for got, each in zip(step(whole, 4, slot_mapping=slots), step(case, 4), strict=True):
        assert_same(got, each)
    assert_same(whole.k_cache, case.k_cache)
    left_out = [1, 3, 4, 5, 9]  # of the last sequence the one token in its second page
    slots[left_out] = -1
    before = case.clone()
    forget_last_tokens(before)
    one, parts = before.clone(), before.clone()
    out, _, _ = step(one, 4, slot_mapping=slots)
    ops.append_kv(parts.k.flatten(0, 1), parts.v.flatten(0, 1), parts.k_cache, parts.v_cache, slots)
    expected, _, _ = step(parts, 4, new_keys=False)
    for row, page in ((1, 0), (3, 1)):
        block, place = divmod(page, parts.index.shape[2])
        block = int(parts.block_table[row, block])
        assert (before.index[block, :, place] == 0xFF).all()
        parts.index[block, :, place] = 0xFF
    for name in ("k_cache", "v_cache", "index"):
        assert_same(getattr(one, name), getattr(parts, name), name)
    assert_same(out[0], expected[0])
    assert_same(out[2], expected[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@pytest.mark.parametrize("window", [0, 100])
def test_a_table_as_wide_as_any_length_to_come(device: str, rule: str, index_format: str, window: int) -> None:
    """A captured step's table is for the longest sequence there may be; rows are cut by their own lengths."""
    spec = Spec((900, 33, 1), 1, 2, 4, 64, 8, 2, dtype=torch.bfloat16, rule=rule, index_format=index_format)
    case = build(spec, device)
    wide = case.clone()
    wide.block_table = F.pad(case.block_table, (0, 3000), value=-1)
    for got, expected in zip(poisoned(lambda: step(wide, 8, window=window)), step(case, 8, window=window), strict=True):
        assert_same(got, expected)
    assert_same(wide.index, case.index)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 6, 12, 40])
def test_few_rows(device: str, rule: str, index_format: str, dtype: torch.dtype, rows: int) -> None:
    """A token of few long sequences, which one kernel takes on Hopper, cut among more thread blocks the fewer rows
    there are; short ones beside them, windows, sinks, pages without a number and whole stretches of one score."""
    lengths = (9001, 33, 1, 4096, 700)[: max(1, rows // 2)] if rows < 12 else (2000, *range(1, rows // 2))
    heads = rows // len(lengths) if rows < 12 else 2
    for seed, (head_dim, group, window, sinks, recents, k) in enumerate(
        [(64, 4, 0, 1, 1, 64), (128, 1, 0, 0, 2, 130), (72, 8, 3000, 3, 1, 16), (8, 3, 50, 1, 1, 5)]
    ):
        spec = Spec(
            lengths, 1, heads, group, head_dim, 8, 4, dtype=dtype, rule=rule, index_format=index_format, window=window,
            seed=seed,
        )  # fmt: skip
        case = build(spec, device)
        if seed == 1:  # a stretch of equal scores, a page without a number
            first = case.block_table[0, : lengths[0] // 64].long()
            case.index[first] = case.index[first[:1]]
            case.k_cache[first[0], :, 3] = torch.nan
        options = {"sink_pages": sinks, "recent_pages": recents}
        one, again, parts = case.clone(), case.clone(), case.clone()
        result = poisoned(lambda: step(one, k, **options))  # noqa: B023
        assert_same_step(result, by_single_ops(parts, k, **options))
        for a, b in zip(result, step(again, k, **options), strict=True):
            assert_same(a, b)
        assert_same(one.index, parts.index)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_budget_beyond_the_context_is_dense_sdpa(device: str, dtype: torch.dtype) -> None:
    for rule, index_format in INDEXES:
        for length in (1, 7, 8, 9, 200):
            case = build(Spec((length,), 1, 2, 3, 64, 8, 2, dtype=dtype, rule=rule, index_format=index_format), device)
            num_pages = max(2, -(-length // 8)) + 3
            out, _, pages = step(case, num_pages)
            count = -(-length // 8)
            assert pages[0, 0, 1].tolist() == list(range(count)) + [-1] * (num_pages - count)
            cpu = case.to("cpu")
            keys, values = (
                reference.gather_tokens(cache, cpu.block_table[0], length)[None].repeat_interleave(3, 1)
                for cache in (cpu.k_cache, cpu.v_cache)
            )
            q = cpu.q.transpose(1, 2)
            exact = F.scaled_dot_product_attention(q.double(), keys.double(), values.double())
            same = F.scaled_dot_product_attention(q, keys, values)
            error = (out.cpu().transpose(1, 2).double() - exact).abs().max()
            assert error <= 2 * (same.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
def test_a_sequence_decoded_token_by_token(device: str, rule: str, index_format: str) -> None:
    """From the first token over page, block and budget borders; two sequences of different age."""
    final = build(
        Spec((61, 38), rule=rule, index_format=index_format, page_size=4, pages_per_block=2, group=3, head_dim=24),
        device,
    )
    case = final.clone()
    case.k_cache.fill_(torch.nan)
    case.v_cache.fill_(torch.nan)
    case.index.fill_(0xFF)
    for n in range(1, 62):
        lens = [n, max(0, n - 23)]
        case.seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        case.k, case.v = (
            torch.stack([
                cache[final.block_table[b, (length - 1) // 8].long(), :, (length - 1) % 8]
                if length else torch.zeros(2, 24, device=device)
                for b, length in enumerate(lens)
            ])[:, None]
            for cache in (final.k_cache, final.v_cache)
        )  # fmt: skip
        case.q = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(n)).to(device)
        before = case.clone()
        result = step(case, 6)
        if n % 7 in (0, 1) or n > 56:
            assert_step(before, case, result, 6)
    for name in ("k_cache", "v_cache"):
        assert_same(getattr(case, name), getattr(final, name), name)


@pytest.mark.parametrize("device", DEVICES)
def test_all_scores_equal(device: str) -> None:
    for rule, index_format in INDEXES:
        case = build(Spec((160,), rule=rule, index_format=index_format, page_size=8, dtype=torch.bfloat16), device)
        case.k_cache.fill_(0.5)
        case.k.fill_(0.5)
        ops.page_index(case.k_cache, case.index, case.block_table, torch.zeros_like(case.seq_lens), case.seq_lens,
                       max_new_tokens=160, rule=rule, index_format=index_format, page_size=8)  # fmt: skip
        _, _, pages = step(case, 6)
        assert pages.tolist() == [[[[0, 1, 2, 3, 4, 19]] * 2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_nan_in_a_far_page_does_not_leak(device: str, rule: str, index_format: str, dtype: torch.dtype) -> None:
    """A page with a NaN key scores NaN, ranks last, and is not selected while there are others."""
    case = build(
        Spec((200,), rule=rule, index_format=index_format, page_size=8, pages_per_block=1, dtype=dtype, group=3), device
    )
    case.k_cache[case.block_table[0, 7].long(), :, 2, 3] = torch.nan
    case.v_cache[case.block_table[0, 7].long()] = torch.nan
    ops.page_index(case.k_cache, case.index, case.block_table, torch.zeros_like(case.seq_lens), case.seq_lens,
                   max_new_tokens=200, rule=rule, index_format=index_format, page_size=8)  # fmt: skip
    before = case.clone()
    out, lse, pages = step(case, 24)  # of 25 pages: all but the bad one
    assert 7 not in pages.flatten().tolist()
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())
    assert_step(before, case, (out, lse, pages), 24)


@pytest.mark.parametrize("device", DEVICES)
def test_shared_prefix_equals_own_copies(device: str) -> None:
    for rule, index_format in INDEXES:
        case = build(
            Spec((61, 75, 40), 2, rule=rule, index_format=index_format, page_size=4, shared=True, seed=4), device
        )
        assert len(set(case.block_table[:, 0].tolist())) == 1
        result = step(case, 5)
        for b in range(3):
            alone = build(
                Spec((61, 75, 40), 2, rule=rule, index_format=index_format, page_size=4, shared=True, seed=4), device
            )
            for name in ("q", "k", "v", "block_table", "seq_lens"):
                setattr(alone, name, getattr(alone, name)[b : b + 1])
            for got, expected in zip(step(alone, 5), result, strict=True):
                torch.testing.assert_close(got, expected[b : b + 1])


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_and_stale_memory(device: str) -> None:
    for spec in (Spec((900, 3, 0), 2, 2, 3, 64, 8, dtype=torch.bfloat16), Spec((3000,), 1, 1, 4, 128, 4)):
        case = build(spec, device)
        first = step(case, 12)
        for again in (step(case, 12), poisoned(lambda: step(case, 12))):  # noqa: B023
            for got, expected in zip(again, first, strict=True):
                assert_same(got, expected)


def test_threads_do_not_change_bits() -> None:
    for spec in (Spec((900, 3, 90), 2, 2, 3, 64, 8, dtype=torch.bfloat16), Spec((3000,), 1, 1, 4, 128, 4)):
        case = build(spec)
        assert_threads_agree(lambda: step(case, 12))  # noqa: B023


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device: str) -> None:
    case = build(Spec((), num_tokens=3), device)
    out, lse, pages = step(case, 5)
    assert (out.shape, lse.shape, pages.shape) == (case.q.shape, (0, 3, 4), (0, 3, 2, 5))


ISA_CHECK = """
import json, os, torch
from op_cases import DTYPES, GROUPS, INDEXES, Spec, assert_step, build, step
for seed in range(35):
    rule, index_format = INDEXES[seed % 7]
    dim, page_size = [8, 40, 64, 72, 128][seed % 5], [4, 8, 16, 64][seed % 4]
    spec = Spec((300, 37, 1), 1 + seed % 3, 2, GROUPS[seed % 10], dim, page_size,
                dtype=DTYPES[seed % 3], rule=rule, index_format=index_format, seed=seed)
    case = build(spec)
    before = case.clone()
    assert_step(before, case, step(case, 4), 4)
used, cap = json.loads(torch.ops.unique_attn.build_info())["cpu_isa"], os.environ["UNIQUE_ATTN_ISA"]
order = ["baseline", "avx2", "avx512"]
assert order.index(used) <= order.index(cap), used
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """The library picks the best the machine has; UNIQUE_ATTN_ISA caps it."""
    env = {**os.environ, "UNIQUE_ATTN_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ISA_CHECK]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("device", DEVICES)
def test_long_context_selection(device: str) -> None:
    """Thousands of pages: the selected ones are the best by the oracle's scores."""
    for rule, index_format in INDEXES:
        case = build(
            Spec((9000, 4100), 1, 2, 4, 64, 8, 2, dtype=torch.bfloat16, rule=rule, index_format=index_format), device
        )
        _, _, pages = step(case, 64)
        assert_selects_best(pages, case, 64)
