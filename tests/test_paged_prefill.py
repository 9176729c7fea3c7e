"""The ops of prefill over paged caches: what they compute over the same keys packed, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CACHE_LAYOUTS,
    CUDA_DTYPES,
    DEVICES,
    DTYPES,
    assert_same,
    assert_threads_agree,
    examples,
    needs_cuda,
    poisoned,
)
from paged_prefill_cases import PagedCase, arguments_of, call, gather_paged, page_out
from prefill_cases import PrefillSpec, assert_attention, build, prefill_specs
from test_bad_input import Bad, assert_refused, look_at_values, odd_rows, to, value, widen_channels

from unique_attn import ops

OPS = ["block_sparse_attention", "composite_blocks", "unique_prefill"]
METHODS = list(ops.PREFILL_METHODS)
BLOCK_SIZES = [16, 32, 48, 64, 128, 192]


def same_kernel(case: PagedCase) -> bool:
    """Whether packed and paged keys meet the same arithmetic: the Hopper kernel does not take blocks of 48."""
    size, dim = case.k_cache.shape[2:]
    packed_alone = size % 64 != 0 and size not in (16, 32)
    hopper = (
        case.packed.q.is_cuda and torch.cuda.get_device_capability()[0] == 9
        and case.packed.q.dtype != torch.float32 and (dim == 64 or dim >= 128) and case.packed.spec.block_q == 128
    )  # fmt: skip
    return not (hopper and packed_alone)


def assert_as_packed(case: PagedCase) -> None:
    """All three ops give what they give for the packed keys, bit for bit."""
    out, lse = poisoned(lambda: call("block_sparse_attention", case))
    assert_attention(case.packed, (out, lse))
    if same_kernel(case):
        for got, expected in zip((out, lse), call("block_sparse_attention", case.packed), strict=True):
            assert_same(got, expected)
    for method in METHODS:
        for pool_k in (8, 64):
            options = {"method": method, "pool_k": pool_k}
            (got,), (expected,) = (call("composite_blocks", x, **options) for x in (case, case.packed))
            assert_same(got, expected, f"shares of {method}")
        chosen = call("unique_prefill", case, method=method)
        for i, (got, expected) in enumerate(zip(chosen, call("unique_prefill", case.packed, method=method))):
            if i >= 2 or same_kernel(case):
                assert_same(got, expected, f"unique_prefill, result {i}")


# ---- Values. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(12)
def test_equals_packed_keys(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(prefill_specs(dtype=dtype)), device)
    size = data.draw(st.sampled_from(BLOCK_SIZES), label="block_size")
    layout = data.draw(st.sampled_from(CACHE_LAYOUTS), label="cache_layout")
    assert_as_packed(page_out(case, size, layout, data.draw(st.booleans(), label="shared")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("layout", ["heads_first", "tokens_first"])
def test_typical_shapes(device: str, dtype: torch.dtype, size: int, layout: str) -> None:
    """What models have, with ends of sequences on, before and after those of blocks and of tiles."""
    chunks = ((192, 704), (130, 130), (1, 385), (64, 64), (40, 17 + 3 * size))
    for head_dim, block_k, mask_heads in ((64, 64, "kv"), (128, 128, "query")):
        spec = PrefillSpec(chunks, 2, 2, mask_heads, head_dim, 128, block_k, dtype, listed=0.4)
        assert_as_packed(page_out(build(spec, device), size, layout, shared=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_sequences_share_blocks(device: str, size: int) -> None:
    """Three sequences, the second all blocks of the first, the third one's alone."""
    spec = PrefillSpec(((200, 400), (130, 400), (16, size)), head_dim=64, dtype=torch.bfloat16)
    case = page_out(build(spec, device), size)
    table = case.block_table
    table[1], table[2, 0] = table[0], table[0, 0]
    table[2, 1:] = -1
    assert_as_packed(case.gathered())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [16, 64])
