"""block_sparse_attention against the oracle and against what it must equal, and the packing of masks."""

from __future__ import annotations

import math
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
    assert_close,
    assert_same,
    assert_threads_agree,
    examples,
    needs_cuda,
    poisoned,
    typical_size,
)
from prefill_cases import PrefillCase, PrefillSpec, assert_attention, build, prefill_specs, run

from unique_attn import ops, reference_prefill

BLOCKS = [(64, 64), (64, 128), (128, 64), (128, 128)]

# ---- Values. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(25)
def test_equals_the_oracle(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(prefill_specs(dtype=dtype)), device)
    assert_attention(case, run(case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_typical_shapes(device: str, dtype: torch.dtype, blocks: tuple[int, int]) -> None:
    """What models have: many blocks, words of the mask after the first, chunks of whole blocks and others."""
    shapes = [(4, 64, ((192, 2304),), "query"), (3, 128, ((130, 130), (64, 640)), "kv"), (1, 256, ((300, 301),), "one")]
    for group, head_dim, chunks, mask_heads in shapes:
        spec = PrefillSpec(chunks, 2 if group < 4 else 1, group, mask_heads, head_dim, *blocks, dtype, listed=0.3)
        case = build(spec, device)
        assert_attention(case, poisoned(lambda case=case: run(case)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_all_blocks_equal_causal_attention(device: str, dtype: torch.dtype, blocks: tuple[int, int]) -> None:
    case = build(PrefillSpec(((333, 333), (1, 1), (90, 90)), 2, 3, "kv", 40, *blocks, dtype, listed=1.1), device)
    dtype = case.spec.dtype
    exact, same = [], []
    for queries, keys in case.sequences:
        q, k, v = (x.cpu().transpose(0, 1)[None] for x in (case.q[queries], case.k[keys], case.v[keys]))
        k, v = (x.repeat_interleave(3, 1) for x in (k, v))
        for results, run_dtype in ((exact, torch.float64), (same, dtype)):
            args = (x.to(run_dtype) for x in (q, k, v))
            results.append(F.scaled_dot_product_attention(*args, is_causal=True)[0].transpose(0, 1))
    terms = typical_size(case.v) * 333**0.5
    assert_close(run(case)[0], torch.cat(exact), torch.cat(same).to(dtype), "out", terms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing(device: str, dtype: torch.dtype) -> None:
    """No listed block, or only such as lie in the future of some queries: 0 and -inf, in whatever memory it was."""
    case = build(
        PrefillSpec(((300, 300), (70, 200)), dtype=dtype, mask_heads="query", listed=0.0, diagonal=False), device
    )
    out, lse = poisoned(lambda: run(case))
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    case.kept[:, 1, 1] = True  # head 1 sees keys from 64 on
    out, lse = poisoned(lambda: run(case))
    first = slice(64, 300)
    seen = torch.zeros(370, 4, dtype=torch.bool)
    seen[first, 1] = seen[300:, 1] = True  # the second sequence's queries stand at 130 and later
    assert torch.equal(lse.cpu() > -torch.inf, seen)
    assert torch.equal(out.cpu().any(-1), seen)
    assert_attention(case, (out, lse))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask_heads", ["kv", "query"])
def test_heads_share_rows_of_the_mask(device: str, mask_heads: str) -> None:
    case = build(PrefillSpec(group=3, mask_heads="one"), device)
    more = case.kept.expand(-1, {"kv": 2, "query": 6}[mask_heads], -1).contiguous()
    for got, expected in zip(run(replace(case, kept=more)), run(case), strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_past_the_mask_are_not_listed(device: str) -> None:
    spec = PrefillSpec(((200, 2300), (40, 40)), head_dim=8)
    case = build(spec, device)
    assert case.mask.shape[-1] == 2
    short = replace(case, kept=case.kept[..., :32])
    assert_attention(short, run(short))
    case.kept[..., 32:] = False
    for got, expected in zip(run(short), run(case), strict=True):
        assert_same(got, expected)
    none = replace(case, kept=case.kept[..., :0])
    assert bool((run(none)[1] == -torch.inf).all())


@pytest.mark.parametrize("device", DEVICES)
def test_no_queries_no_keys_no_sequences(device: str) -> None:
    for chunks in ((), ((0, 0),), ((0, 70), (0, 0))):
        out, lse = run(build(PrefillSpec(chunks), device))
        assert (out.shape, lse.shape) == ((0, 4, 16), (0, 4))
    case = build(PrefillSpec(((0, 70), (1, 1), (0, 0))), device)
    assert_same(run(case)[0].view(1, 2, 2, 16)[:, :, 1], case.v[70:])  # a token that sees itself alone


@pytest.mark.parametrize("device", DEVICES)
def test_large_and_odd_numbers(device: str) -> None:
    for dtype in CUDA_DTYPES:
        case = build(PrefillSpec(dtype=dtype), device)
        case.q.mul_(100.0)
        assert all(bool(x.isfinite().all()) for x in run(case))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^block_sparse_attention: scale: expected a finite number, got {bad}$"):
            run(build(PrefillSpec(scale=bad), device))


# ---- What is not seen does not matter. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_bad_numbers_stay_where_they_are_seen(device: str, dtype: torch.dtype, bad: float, where: str) -> None:
    """In a block that only some query blocks list. On CUDA a tile's keys are multiplied by all of its queries, and 0
    times NaN is NaN: there the queries before the key in its own block may be hurt too."""
    case = build(PrefillSpec(((290, 330), (40, 40)), dtype=dtype, mask_heads="one", head_dim=24), device)
    case.kept[:, :, 1] = False
    clean = run(case)
    getattr(case, where)[64:128] = bad  # key block 1 of the first sequence: nobody lists it
    for got, expected in zip(run(case), clean, strict=True):
        assert_same(got, expected)
    case.kept[1, :, 1] = True  # now its second query block does, queries 128 to 255, who see all of it
    out, lse = run(case)
    hurt = ~out.isfinite().all(-1).all(-1)
    assert hurt.nonzero().flatten().tolist() == list(range(128, 256))
    assert_same(out[~hurt], clean[0][~hurt])
    assert_same(lse[~hurt], clean[1][~hurt])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_numbers_in_the_future_do_not_leak(dtype: torch.dtype) -> None:
    """Not even within the diagonal block, on the CPU."""
    case = build(PrefillSpec(((200, 233),), dtype=dtype, head_dim=24, listed=1.1), "cpu")
    clean = run(case)
    for at in (232, 170, 130):
        case.k[at], case.v[at] = torch.inf, torch.nan
        out, lse = run(case)
        before = at - 33
        assert_same(out[:before], clean[0][:before])
        assert_same(lse[:before], clean[1][:before])
        assert bool(out[before:].isnan().all())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_bits_that_no_query_has(device: str) -> None:
    case = build(PrefillSpec(((1, 1), (64, 100), (64, 70)), spare_words=1), device)
    clean = run(case)
    used = sorted({case.row(n) for n in range(129)})
    unused = [row for row in range(case.kept.shape[0]) if row not in used]
    assert unused
    case.kept[unused] = ~case.kept[unused]
    case.kept[..., 2:] = ~case.kept[..., 2:]  # past every sequence's keys
    case.kept = torch.cat([case.kept, case.kept])  # more rows than needed
    for got, expected in zip(run(case), clean, strict=True):
        assert_same(got, expected)


# ---- Layouts, packing, chunks, determinism. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_strides_do_not_matter(device: str, dtype: torch.dtype) -> None:
    spec = PrefillSpec(group=3, head_dim=40, dtype=dtype)
    expected = run(build(spec, device))
    for layout in Q_LAYOUTS[1:]:
        for got, same in zip(run(build(replace(spec, layout=layout), device)), expected, strict=True):
            assert_same(got, same, layout)
    case = build(spec, device)
    shared = replace(case, k=case.k[:, :1].expand_as(case.k))
    for got, same in zip(run(shared), run(replace(case, k=shared.k.contiguous())), strict=True):
        assert_same(got, same)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@given(data=st.data())
@examples(8)
def test_packed_sequences_are_as_if_alone(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(prefill_specs(dtype=dtype)), device)
    out, lse = run(case)
    starts = ops.query_block_slots(case.cu_seqlens_q, case.spec.block_q).tolist()
    for b, (queries, keys) in enumerate(case.sequences):
        chunk = case.spec.chunks[b]
        alone = PrefillCase(
            case.q[queries], case.k[keys], case.v[keys], *(torch.tensor([0, n]).int().to(device) for n in chunk),
            case.kept[starts[b] : starts[b + 1]], replace(case.spec, chunks=(chunk,)),
        )  # fmt: skip
        for got, expected in zip(run(alone), (out, lse), strict=True):
            assert_same(got, expected[queries])


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_a_prompt_are_the_prompt(device: str) -> None:
    """A prompt of 500 tokens whose chunks are whole query blocks."""
    whole = build(PrefillSpec(((500, 500),), mask_heads="query", block_q=64), device)
    out, lse = run(whole)
    for start, end in ((0, 128), (128, 192), (192, 500)):
        part = PrefillCase(
            whole.q[start:end], whole.k[:end], whole.v[:end],
            *(torch.tensor([0, n]).int().to(device) for n in (end - start, end)),
            whole.kept[start // 64 :], replace(whole.spec, chunks=((end - start, end),)),
        )  # fmt: skip
        for got, expected in zip(run(part), (out, lse), strict=True):
            assert_same(got, expected[start:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_with_any_number_of_threads(dtype: torch.dtype) -> None:
    case = build(PrefillSpec(((700, 900), (33, 40)), head_dim=64, dtype=dtype, mask_heads="query"))
    assert_threads_agree(lambda: run(case))


@needs_cuda
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_deterministic_on_cuda(dtype: torch.dtype) -> None:
    case = build(PrefillSpec(((700, 900), (33, 40)), head_dim=64, dtype=dtype, mask_heads="query"), "cuda")
    first = run(case)
    for _ in range(5):
        for got, expected in zip(run(case), first, strict=True):
            assert_same(got, expected)


# ---- Masks. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key_blocks", [0, 1, 31, 32, 33, 64, 200])
def test_masks_are_packed_and_unpacked(device: str, key_blocks: int) -> None:
    kept = torch.rand(3, 2, key_blocks).to(device) < 0.5
    mask = ops.pack_block_mask(kept)
    assert (mask.dtype, mask.shape) == (torch.int32, (3, 2, math.ceil(key_blocks / 32)))
    assert torch.equal(ops.unpack_block_mask(mask, key_blocks), kept)
    assert not ops.unpack_block_mask(mask, 32 * mask.shape[-1])[..., key_blocks:].any()
    for w in range(mask.shape[-1]):
        flags = kept[..., 32 * w : 32 * w + 32].long()
        number = sum(flags[..., i] << i for i in range(flags.shape[-1]))
        assert torch.equal(mask[..., w].long() & 0xFFFFFFFF, number)


def test_wrong_masks_are_refused() -> None:
    for kept in (torch.zeros(3, 2, 5), torch.tensor(True)):
        with pytest.raises(ValueError, match=r"^pack_block_mask: kept: expected bool .* got torch\.\w+ \["):
            ops.pack_block_mask(kept)
    mask = torch.zeros(3, 2, 1, dtype=torch.int32)
    for blocks in (-1, 33):
        with pytest.raises(ValueError, match=rf"key_blocks: expected 0 to 32 .* got {blocks}"):
            ops.unpack_block_mask(mask, blocks)
    with pytest.raises(ValueError, match=r"^unpack_block_mask: mask: expected int32 .* got torch\.int64"):
        ops.unpack_block_mask(mask.long(), 5)


def test_the_oracle_by_hand() -> None:
    """Four queries of a chunk of 4 in a sequence of 66 keys with unit values: who sees which key."""
    mask = ops.pack_block_mask(torch.tensor([[[False, True]], [[True, True]]]))
    seen = reference_prefill.key_mask(mask, 0, 4, 66, 64, 64)
    assert seen.sum(-1).flatten().tolist() == [0, 0, 1, 2]
    q, k, v = torch.zeros(4, 1, 8), torch.zeros(66, 1, 8), torch.arange(66.0).view(66, 1, 1).expand(66, 1, 8)
    bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (4, 66)]
    out, lse = reference_prefill.block_sparse_attention(q, k, v, *bounds, mask, block_q=64)
    assert out[:, 0, 0].tolist() == [0.0, 0.0, 64.0, 64.5]
    torch.testing.assert_close(lse[:, 0].exp(), torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=torch.float64))
