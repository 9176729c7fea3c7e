"""unique_prefill: the three ops in one, bit for bit, and what its selection is worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CUDA_DTYPES,
    DEVICES,
    DTYPES,
    Q_LAYOUTS,
    accumulator,
    assert_close,
    assert_same,
    assert_threads_agree,
    examples,
    needs_cuda,
    poisoned,
    typical_size,
)
from prefill_cases import (
    METHODS,
    Choice,
    Estimate,
    PrefillCase,
    PrefillSpec,
    assert_attention,
    build,
    by_hand,
    choices,
    composite_oracle,
    estimates,
    prefill,
    prefill_specs,
    share_heads,
)
from torch import Tensor

from unique_attn import ops, prefill_methods, reference_prefill

NAMES = ("out", "lse", "mask", "kept")
PAIRS = list(zip(METHODS * 2, [(64, 64), (64, 128), (128, 128), (128, 64)], strict=True))


def assert_as_by_hand(case: PrefillCase, choice: Choice, estimate: Estimate) -> tuple[Tensor, ...]:
    got = poisoned(lambda: prefill(case, choice, estimate))
    for name, one, three in zip(NAMES, got, by_hand(case, choice, estimate), strict=True):
        assert_same(one, three, name)
    return got


def listed(case: PrefillCase, mask: Tensor) -> PrefillCase:
    """``case`` with the blocks of ``mask``."""
    return replace(case, kept=ops.unpack_block_mask(mask, -(-case.max_seqlen_k // case.spec.block_k)))


# ---- The three ops in one. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(8)
def test_equals_the_three_ops_and_the_oracle(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(prefill_specs(dtype=dtype, diagonal=False)), device)
    out, lse, mask, _ = assert_as_by_hand(case, data.draw(choices()), data.draw(estimates()))
    assert_attention(listed(case, mask), (out, lse))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(("method", "blocks"), PAIRS, ids=str)
def test_typical_shapes(device: str, dtype: torch.dtype, method: str, blocks: tuple[int, int]) -> None:
    """What models have: a prompt, a chunk of one that is in the cache already, large groups and heads."""
    for group, head_dim, chunks in [
        (4, 64, ((192, 1500),)),
        (3, 128, ((130, 130), (64, 640))),
        (16, 256, ((70, 200),)),
    ]:
        case = build(PrefillSpec(chunks, 2 if group < 4 else 1, group, "one", head_dim, *blocks, dtype), device)
        out, lse, mask, kept = assert_as_by_hand(case, Choice(threshold=0.04), Estimate(method))
        assert_attention(listed(case, mask), (out, lse))
        assert bool(((kept > 0) & (kept <= 1)).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_more_query_blocks_than_a_chunk_of_scratch(device: str, method: str) -> None:
    """Work goes through the query blocks so many at a time that their shares are 64 MiB, which must not be seen in the
    result. Here they are 150 MiB, since `max_seqlen_k` may be larger than any sequence."""
    chunks = (*((1 + 13 * b % 64,) * 2 for b in range(300)), (130, 700), *((64, 64 + b) for b in range(300)))
    case = build(PrefillSpec(chunks, 2, 8, "one", 8, 64, dtype=torch.bfloat16, diagonal=False), device)
    heads = share_heads(case, Estimate(method))
    bounds = (case.max_seqlen_q, 64 * (150 * 2**18 // (case.slots * heads)))
    args, blocks, choice = (case.q, case.k), case.spec.blocks, Choice(threshold=0.05).options
    got = ops.unique_prefill(*args, case.v, *case.bounds, *bounds, method=method, **choice, **blocks)
    shares = ops.composite_blocks(*args, *case.bounds, *bounds, method=method, **blocks)
    assert shares.nbytes > 140 * 2**20
    mask, kept = ops.select_blocks(shares, *case.bounds, **choice, **blocks)
    out, lse = ops.block_sparse_attention(*args, case.v, *case.bounds, bounds[0], mask, **blocks)
    for name, one, three in zip(NAMES, got, (out, lse, mask, kept), strict=True):
        assert_same(one, three, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_the_methods_default(device: str, method: str) -> None:
    """A threshold or a part of the whole: the table says which."""
    info = prefill_methods.PREFILL_METHODS[method]
    case = build(PrefillSpec(((300, 700),)), device)
    assert (info.threshold is None) != (info.top_p is None)
    assert (info.threshold is None) == (method == "unisparse")
    expected = by_hand(case, Choice(info.threshold, info.top_p), Estimate(method))
    for got, same in zip(prefill(case, Choice(), Estimate(method)), expected, strict=True):
        assert_same(got, same)
    if method == "directional":
        for got, same in zip(ops.unique_prefill(case.q, case.k, case.v, *case.bounds, 300, 700), expected, strict=True):
            assert_same(got, same, "the default method")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_selects_what_the_oracle_selects(device: str, dtype: torch.dtype, method: str) -> None:
    """But for shares so near the threshold that roundings account for it."""
    case, estimate = build(PrefillSpec(((300, 900), (70, 70)), dtype=dtype), device), Estimate(method)
    shares = composite_oracle(case, estimate)
    threshold = float(shares[shares > 0].median())
    mask = prefill(case, Choice(threshold), estimate)[2]
    error = 2 * float((composite_oracle(case, estimate, case.spec.dtype) - shares).abs().max()) + 1e-6
    args = (case.q.cpu(), case.k.cpu(), case.v.cpu(), *(x.cpu() for x in case.bounds), case.max_seqlen_k)
    options = {**estimate.options, **case.spec.blocks}
    expected = reference_prefill.unique_prefill(*args, threshold=threshold, **options)[2]
    got, best = (ops.unpack_block_mask(x.cpu(), shares.shape[-1]) for x in (mask, expected))
    assert 0 < int(best.sum()) < int(case.visible(shares.shape[-1]).sum()) * share_heads(case, estimate)
    assert bool(((shares - threshold).abs() <= error)[got != best].all())


# ---- What it equals at the ends. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_threshold_0_is_causal_attention(device: str, dtype: torch.dtype, method: str) -> None:
    case = build(PrefillSpec(((333, 333), (1, 1), (90, 90)), 2, 3, "kv", 40, dtype=dtype, listed=1.1), device)
    dtype = case.spec.dtype
    out, lse, _, kept = prefill(case, Choice(threshold=0.0), Estimate(method))
    assert bool((kept == 1.0).all())
    dense = ops.block_sparse_attention(case.q, case.k, case.v, *case.bounds, 333, case.mask)
    for got, expected in zip((out, lse), dense, strict=True):
        assert_same(got, expected)
    exact, same = [], []
    for queries, keys in case.sequences:
        q, k, v = (x.cpu().transpose(0, 1)[None] for x in (case.q[queries], case.k[keys], case.v[keys]))
        k, v = (x.repeat_interleave(3, 1) for x in (k, v))
        for results, run_dtype in ((exact, torch.float64), (same, dtype)):
            args = (x.to(run_dtype) for x in (q, k, v))
            results.append(F.scaled_dot_product_attention(*args, is_causal=True)[0].transpose(0, 1))
    assert_close(out, torch.cat(exact), torch.cat(same).to(dtype), "out", typical_size(case.v) * 333**0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "blocks"), PAIRS, ids=str)
def test_threshold_1_and_top_p_0_keep_the_forced_blocks(device: str, method: str, blocks: tuple[int, int]) -> None:
    """And a small threshold keeps more; top_p = 1 all that has a share."""
    case = build(PrefillSpec(((300, 777), (0, 40), (70, 70)), 2, 2, "kv", 16, *blocks), device)
    key_blocks = -(-777 // case.spec.block_k)
    forced, visible = (x(key_blocks)[:, None].expand(-1, share_heads(case, Estimate(method)), -1)
                       for x in (case.forced, case.visible))  # fmt: skip
    for choice, expected in (
        (Choice(threshold=1.0), forced),
        (Choice(top_p=0.0), forced),
        (Choice(threshold=0.0, max_blocks=0), forced),
        (Choice(top_p=1.0), visible),  # nothing rounds to 0 here
        (Choice(threshold=1.0, min_blocks=1000), visible),
    ):
        out, lse, mask, _ = assert_as_by_hand(case, choice, Estimate(method))
        assert torch.equal(ops.unpack_block_mask(mask.cpu(), key_blocks), expected), choice
        assert_attention(listed(case, mask), (out, lse))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_equal_keys(device: str, method: str) -> None:
    """Whatever is kept, the values of the kept blocks have equal weights."""
    case = build(PrefillSpec(((200, 500),), head_dim=24), device)
    case.k[:] = case.k[:1]
    out, lse, mask, _ = assert_as_by_hand(case, Choice(top_p=0.5), Estimate(method))
    assert_attention(listed(case, mask), (out, lse))
    position = 300 + 199
    kept = ops.unpack_block_mask(mask, 8)[case.row(199)].repeat_interleave(64, -1)[:, : position + 1].cpu()
    for head in range(4):
        row = kept[head * len(kept) // 4]
        torch.testing.assert_close(out[199, head].cpu(), case.v.cpu()[: position + 1, head // 2][row].mean(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_a_needle_is_kept(device: str, method: str) -> None:
    """A block whose keys are what some queries look for, among 32 others, of a random head."""
    case = build(PrefillSpec(((128, 2048),), 2, 3, head_dim=64), device)
    case.k[64 * 13 : 64 * 14, 1] = 3.0
    case.q[40:56, 3:] = 3.0
    mask = prefill(case, Choice(top_p=0.0, min_blocks=4), Estimate(method))[2]
    kept = ops.unpack_block_mask(mask, 32)[0].cpu()
    assert bool(kept[len(kept) // 2 :, 13].all())
    assert bool((kept.sum(-1) == 4).all())


# ---- NaN and infinity. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_in_dropped_blocks_do_not_leak(device: str, dtype: torch.dtype, method: str, bad: float) -> None:
    """Values do not choose. Rows of queries that did not keep the block are the same, the others are hurt."""
    case = build(PrefillSpec(((290, 700), (40, 40)), 2, 2, dtype=dtype, head_dim=24), device)
    choice, estimate = Choice(top_p=0.6), Estimate(method)
    clean = prefill(case, choice, estimate)
    kept = ops.unpack_block_mask(clean[2], 11).cpu()
    dropped = (~kept[:3] & case.visible(11)[:3, None]).nonzero().tolist()
    assert dropped
    slot, row, block = dropped[len(dropped) // 2]
    kv_head = row * 2 // kept.shape[1]
    case.v[64 * block : 64 * block + 64, kv_head] = bad
    got = prefill(case, choice, estimate)
    assert_same(got[1], clean[1], "lse")
    assert_same(got[2], clean[2], "mask")
    assert_same(got[3], clean[3], "kept")
    spared = torch.ones(330, 4, dtype=torch.bool)
    for query in range(290):
        for head in range(2 * kv_head, 2 * kv_head + 2):
            spared[query, head] = not kept[case.row(query), head * kept.shape[1] // 4, block]
    assert not spared.all() or not kept[:3, :, block].any()
    spared = spared.to(device)
    assert not bool(spared[slot * 128 : slot * 128 + 128, 2 * kv_head : 2 * kv_head + 2].logical_not().all())
    assert_same(got[0][spared], clean[0][spared])
    seen = 290 - 700 + 64 * block + 63  # from here on queries see all of the block
    hurt = ~spared & (torch.arange(330, device=device) >= max(0, seen))[:, None]
    assert not got[0][hurt].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_keys(device: str, method: str, bad: float) -> None:
    """NaN shares are kept: who sees a bad key gets NaN, not a result without it; the others do not see it."""
    case = build(PrefillSpec(((290, 330), (40, 40)), group=3, head_dim=24, block_q=64), device)
    choice = Choice(threshold=0.3)
    clean = prefill(case, choice, Estimate(method))
    case.k[130, 1] = bad
    got = assert_as_by_hand(case, choice, Estimate(method))
    for name, one, before in zip(NAMES, got, clean, strict=True):
        half = one.shape[1] // 2
        assert_same(one[:, :half], before[:, :half], f"{name} of the other KV head")
    assert_same(got[0][290:], clean[0][290:], "another sequence")
    assert_same(got[0][:64], clean[0][:64], "a query block that does not see the key's page")
    if got[0][120:290, 3:].isfinite().any():  # a share of -inf in the logit is 0: the block may be dropped
        assert method == "unisparse"
    blocks = ops.unpack_block_mask(got[2], 6)
    if method == "directional":
        assert torch.equal(blocks[1:5, 3:].cpu(), case.visible(6)[1:5, None].expand(-1, 3, -1))
        assert bool(got[0][91:290, 3:].isnan().all())


# ---- Layouts, packing, determinism, edges. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_strides_do_not_matter(device: str, dtype: torch.dtype) -> None:
    spec = PrefillSpec(((200, 700), (33, 33)), group=3, head_dim=40, dtype=dtype)
    expected = prefill(build(spec, device), Choice(threshold=0.1))
    for layout in Q_LAYOUTS[1:]:
        got = prefill(build(replace(spec, layout=layout), device), Choice(threshold=0.1))
        for name, one, same in zip(NAMES, got, expected, strict=True):
            assert_same(one, same, f"{name} with {layout}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_no_queries_no_keys_no_sequences_one_token(device: str, method: str) -> None:
    estimate = Estimate(method)
    for chunks in ((), ((0, 0),), ((0, 70), (0, 0))):
        case = build(PrefillSpec(chunks), device)
        out, lse, mask, kept = assert_as_by_hand(case, Choice(top_p=0.9), estimate)
        heads = share_heads(case, estimate)
        assert (out.shape, lse.shape) == ((0, 4, 16), (0, 4))
        assert (mask.shape, kept.shape) == ((len(chunks), heads, 1 if len(chunks) == 2 else 0), (len(chunks), heads))
        assert not mask.any()
        assert bool((kept == 1.0).all())
    case = build(PrefillSpec(((0, 70), (1, 1), (0, 0))), device)
    out, _, mask, _ = assert_as_by_hand(case, Choice(top_p=0.0), estimate)
    assert_same(out.view(1, 2, 2, 16)[:, :, 1], case.v[70:])  # a token that sees itself alone
    assert mask.flatten(1).sum(1).tolist() == [0, share_heads(case, estimate), 0]


@pytest.mark.parametrize("device", DEVICES)
def test_results_have_the_right_types(device: str) -> None:
    for dtype in DTYPES:
        case = build(PrefillSpec(dtype=dtype), device)
        got = [x.dtype for x in prefill(case, Choice(threshold=0.1))]
        assert got == [case.spec.dtype, accumulator(case.spec.dtype), torch.int32, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_deterministic_with_any_number_of_threads(dtype: torch.dtype, method: str) -> None:
    case = build(PrefillSpec(((700, 900), (33, 40)), head_dim=64, dtype=dtype))
    assert_threads_agree(lambda: prefill(case, Choice(threshold=0.06), Estimate(method)))


@needs_cuda
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_deterministic_on_cuda(dtype: torch.dtype, method: str) -> None:
    case = build(PrefillSpec(((700, 900), (33, 40)), head_dim=64, dtype=dtype), "cuda")
    first = prefill(case, Choice(threshold=0.06), Estimate(method))
    for _ in range(5):
        for got, expected in zip(prefill(case, Choice(threshold=0.06), Estimate(method)), first, strict=True):
            assert_same(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_more_sequences_than_a_grid_has_rows(device: str) -> None:
    chunks = (*((1 + b % 3,) * 2 for b in range(65_540)), (77, 300))
    case = build(PrefillSpec(chunks, 1, 2, "one", 8, diagonal=False), device)
    got = assert_as_by_hand(case, Choice(threshold=0.3), Estimate())
    alone = build(PrefillSpec(chunks[-1:], 1, 2, "one", 8), device)
    alone.q, alone.k, alone.v = case.q[-77:], case.k[-300:], case.v[-300:]
    out, lse, mask, kept = prefill(alone, Choice(threshold=0.3))
    slot = case.query_blocks[-1].slot
    for part, expected in (
        (got[0][-77:], out),
        (got[1][-77:], lse),
        (got[2][slot:][:1], mask),
        (got[3][slot:][:1], kept),
    ):
        assert_same(part, expected)


# ---- Autocast and gradients. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_in_scaled_dot_product_attention(device: str, dtype: torch.dtype) -> None:
    low = build(PrefillSpec(((200, 500),), dtype=dtype), device)
    mixed, choice = replace(low, k=low.k.float()), Choice(threshold=0.1)
    with torch.autocast(device, dtype=dtype):
        for got, expected in zip(prefill(mixed, choice), prefill(low, choice), strict=True):
            assert_same(got, expected)
        if device == "cpu":
            assert prefill(build(PrefillSpec(dtype=torch.float64)), choice)[0].dtype == torch.float64
    with torch.autocast(device, dtype=dtype, enabled=False), pytest.raises(ValueError, match="k: expected dtype"):
        prefill(mixed, choice)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused(device: str, name: str) -> None:
    case = build(PrefillSpec(), device)
    expected = prefill(case, Choice(threshold=0.1))
    getattr(case, name).requires_grad_()
    with pytest.raises(ops.NotDifferentiableError, match=r"unique_attn::unique_prefill .*has no gradient"):
        prefill(case, Choice(threshold=0.1))[0].sum().backward()
    with torch.no_grad():
        for got, same in zip(prefill(case, Choice(threshold=0.1)), expected, strict=True):
            assert_same(got, same)


# ---- Memory. ----


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_memory_on_cuda(method: str) -> None:
    """Beside inputs, outputs (the mask is one) and a bounded chunk of shares (64 MiB): at most 64 bytes for each token
    and query head."""
    q_heads, kv_heads, head_dim = 32, 8, 128
    extra = {}
    for length in (131_072, 262_144):
        q, k, v = (
            torch.randn(length, heads, head_dim, device="cuda", dtype=torch.bfloat16)
            for heads in (q_heads, kv_heads, kv_heads)
        )
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bounds = (cu_seqlens, cu_seqlens, length, length)
        result = ops.unique_prefill(q, k, v, *bounds, method=method, threshold=1.0)
        torch.cuda.synchronize()
        extra[length] = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in result)
        del q, k, v, result
    rounding = 2 << 20  # of the allocator
    assert extra[262_144] - extra[131_072] <= 64 * q_heads * 131_072 + rounding, extra
    assert all(used <= (64 << 20) + 64 * q_heads * length + rounding for length, used in extra.items()), extra
