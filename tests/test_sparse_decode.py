"""sparse_decode against the oracle's attention over the same pages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CUDA_DTYPES,
    DEVICES,
    DTYPES,
    Case,
    Spec,
    assert_attention,
    assert_close,
    assert_same,
    assert_threads_agree,
    build,
    examples,
    poisoned,
    specs,
    typical_size,
)
from torch import Tensor

from unique_attn import ops, reference


def run(case: Case, pages: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    caches = (case.k_cache, case.v_cache, pages.to(case.q.device))
    return ops.sparse_decode(case.q, *caches, case.block_table, case.seq_lens, **{**case.attending, **options})


def some_pages(case: Case, k: int, seed: int = 0, order: str = "ascending") -> Tensor:
    """``k`` columns of distinct pages that exist, -1 where there are fewer."""
    random = torch.Generator().manual_seed(seed)
    batch, tokens = case.q.shape[:2]
    rows = []
    for b in range(batch):
        count = -(-case.spec.lengths[b] // case.spec.page_size)
        for _ in range(tokens * case.spec.kv_heads):
            row = torch.full((k,), -1)
            chosen = torch.randperm(count, generator=random)[:k]
            row[: len(chosen)] = chosen if order == "any" else chosen.sort().values
            rows.append(row[torch.randperm(k, generator=random)] if order == "any" else row)
    if not rows:
        return torch.zeros(batch, tokens, case.spec.kv_heads, k, dtype=torch.int32)
    return torch.stack(rows).view(batch, tokens, case.spec.kv_heads, k).int()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(30)
def test_equals_the_oracle(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(specs(dtype=dtype)), device)
    order = data.draw(st.sampled_from(["ascending", "any"]), label="order")  # -1 may stand anywhere
    pages = some_pages(case, case.spec.k, case.spec.seed, order)
    scale = data.draw(st.sampled_from([None, 0.05, 1.5]), label="scale")
    assert_attention(case, pages, run(case, pages, scale=scale), scale=scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_large_budget(device: str, dtype: torch.dtype) -> None:
    """Many pages per row, few and many rows: one and several splits on CUDA."""
    for lengths, k, page_size, dim, group in [
        ((4000,), 64, 8, 128, 4),
        ((4000, 2100, 33), 300, 4, 64, 7),
        ((2500,), 39, 64, 80, 1),
        ((700,) * 12, 32, 16, 64, 16),
    ]:
        case = build(Spec(lengths, 1, 2, group, dim, page_size, 1, dtype=dtype), device)
        pages = some_pages(case, k)
        assert_attention(case, pages, run(case, pages))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [4, 8, 64])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "kv_heads", "group", "dim"),
    [
        *[(1, 1, 1, 4, 128), (2, 3, 2, 9, 72)],
        *[(1, 16, 8, 1, 64), (1, 16, 8, 2, 128), (1, 16, 8, 1, 256)],
        *[(1, 16, 17, 9, 40), (1, 16, 17, 1, 128), (1, 16, 17, 9, 256)],
    ],
)
def test_any_number_of_pages(
    device: str, page_size: int, batch: int, num_tokens: int, kv_heads: int, group: int, dim: int
) -> None:
    """Around a step of a warp, its ring of copies and a round of look-ups. On CUDA few rows are split, many are not."""
    lengths = tuple(610 - 23 * b for b in range(batch))
    dtype = torch.bfloat16 if page_size % 3 == 1 else torch.float16
    case = build(Spec(lengths, num_tokens, kv_heads, group, dim, page_size, 1, dtype=dtype), device)
    for tokens in (1, 17, 81, 177, 513):
        pages = some_pages(case, -(-tokens // page_size), tokens)
        assert_attention(case, pages, run(case, pages))


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@examples(20)
def test_all_pages_equal_dense_attention(device: str, data: st.DataObject) -> None:
    case = build(data.draw(specs(lengths=st.integers(1, 300).map(lambda n: (n,)), num_tokens=1, window=0)), device)
    length, dtype = case.spec.lengths[0], case.spec.dtype
    pages = torch.arange(-(-length // case.spec.page_size), dtype=torch.int32)
    got, _ = run(case, pages.expand(1, 1, case.spec.kv_heads, -1).contiguous())
    cpu = case.to("cpu")
    q = cpu.q.transpose(1, 2)
    keys, values = (
        reference.gather_tokens(cache, cpu.block_table[0], length)[None].repeat_interleave(case.spec.group, 1)
        for cache in (cpu.k_cache, cpu.v_cache)
    )
    exact = F.scaled_dot_product_attention(q.double(), keys.double(), values.double()).transpose(1, 2)
    same = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).to(dtype)
    assert_close(got, exact, same, "out", typical_size(cpu.v_cache))


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@examples(20)
def test_two_disjoint_sets_merge_to_their_union(device: str, data: st.DataObject) -> None:
    case = build(data.draw(specs(dtype=st.sampled_from([torch.float32, torch.float64]))), device)
    union = some_pages(case, 7, case.spec.seed)
    left, right = union[..., 0::2].contiguous(), union[..., 1::2].contiguous()
    (out_l, lse_l), (out_r, lse_r) = run(case, left), run(case, right)
    out, lse = run(case, union)
    merged = torch.logaddexp(lse_l, lse_r)
    torch.testing.assert_close(merged, lse, rtol=1e-5, atol=1e-5)
    weight_l, weight_r = ((part - merged).exp().nan_to_num(0.0)[..., None] for part in (lse_l, lse_r))
    torch.testing.assert_close(out_l * weight_l + out_r * weight_r, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_in_unselected_pages_do_not_leak(device: str, dtype: torch.dtype, bad: float) -> None:
    """`build` has NaN in every slot past the end already; here the old pages that are not selected turn bad too."""
    for num_tokens, window in [(1, 0), (3, 0), (2, 10)]:
        spec = Spec((61, 30), num_tokens, 2, 3, 40, page_size=4, pages_per_block=4, dtype=dtype, window=window)
        case = build(spec, device)
        pages = some_pages(case, 5, seed=3)
        pages[:] = pages[:, :1, :1]  # one selection, so that the rest is unselected by all
        clean = run(case, pages)
        for b, length in enumerate(spec.lengths):
            for page in set(range(-(-length // 4))) - set(pages[b, 0, 0].tolist()):
                block, inner = int(case.block_table[b, page // 4]), page % 4 * 4
                for cache in (case.k_cache, case.v_cache):
                    cache[block, :, inner : inner + 4] = bad
        again = run(case, pages)
        assert_same(again[0], clean[0])
        assert_same(again[1], clean[1])
        assert bool(clean[0].isfinite().all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_numbers_that_a_query_may_not_see_do_not_leak(device: str, dtype: torch.dtype) -> None:
    """In selected pages, but after the query's own position or below its window."""
    spec = Spec((30,), 6, 1, 2, 16, page_size=8, dtype=dtype, window=9)
    case = build(spec, device)
    pages = torch.arange(4, dtype=torch.int32).expand(1, 6, 1, 4).contiguous()
    clean = run(case, pages)
    positions = list(range(24 + 2, 30)) + list(range(24 + 1 - 9 + 1))  # what query 1, at position 25, may not see
    for position in positions:
        block, inner = int(case.block_table[0, position // 16]), position % 16
        for cache in (case.k_cache, case.v_cache):
            cache[block, :, inner] = torch.nan
    again = run(case, pages)
    for old, new in zip(clean, again, strict=True):
        assert_same(new[:, 1], old[:, 1])
        assert bool(new[:, 5].isnan().all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_nan_in_a_selected_page_is_kept(device: str, dtype: torch.dtype) -> None:
    pages = torch.tensor([0, 2, 3], dtype=torch.int32).expand(1, 1, 2, 3).contiguous()
    spec = Spec((32,), group=3, page_size=8, pages_per_block=1, dtype=dtype)
    case = build(spec, device)
    clean, _ = run(case, pages)
    case.v_cache[case.block_table[0, 2].long(), 0, 4, 7] = torch.nan
    out, lse = run(case, pages)
    assert out.isnan().nonzero()[:, 2:].tolist() == [[0, 7], [1, 7], [2, 7]]  # one channel of the heads of group 0
    assert_same(out[:, :, 3:], clean[:, :, 3:])
    assert not bool(lse.isnan().any())
    case.k_cache[case.block_table[0, 3].long(), 1, 0, 0] = torch.nan
    out, lse = run(case, pages)
    assert bool(out[:, :, 3:].isnan().all())
    assert bool(lse[:, :, 3:].isnan().all())
    assert_attention(case, pages, (out, lse))


@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_do_not_overflow(device: str) -> None:
    for dtype in CUDA_DTYPES:
        case = build(Spec((50,), head_dim=64, page_size=8, dtype=dtype), device)
        case.q *= 200.0
        pages = some_pages(case, 7)
        out, lse = run(case, pages)
        assert bool(out.isfinite().all())
        assert_attention(case, pages, (out, lse))


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_that_sees_nothing_gets_zero(device: str) -> None:
    case = build(Spec((2, 0, 20), num_tokens=4), device)
    pages = torch.zeros(3, 4, 2, 3, dtype=torch.int32, device=device)
    pages[..., 1:] = -1
    pages[2, 1] = -1
    out, lse = run(case, pages)
    for b, t in [(0, 0), (0, 1), (1, 0), (1, 3), (2, 1)]:
        assert bool((out[b, t] == 0).all())
        assert bool((lse[b, t] == -torch.inf).all())
    assert bool(lse[0, 2:].isfinite().all())
    assert bool(lse[2, 2:].isfinite().all())
    case = build(Spec(()), device)
    out, lse = run(case, torch.zeros(0, 1, 2, 3, dtype=torch.int32))
    assert (out.shape, lse.shape) == (case.q.shape, (0, 1, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_and_stale_memory(device: str) -> None:
    for spec in (Spec((500, 3, 0), 2, 2, 3, 64, 8, dtype=torch.bfloat16), Spec((3000,), 1, 1, 4, 128, 4)):
        case = build(spec, device)
        pages = some_pages(case, 40)
        first = run(case, pages)
        for again in (run(case, pages), poisoned(lambda: run(case, pages))):  # noqa: B023
            assert_same(again[0], first[0])
            assert_same(again[1], first[1])


def test_threads_do_not_change_bits() -> None:
    for spec in (Spec((500, 3, 90), 2, 2, 3, 64, 8, dtype=torch.bfloat16), Spec((3000,), 1, 1, 4, 128, 4)):
        case = build(spec)
        pages = some_pages(case, 40)
        assert_threads_agree(lambda: run(case, pages))  # noqa: B023
