"""composite_blocks against the oracle and against what must hold of shares."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CUDA_DTYPES,
    DEVICES,
    DTYPES,
    Q_LAYOUTS,
    assert_same,
    assert_threads_agree,
    examples,
    needs_cuda,
    poisoned,
)
from prefill_cases import (
    METHODS,
    Estimate,
    PrefillCase,
    PrefillSpec,
    assert_shares,
    build,
    composite,
    composite_oracle,
    estimates,
    prefill_specs,
    share_heads,
)

from unique_attn import ops, reference_prefill

ESTIMATES = [Estimate(), Estimate("unisparse"), Estimate(pool_q=16, pool_k=32), Estimate("unisparse", 64, 16)]

# ---- Values. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(25)
def test_equals_the_oracle(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(prefill_specs(dtype=dtype, diagonal=False)), device)
    estimate = data.draw(estimates())
    assert_shares(case, estimate, composite(case, estimate))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("estimate", ESTIMATES, ids=str)
def test_typical_shapes(device: str, dtype: torch.dtype, estimate: Estimate) -> None:
    """What models have: many blocks of keys, chunks in the middle of a cache, large groups and heads."""
    shapes = [(4, 64, ((192, 2304),), 128, 64), (3, 128, ((130, 130), (64, 640)), 64, 128)]
    for group, head_dim, chunks, block_q, block_k in [*shapes, (16, 256, ((300, 301),), 128, 128)]:
        spec = PrefillSpec(chunks, 2 if group < 4 else 1, group, "one", head_dim, block_q, block_k, dtype)
        case = build(replace(spec, diagonal=False), device)
        assert_shares(case, estimate, poisoned(lambda case=case: composite(case, estimate)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimate", ESTIMATES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_keys_have_equal_pages(device: str, estimate: Estimate, dtype: torch.dtype) -> None:
    """A block's share is the part of the pages in it, of those that a pooled query sees: nothing is spread."""
    case = build(PrefillSpec(((300, 413), (50, 50)), head_dim=24, dtype=dtype), device)
    case.k[:] = case.k[:1]
    got = composite(case, estimate)
    assert_shares(case, estimate, got)
    page = torch.arange(got.shape[-1] * (64 // estimate.pool_k))
    for block in case.query_blocks:
        ends = range(block.first + estimate.pool_q, block.last + estimate.pool_q + 1, estimate.pool_q)
        seen = [page * estimate.pool_k < min(end, block.last + 1) for end in ends]  # by each pooled query
        several = [pages.view(got.shape[-1], -1).sum(-1) / pages.sum() for pages in seen]
        each = torch.stack(several)
        expected = each.mean(0) if estimate.method == "unisparse" else each.amax(0)
        for share in got[block.slot].cpu().float():
            torch.testing.assert_close(share, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimate", ESTIMATES, ids=str)
def test_what_must_hold_of_shares(device: str, estimate: Estimate) -> None:
    """Parts of a whole for a mean, at least that for a maximum; exactly 0 where nothing is seen, in whatever memory."""
    case = build(PrefillSpec(((1, 1), (64, 100), (64, 70), (0, 9), (200, 333)), group=3, block_q=64), device)
    got = poisoned(lambda: composite(case, estimate)).cpu()
    visible = case.visible(got.shape[-1])
    real = visible.any(-1)
    assert sorted({block.slot for block in case.query_blocks}) == real.nonzero().flatten().tolist()
    assert not bool(real.all())  # there are slots of no block
    assert not got[~visible[:, None].expand_as(got)].any()
    assert bool((got[visible[:, None].expand_as(got)] > 0).all())
    assert bool((got <= 1.0 + 1e-6).all())
    sums = got.sum(-1)[real]
    assert bool((sums >= 1.0 - 1e-5).all())
    if estimate.method == "unisparse":
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("device", DEVICES)
def test_the_weight_of_the_spread(device: str) -> None:
    """2 by default; 0 leaves the mean; what is spread is preferred."""
    case = build(PrefillSpec(((256, 256),)), device)
    assert_same(composite(case, Estimate(spread_weight=2.0)), composite(case))
    case.k[:64] = torch.randn(8, 1, 1).repeat_interleave(8, 0).to(device)  # pages of equal keys
    case.k[64:] *= 2.0
    with_spread, without = (composite(case, Estimate(spread_weight=weight)) for weight in (3.0, 0.0))
    assert bool((with_spread[1, :, 0] < without[1, :, 0]).all())
    assert_shares(case, Estimate(spread_weight=0.0), without)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_a_token_by_itself(device: str, method: str) -> None:
    for dtype in DTYPES:
        case = build(PrefillSpec(((1, 1),), dtype=dtype), device)
        got = composite(case, Estimate(method))
        assert got.tolist() == [[[1.0]] * share_heads(case, Estimate(method))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_no_queries_no_keys_no_sequences(device: str, method: str) -> None:
    estimate = Estimate(method)
    for chunks in ((), ((0, 0),), ((0, 70), (0, 0))):
        case = build(PrefillSpec(chunks), device)
        shares = composite(case, estimate)
        assert shares.shape == (len(chunks), share_heads(case, estimate), 2 if len(chunks) == 2 else 0)
        assert not shares.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_bounds_that_are_too_large(device: str, method: str) -> None:
    """They are upper bounds: blocks past every sequence have no share."""
    case = build(PrefillSpec(((100, 170), (40, 40))), device)
    expected = composite(case, Estimate(method))
    more = ops.composite_blocks(case.q, case.k, *case.bounds, 5000, 64 * 7 - 3, method=method)
    assert more.shape == (*expected.shape[:2], 7)
    assert_same(more[..., :3].contiguous(), expected)
    assert not more[..., 3:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_large_numbers(device: str, dtype: torch.dtype) -> None:
    """The softmax takes them off by the largest: a share is 1 or nearly 0, and nothing overflows."""
    case = build(PrefillSpec(dtype=dtype), device)
    case.q.mul_(100.0)
    for method in METHODS:
        got = composite(case, Estimate(method))
        assert bool(got.isfinite().all())
        assert bool((got <= 1.0 + 1e-6).all())
    with pytest.raises(ValueError, match=r"^composite_blocks: scale: expected a finite number, got nan$"):
        composite(replace(case, spec=replace(case.spec, scale=math.nan)))


# ---- NaN and infinity. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_keys_reach_exactly_the_rows_that_see_them(
    device: str, dtype: torch.dtype, method: str, bad: float
) -> None:
    """In page 16 of the first sequence, which starts at key 128: the queries from the second block on see it."""
    case = build(PrefillSpec(((290, 330), (40, 40)), group=3, dtype=dtype, head_dim=24, block_q=64), device)
    estimate = Estimate(method)
    clean = composite(case, estimate)
    case.k[133, 1, 5] = bad
    got = composite(case, estimate)
    assert_shares(case, estimate, got)
    half = share_heads(case, estimate) // 2
    assert_same(got[:, :half], clean[:, :half], "the other KV head")
    assert_same(got[0], clean[0], "who sees no such page")
    assert_same(got[5:], clean[5:], "another sequence")
    if math.isnan(bad) or method == "directional":
        visible = case.visible(got.shape[-1])[1:5, None].expand_as(got[1:5, half:])
        assert torch.equal(got[1:5, half:].isnan().cpu(), visible)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_bad_queries_reach_exactly_what_they_see(device: str, dtype: torch.dtype, method: str) -> None:
    """Query 70 is pooled with those up to 71, position 111: of the blocks that its query block sees, two."""
    case = build(PrefillSpec(((290, 330), (40, 40)), group=3, dtype=dtype, head_dim=24, block_q=64), device)
    estimate = Estimate(method)
    clean = composite(case, estimate)
    case.q[70, 4, 3] = torch.nan
    got = composite(case, estimate)
    assert_shares(case, estimate, got)
    row = 1 if method == "unisparse" else 4
    assert got.isnan().nonzero().tolist() == [[1, row, 0], [1, row, 1]]
    same = ~got.isnan().any(-1)
    assert_same(got[same], clean[same])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_unused_memory_does_not_matter(device: str, method: str) -> None:
    """Tensors that lie between NaN: pages and pooled queries that are not full read nothing else."""
    case = build(PrefillSpec(((101, 203), (0, 5), (37, 37)), head_dim=40), device)
    expected = composite(case, Estimate(method))
    q, k = (torch.full((len(x) + 140, *x.shape[1:]), torch.nan, device=device) for x in (case.q, case.k))
    q[70:-70], k[70:-70] = case.q, case.k
    assert_same(composite(replace(case, q=q[70:-70], k=k[70:-70]), Estimate(method)), expected)


# ---- Layouts, packing, chunks, determinism. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_strides_do_not_matter(device: str, dtype: torch.dtype, method: str) -> None:
    spec = PrefillSpec(group=3, head_dim=40, dtype=dtype)
    expected = composite(build(spec, device), Estimate(method))
    for layout in Q_LAYOUTS[1:]:
        assert_same(composite(build(replace(spec, layout=layout), device), Estimate(method)), expected, layout)
    case = build(spec, device)
    shared = replace(case, k=case.k[:, :1].expand_as(case.k))
    again = replace(case, k=shared.k.contiguous())
    assert_same(composite(shared, Estimate(method)), composite(again, Estimate(method)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@given(data=st.data())
@examples(8)
def test_packed_sequences_are_as_if_alone(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(prefill_specs(dtype=dtype, diagonal=False)), device)
    estimate = data.draw(estimates())
    shares = composite(case, estimate)
    starts = ops.query_block_slots(case.cu_seqlens_q, case.spec.block_q).tolist()
    for b, (queries, keys) in enumerate(case.sequences):
        chunk = case.spec.chunks[b]
        alone = PrefillCase(
            case.q[queries], case.k[keys], case.v[keys], *(torch.tensor([0, n]).int().to(device) for n in chunk),
            case.kept, replace(case.spec, chunks=(chunk,)),
        )  # fmt: skip
        got = composite(alone, estimate)
        blocks = -(-chunk[0] // case.spec.block_q)
        assert_same(got[:blocks], shares[starts[b] :][:blocks, :, : got.shape[-1]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_a_prompt_are_the_prompt(device: str, method: str) -> None:
    """A prompt of 500 tokens whose chunks are whole query blocks and whole pages."""
    whole = build(PrefillSpec(((500, 500),), block_q=64), device)
    expected = composite(whole, Estimate(method))
    for start, end in ((0, 128), (128, 192), (192, 500)):
        part = PrefillCase(
            whole.q[start:end], whole.k[:end], whole.v[:end],
            *(torch.tensor([0, n]).int().to(device) for n in (end - start, end)),
            whole.kept, replace(whole.spec, chunks=((end - start, end),)),
        )  # fmt: skip
        got = composite(part, Estimate(method))
        blocks = -(-(end - start) // 64)
        assert_same(got[:blocks], expected[start // 64 :][:blocks, :, : got.shape[-1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_deterministic_with_any_number_of_threads(dtype: torch.dtype, method: str) -> None:
    case = build(PrefillSpec(((700, 900), (33, 40)), head_dim=64, dtype=dtype))
    assert_threads_agree(lambda: composite(case, Estimate(method)))


@needs_cuda
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_deterministic_on_cuda(dtype: torch.dtype, method: str) -> None:
    case = build(PrefillSpec(((700, 900), (33, 40)), head_dim=64, dtype=dtype), "cuda")
    first = composite(case, Estimate(method))
    for _ in range(5):
        assert_same(composite(case, Estimate(method)), first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_more_sequences_than_a_grid_has_rows(device: str, method: str) -> None:
    """65,535 is the most that CUDA takes in y and z."""
    chunks = (*((1 + b * b % 3,) * 2 for b in range(65_540)), (77, 130))
    case = build(PrefillSpec(chunks, 1, 2, head_dim=8, diagonal=False), device)
    got = composite(case, Estimate(method)).cpu()
    slots = torch.tensor([block.slot for block in case.query_blocks])
    used = torch.zeros(len(got), dtype=torch.bool).index_fill_(0, slots, True)
    torch.testing.assert_close(got[slots[:-1], :, 0], torch.ones(65_540, got.shape[1]))
    assert not got[~used].any()
    alone = build(PrefillSpec(chunks[-1:], 1, 2, head_dim=8), device)
    alone.q, alone.k = case.q[-77:], case.k[-130:]
    assert_same(got[slots[-1:]], composite(alone, Estimate(method)).cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_more_heads_than_a_grid_has_rows(device: str, method: str) -> None:
    case = build(PrefillSpec(((2, 66),), 65_540, 1, "one", 8, dtype=torch.bfloat16), device)
    got = composite(case, Estimate(method))
    few = replace(case, q=case.q[:, -3:], k=case.k[:, -3:], spec=replace(case.spec, kv_heads=3))
    assert_same(got[:, -3:], composite(few, Estimate(method)))
    assert_shares(few, Estimate(method), composite(few, Estimate(method)))


# ---- Autocast and gradients. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_in_scaled_dot_product_attention(device: str, dtype: torch.dtype) -> None:
    """Mixed inputs run in autocast's dtype; fp64 stays."""
    low = build(PrefillSpec(dtype=dtype), device)
    mixed = replace(low, k=low.k.float())
    with torch.autocast(device, dtype=dtype):
        assert_same(composite(mixed), composite(low))
        if device == "cpu":
            assert composite(build(PrefillSpec(dtype=torch.float64))).dtype == torch.float64
    with torch.autocast(device, dtype=dtype, enabled=False), pytest.raises(ValueError, match="k: expected dtype"):
        composite(mixed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["q", "k"])
def test_gradients_are_refused(device: str, name: str) -> None:
    case = build(PrefillSpec(), device)
    expected = composite(case)
    getattr(case, name).requires_grad_()
    with pytest.raises(ops.NotDifferentiableError, match=r"unique_attn::composite_blocks .*has no gradient"):
        composite(case).sum().backward()
    with torch.no_grad():
        assert_same(composite(case), expected)


# ---- Memory. ----


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_memory_on_cuda(method: str) -> None:
    """Beside the shares at most 64 bytes for each token and query head: never a number for each pair of tokens.

    Half of that is what the multiprocessors are at work on, which is the same for any number of heads."""
    q_heads, kv_heads, head_dim = 32, 8, 128
    for length in (16_384, 65_536):
        q, k = (
            torch.randn(length, heads, head_dim, device="cuda", dtype=torch.bfloat16) for heads in (q_heads, kv_heads)
        )
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        shares = ops.composite_blocks(q, k, cu_seqlens, cu_seqlens, length, length, method=method)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - shares.nbytes
        assert extra <= 64 * length * q_heads + (2 << 20), (length, extra)  # and the allocator's rounding
        del q, k, shares


# ---- The oracle. ----


def test_the_oracle_by_hand() -> None:
    """Twelve queries in a sequence of 70 keys: pages 0 to 7 are block 0, page 8 (6 keys) is block 1."""
    q, k = torch.zeros(12, 2, 8), torch.zeros(70, 1, 8)
    bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (12, 70)]
    shares = reference_prefill.composite_blocks(q, k, *bounds, 70)
    # Positions 58 to 65, which see 9 pages, and 66 to 69.
    torch.testing.assert_close(shares, torch.tensor([8 / 9, 1 / 9], dtype=torch.float64).expand(1, 2, 2))
    bounds[1][1] = 68  # positions 56 to 63 see 8 pages, 64 to 67 see 9
    shares = reference_prefill.composite_blocks(q, k[:68], *bounds, 68)
    torch.testing.assert_close(shares, torch.tensor([1, 1 / 9], dtype=torch.float64).expand(1, 2, 2))
    shares = reference_prefill.composite_blocks(q, k[:68], *bounds, 68, method="unisparse")
    torch.testing.assert_close(shares, torch.tensor([[[17 / 18, 1 / 18]]], dtype=torch.float64))
    q[:, 0, 0], q[:, 1, 0], k[64:, 0, 0] = 3.0, -1.0, math.log(2.0)  # a mean of 1 over the group
    shares = reference_prefill.composite_blocks(q, k[:68], *bounds, 68, method="unisparse", scale=1.0)
    torch.testing.assert_close(shares, torch.tensor([[[0.9, 0.1]]], dtype=torch.float64))
    k[:64:2], k[1:64:2] = 1.0, -1.0  # a variance of 1 in every channel; sqrt(q^2) is 1 for head 1
    shares = reference_prefill.composite_blocks(q, k[:68], *bounds, 68, spread_weight=math.log(2.0), scale=1.0)
    torch.testing.assert_close(shares[0, 1], torch.tensor([1, 0.5 / 16.5], dtype=torch.float64))


def test_the_oracle_rounds_as_the_op_must() -> None:
    """In bf16 means are rounded; a run in fp32 of the rounded means is the same."""
    case = build(PrefillSpec(((64, 64),), dtype=torch.bfloat16, head_dim=8))
    exact, rounded = (composite_oracle(case, Estimate(), dtype) for dtype in (torch.float64, torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).abs().max()) < 0.02