def test_no_queries_no_keys_no_sequences(device: str, size: int) -> None:
    for chunks in ((), ((0, 0),), ((0, 70), (0, 0)), ((3, 70), (0, 0), (1, 1))):
        assert_as_packed(page_out(build(PrefillSpec(chunks), device), size))
    case = page_out(build(PrefillSpec(((0, 0),)), device), size)
    empty = replace(case, k_cache=case.k_cache[:0], v_cache=case.v_cache[:0], block_table=case.block_table[:, :0])
    assert_as_packed(empty)  # a cache without blocks, a table without entries


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_what_is_not_seen_does_not_matter(device: str, size: int, bad: float) -> None:
    """Values of key blocks that no query block lists, in whatever block of the cache."""
    spec = PrefillSpec(((256, 300), (33, 33)), head_dim=64, dtype=torch.bfloat16, listed=1.1)
    case = page_out(build(spec, device), size)
    case.packed.kept[:, :, 1] = False
    clean = call("block_sparse_attention", case)
    at = torch.arange(64, 128, device=device)
    for cache in (case.k_cache, case.v_cache):
        cache[case.block_table[0, at // size].long(), :, at % size] = bad
    for got, expected in zip(call("block_sparse_attention", case), clean, strict=True):
        assert_same(got, expected)


# ---- Layouts. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [16, 128])
def test_caches_that_repeat_memory_and_tables_that_are_slices(device: str, size: int) -> None:
    case = page_out(build(PrefillSpec(head_dim=64, dtype=torch.bfloat16), device), size)
    wide = torch.full((3, case.block_table.shape[1] + 5), -1, dtype=torch.int32, device=device)
    wide[:, 2:-3] = case.block_table
    assert_as_packed(replace(case, block_table=wide[:, 2:-3]))
    repeated = {name: getattr(case, name)[:, :1].expand(-1, 2, -1, -1) for name in ("k_cache", "v_cache")}
    for got, expected in zip(
        call("block_sparse_attention", replace(case, **repeated)),
        call("block_sparse_attention", replace(case, **{name: x.contiguous() for name, x in repeated.items()})),
        strict=True,
    ):
        # CUDA: memory that repeats goes to another kernel, so results differ by roundings.
        torch.testing.assert_close(got, expected, rtol=0.016, atol=2e-3 if device == "cuda" else 0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [16, 48, 64])
def test_blocks_far_apart(device: str, size: int) -> None:
    """The last block that is used begins more than 2^31 elements after the first of the cache."""
    spec = PrefillSpec(((150, 150),), kv_heads=1, head_dim=64, dtype=torch.bfloat16)
    case = page_out(build(spec, device), size)
    last_used = int(case.block_table[0, : -(-150 // size)].max())
    stride = 2**31 // last_used // 8 * 8 + 8
    memory = torch.empty(stride * (case.k_cache.shape[0] - 1) + size * 64, dtype=torch.bfloat16, device=device)
    far = memory.as_strided(case.k_cache.shape, (stride, size * 64, 64, 1))
    for name in ("k_cache", "v_cache"):
        far.copy_(getattr(case, name))
        assert_as_packed(replace(case, **{name: far}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_with_any_number_of_threads(dtype: torch.dtype) -> None:
    case = page_out(build(PrefillSpec(((300, 500), (33, 40)), head_dim=64, dtype=dtype)), 48)
    assert_threads_agree(lambda: call("unique_prefill", case))


def test_gathered_keys_by_hand() -> None:
    cache = torch.arange(3 * 2 * 16).view(3, 2, 16, 1)
    table = torch.tensor([[2, 0], [1, -7]], dtype=torch.int32)
    packed = gather_paged(cache, table, [17, 2])
    assert packed[:, 0, 0].tolist() == [*range(64, 80), 0, 32, 33]
    assert packed[:, 1, 0].tolist() == [*range(80, 96), 16, 48, 49]


# ---- Tables that name no block. ----


@needs_cuda
@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("bad", [-1, -(2**31), 2**30, 2**31 - 1])
def test_keys_without_a_block_are_zeros_on_cuda(size: int, dtype: torch.dtype, bad: int) -> None:
    """An entry that is no block of the cache, and a sequence that is longer than the table's row."""
    spec = PrefillSpec(((200, 300), (min(130, 4 * size), 4 * size)), head_dim=128, dtype=dtype, listed=1.1)
    case = page_out(build(spec, "cuda"), size)
    case = replace(case, block_table=case.block_table[:, : max(4, -(-300 // size))].contiguous())
    case.block_table[1, 1] = bad
    for x in (case.packed.k, case.packed.v):
        x[300 + size : 300 + 2 * size] = 0.0
    assert_as_packed(case)
    width = case.block_table.shape[1] - 1
    for x in (case.packed.k, case.packed.v):
        x[min(width * size, 300) : 300] = 0.0
        x[300 + width * size :] = 0.0
    assert_as_packed(replace(case, block_table=case.block_table[:, :width]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("place", "bad"), [((0, 0), -1), ((0, 3), 10), ((2, 2), 2**31 - 1), ((1, 0), -(2**31))])
def test_the_first_bad_block_is_named(
    device: str, op: str, place: tuple[int, int], bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that hold keys, whether a query sees them or not."""
    look_at_values(device, monkeypatch)
    args = bad_input_arguments(op, device)
    assert args["k"].shape[0] == 10
    args["block_table"][place] = bad
    assert_refused(op, args, "block_table", ("from 0 to 9", f"got {bad} at [{place[0]}, {place[1]}]"))


# ---- What is refused. ----


def bad_input_arguments(op: str, device: str) -> dict[str, Any]:
    """N=98, lengths 61, 16 and 37 in blocks of 16, H=2, G=3, D=16; rows of the table have 5 entries."""
    spec = PrefillSpec(((61, 61), (0, 16), (37, 37)), group=3, block_q=64, seed=1)
    return arguments_of(op, page_out(build(spec, device), 16))


def all_bad() -> list[Bad]:
    bad = []
    for op in OPS:
        bad += [
            Bad(op, "block_table", to(torch.int64), ("int32", "int64")),
            Bad(op, "block_table", lambda x: x[0], ("2 dimensions",), note="rank too low"),
            Bad(op, "block_table", lambda x: x[:2], ("3", "sequences", "got 2"), note="fewer rows"),
            Bad(op, "block_table", lambda x: x.mT.contiguous().mT, ("stride 1",), note="columns"),
            Bad(op, "block_table", value(None), ("3 dimensions",), named="k", note="a cache without a table"),
            Bad(op, "k", lambda x: x[0], ("4 dimensions",), note="packed keys with a table"),
            Bad(op, "k", lambda x: x[:, :, :8], ("multiple of 16", "got 8"), note="blocks of 8"),
            Bad(op, "k", lambda x: x[:, :, :0], ("multiple of 16", "got 0"), note="blocks of 0"),
            Bad(op, "k", widen_channels, ("channel stride 1",), note="channel stride 2"),
            Bad(op, "k", odd_rows, ("multiples of 8",), note="odd rows"),
            Bad(op, "k", lambda x: x[..., :8], ("16",), note="another D"),
            Bad(op, "k", to(torch.bfloat16), ("float32", "bfloat16")),
            Bad(op, "q", lambda x: x[:, :5], ("5 query heads",), note="Hq no multiple of H"),
        ]
        if op != "composite_blocks":
            bad += [
                Bad(op, "v", lambda x: x[0], ("4 dimensions",), note="rank too low"),
                Bad(op, "v", lambda x: x[1:], ("as in k",), note="fewer blocks"),
                Bad(op, "v", lambda x: x.repeat(1, 1, 2, 1), ("as in k", "32"), note="larger blocks"),
                Bad(op, "v", widen_channels, ("channel stride 1",), note="channel stride 2"),
            ]
        if op != "block_sparse_attention":
            most = (2**31 - 1) // 2
            bad += [
                Bad(op, "max_seqlen_k", value(-1), ("got -1",)),
                Bad(
                    op, "max_seqlen_k", value(most // 3 + 1), (f"{most // 3} for 3 sequences",), note="too many in all"
                ),
            ]
    return bad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", all_bad(), ids=str)
def test_is_refused(device: str, bad: Bad) -> None:
    args = bad_input_arguments(bad.op, device)
    args[bad.argument] = bad.change(args[bad.argument])
    if args["block_table"] is None:
        del args["block_table"]
    assert_refused(bad.op, args, bad.named or bad.argument, bad.words)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_a_table_of_too_many_tokens_is_refused(device: str, op: str) -> None:
    args = bad_input_arguments(op, device)
    args["block_table"] = torch.empty(1, 2**26, dtype=torch.int32, device=device).expand(3, -1)
    with pytest.raises(ValueError, match=rf"^{op}: block_table: expected at most .* got {2**26} blocks of 16"):
        getattr(ops, op)(**args)


LENGTHS = [
    ("cu_seqlens_k", [0, 61, 142, 179], ("got 61 and 142 at [1]", "row of block_table = 80")),
    ("cu_seqlens_k", [0, 61, 60, 98], ("ascending",)),
    ("cu_seqlens_k", [1, 62, 78, 115], ("expected 0 at [0]",)),
    ("cu_seqlens_q", [0, 61, 78, 98], ("as many queries", "16", "got 17 at [1]")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("name", "bounds", "words"), LENGTHS, ids=str)
def test_bad_lengths_are_named(
    device: str, op: str, name: str, bounds: list[int], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_values(device, monkeypatch)
    args = bad_input_arguments(op, device)
    assert args["block_table"].shape[1] == 5  # 80 tokens
    args[name] = torch.tensor(bounds, dtype=torch.int32, device=device)
    if op != "block_sparse_attention":
        args["max_seqlen_k"] = 1000
    assert_refused(op, args, name, words)
    if op != "block_sparse_attention" and bounds[2] == 142:
        assert_refused(op, {**args, "max_seqlen_k": 70}, name, ("max_seqlen_k = 70",))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_good_values_are_accepted(device: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = bad_input_arguments(op, device)
    expected = getattr(ops, op)(**args)
    monkeypatch.setenv("UNIQUE_ATTN_CHECK", "1")
    for got, same in zip(getattr(ops, op)(**args), expected, strict=True):
        assert_same(got, same)


@pytest.mark.parametrize("op", OPS)
def test_a_meta_table_is_refused(op: str) -> None:
    args = bad_input_arguments(op, "cpu")
    args["block_table"] = args["block_table"].to("meta")
    with pytest.raises(ValueError, match=r"block_table.*device"):
        getattr(ops, op)(**args)


# ---- As PyTorch wants an op to be. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_and_compile(device: str, op: str) -> None:
    case = page_out(build(PrefillSpec(((61, 61), (37, 90)), dtype=torch.bfloat16), device), 16)
    for cache in (case.k_cache, case.v_cache):
        cache.nan_to_num_(0.0)  # opcheck cannot compare NaN
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "unique_attn":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        call(op, case)
    (found,) = seen
    assert set(torch.library.opcheck(*found).values()) == {"SUCCESS"}
    compiled = torch.compile(lambda case: call(op, case), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(case), call(op, case), strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_autocast_gives_queries_the_dtype_of_the_caches(device: str, op: str) -> None:
    """Caches are never copied; q alone is cast."""
    for dtype in (torch.bfloat16, torch.float32):
        case = page_out(build(PrefillSpec(dtype=dtype), device), 16)
        expected = call(op, case)
        mixed = replace(case, packed=replace(case.packed, q=case.packed.q.float()))
        with torch.autocast(device, dtype=torch.bfloat16):
            for got, same in zip(call(op, mixed), expected, strict=True):
                assert_same(got, same)
