"""What the prefill ops refuse, and by which name, bad values among it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import DEVICES, assert_same, needs_cuda
from prefill_cases import PrefillSpec, build, composite
from test_bad_input import Bad, assert_refused, look_at_values, resize, tensors_of, to, value

from unique_attn import ops

OPS = ["block_sparse_attention", "composite_blocks", "select_blocks", "unique_prefill"]
ATTENDING = ["block_sparse_attention", "unique_prefill"]
ESTIMATING = ["composite_blocks", "unique_prefill"]
SELECTING = ["select_blocks", "unique_prefill"]


def arguments(op: str, device: str) -> dict[str, Any]:
    """N=98, Nk=168, B=3, H=2, G=3, D=16: four slots, two blocks of keys."""
    case = build(PrefillSpec(((61, 61), (0, 70), (37, 37)), group=3, block_q=64), device)
    bounds = {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k}
    if op == "block_sparse_attention":
        args = {"q": case.q, "k": case.k, "v": case.v, **bounds, "max_seqlen_q": 61, "mask": case.mask}
        return {**args, **case.spec.blocks}
    choice = {"threshold": 0.3, "top_p": None, "min_blocks": 0, "max_blocks": None}
    if op == "select_blocks":
        return {"shares": composite(case), **bounds, **choice, **case.spec.blocks}
    values = {"v": case.v} if op == "unique_prefill" else {}
    estimate = {"method": "directional", "pool_q": 8, "pool_k": 8, "spread_weight": None, **case.spec.blocks}
    args = {"q": case.q, "k": case.k, **values, **bounds, "max_seqlen_q": 61, "max_seqlen_k": 70, **estimate}
    return {**args, **choice} if op == "unique_prefill" else args


def bad_bounds(op: str) -> list[Bad]:
    """What all ops are given."""
    bad = [Bad(op, name, value(x), ("64 or 128", f"got {x}")) for name in ("block_q", "block_k") for x in (0, 32, 256)]
    bad += [Bad(op, "cu_seqlens_k", lambda x: x[:3], ("4", "3"), note="fewer sequences")]
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        bad += [
            Bad(op, name, to(torch.int64), ("int32", "int64")),
            Bad(op, name, lambda x: x[None], ("dimension",), note="rank too high"),
            Bad(op, name, lambda x: x[:0], note="empty"),
            Bad(op, name, lambda x: x.repeat_interleave(2)[::2], ("contiguous",), note="strided"),
        ]
    return bad


def bad_tokens(op: str) -> list[Bad]:
    bad = [
        Bad(op, "q", to(torch.int32), ("int32",), note="int32"),
        Bad(op, "q", to(torch.bfloat16), named="k", note="mixed dtypes"),
        Bad(op, "q", resize(1, 7), ("7", "query heads"), note="Hq no multiple of H"),
        Bad(op, "q", resize(1, 34), ("34", "16"), note="G is 17"),
        Bad(op, "q", resize(1, 1), ("1 query heads",), note="fewer heads than H"),
        Bad(op, "q", resize(2, 12), ("12",), note="D is 12"),
        Bad(op, "q", resize(2, 264), ("264",), note="D is 264"),
        Bad(op, "q", resize(2, 24), named="k", note="another D"),
        Bad(op, "q", lambda x: x[0, 0, 0], ("dimensions",), note="a number"),
        Bad(op, "max_seqlen_q", value(-1), ("got -1",)),
    ]
    names = ("k", "v") if op in ATTENDING else ("k",)
    for name in ("q", *names):
        bad += [
            Bad(op, name, lambda x: x[None], ("dimensions",), note="rank too high"),
            Bad(op, name, lambda x: x[0], ("dimensions",), note="rank too low"),
        ]
    for name in names:
        bad += [
            Bad(op, name, to(torch.float16), ("float32", "float16")),
            Bad(op, name, resize(2, 24), ("16", "24"), note="another D"),
        ]
    return bad


def all_bad() -> list[Bad]:
    bad = [each for op in OPS for each in bad_bounds(op)]
    bad += [each for op in OPS if op != "select_blocks" for each in bad_tokens(op)]
    for op in ATTENDING:
        bad += [
            Bad(op, "k", resize(1, 5), ("5",), named="v" if op == ATTENDING[0] else "v|q", note="heads of k alone"),
            Bad(op, "v", resize(0, 167), ("168", "167"), note="fewer tokens"),
        ]
    for op in ESTIMATING:
        bad += [
            Bad(op, "max_seqlen_k", value(-1), ("got -1",)),
            *(Bad(op, "method", value(x), ("directional, unisparse", repr(x))) for x in ("mean", "", None, 3)),
            *(
                Bad(op, name, value(x), ("8, 16, 32 or 64", f"got {x}"))
                for name in ("pool_q", "pool_k")
                for x in (0, -8, 4, 12, 128)
            ),
        ]
    for op in SELECTING:
        for x in (-0.1, 1.1, math.inf, math.nan):
            bad += [Bad(op, "threshold", value(x), ("0 to 1", f"got {x}"))]
        bad += [
            Bad(op, "top_p", value(0.5), ("either threshold or top_p", "both"), named="threshold", note="both"),
            Bad(op, "min_blocks", value(-1), ("got -1",)),
            Bad(op, "max_blocks", value(-1), ("got -1",)),
        ]
    op = "block_sparse_attention"
    bad += [
        Bad(op, "mask", to(torch.int64), ("int32", "int64")),
        Bad(op, "mask", lambda x: x[0], ("dimensions",), note="rank too low"),
        Bad(op, "mask", lambda x: x[:3], ("4 query block slots", "got 3"), note="too few slots"),
        Bad(op, "mask", resize(1, 3), ("1, 2", "6", "got 3"), note="heads"),
        Bad(op, "mask", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), ("contiguous",), note="strided"),
    ]
    op = "select_blocks"
    bad += [
        Bad(op, "threshold", value(None), ("either threshold or top_p", "neither"), note="neither"),
        Bad(op, "shares", to(torch.bfloat16), ("float32", "bfloat16")),
        Bad(op, "shares", to(torch.int32), ("float32", "int32")),
        Bad(op, "shares", lambda x: x[0], ("dimensions",), note="rank too low"),
        Bad(op, "shares", lambda x: x[None], ("dimensions",), note="rank too high"),
        Bad(op, "shares", lambda x: x.mT.contiguous().mT, ("contiguous",), note="strided"),
        Bad(op, "shares", lambda x: x[:2], ("got 2",), named="query block slots of shares", note="too few slots"),
    ]
    return bad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", all_bad(), ids=str)
def test_is_refused(device: str, bad: Bad) -> None:
    args = arguments(bad.op, device)
    args[bad.argument] = bad.change(args[bad.argument])
    assert_refused(bad.op, args, bad.named or bad.argument, bad.words)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", SELECTING)
def test_numbers_that_do_not_go_together_are_refused(device: str, op: str) -> None:
    args = arguments(op, device)
    assert_refused(op, {**args, "min_blocks": 3, "max_blocks": 2}, "min_blocks", ("max_blocks = 2", "got 3"))
    for x in (-0.1, 1.1, math.nan):
        assert_refused(op, {**args, "threshold": None, "top_p": x}, "top_p", ("0 to 1", f"got {x}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ESTIMATING)
def test_a_weight_of_what_is_not_there_is_refused(device: str, op: str) -> None:
    args = {**arguments(op, device), "method": "unisparse"}
    assert_refused(op, {**args, "spread_weight": 2.0}, "spread_weight", ("None", "unisparse", "got 2.0"))
    getattr(ops, op)(**args)


def test_the_library_refuses_what_the_wrappers_never_pass() -> None:
    args = arguments("composite_blocks", "cpu")
    tensors = [args[name] for name in ("q", "k", "cu_seqlens_q", "cu_seqlens_k")]
    sizes = (8, 8, 64, 64)
    for rule, aggregate, named in ((1, 0, "rule"), (3, 0, "rule"), (-1, 0, "rule"), (0, 2, "aggregate")):
        with pytest.raises(ValueError, match=rf"^composite_blocks: {named}: expected"):
            torch.ops.unique_attn.composite_blocks(*tensors, 61, 70, rule, False, aggregate, *sizes, 2.0, 1.0, None)


@pytest.mark.parametrize("op", OPS)
def test_a_meta_tensor_among_others_is_refused(op: str) -> None:
    for name in tensors_of(arguments(op, "cpu")):
        args = arguments(op, "cpu")
        args[name] = args[name].to("meta")
        with pytest.raises(ValueError, match="device"):
            getattr(ops, op)(**args)


@needs_cuda
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_two_devices_and_fp64_are_refused_on_cuda(op: str) -> None:
    names = list(tensors_of(arguments(op, "cuda")))
    for name in names:
        args = arguments(op, "cuda")
        args[name] = args[name].cpu()
        assert_refused(op, args, "|".join(names), ("device", "cpu", "cuda:0"))
    args = arguments(op, "cuda")
    wide = {name: x.double() for name, x in tensors_of(args).items() if x.is_floating_point()}
    assert_refused(op, {**args, **wide}, "q|shares", ("float64", "CUDA"))


PACKINGS = [
    ("cu_seqlens_q", [1, 61, 61, 98], ()),
    ("cu_seqlens_q", [0, 62, 61, 98], ("ascending",)),
    ("cu_seqlens_q", [0, 60, 60, 98], ("as many queries", "37", "got 38 at [2]")),
    ("cu_seqlens_k", [1, 61, 131, 168], ()),
    ("cu_seqlens_k", [0, 131, 61, 168], ("ascending",)),
]
TOTALS = [
    ("cu_seqlens_q", [0, 61, 61, 97], ("98", "97")),
    ("cu_seqlens_q", [0, 61, 61, 99], ("98", "99")),
    ("cu_seqlens_q", [0, 36, 36, 98], ("max_seqlen_q = 61",)),
    ("cu_seqlens_k", [0, 61, 131, 167], ("168", "167")),
]
ALL_PACKINGS = [(op, *each) for op in OPS for each in PACKINGS + (TOTALS if op != "select_blocks" else [])]
ALL_PACKINGS += [(op, "cu_seqlens_k", [0, 61, 132, 168], ("max_seqlen_k = 70",)) for op in ESTIMATING]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "name", "bounds", "words"), ALL_PACKINGS, ids=str)
def test_bad_packing_is_named(
    device: str, op: str, name: str, bounds: list[int], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_values(device, monkeypatch)
    args = {**arguments(op, device), name: torch.tensor(bounds, dtype=torch.int32, device=device)}
    assert_refused(op, args, name, words)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_shares_are_those_of_the_queries(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look_at_values(device, monkeypatch)
    args = arguments("select_blocks", device)
    for count in (3, 5):
        shares = resize(0, count)(args["shares"])
        assert_refused("select_blocks", {**args, "shares": shares}, "shares", ("4", f"got {count}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_good_values_are_accepted(device: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = getattr(ops, op)(**arguments(op, device))
    monkeypatch.setenv("UNIQUE_ATTN_CHECK", "1")
    got = getattr(ops, op)(**arguments(op, device))
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:
        assert_same(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_that_are_no_error(device: str) -> None:
    """Weights and scales are any finite numbers."""
    args = arguments("composite_blocks", device)
    assert ops.composite_blocks(**{**args, "spread_weight": -1.0}).isfinite().all()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^composite_blocks: spread_weight: expected a finite number, got {bad}$"):
            ops.composite_blocks(**{**args, "spread_weight": bad})
        with pytest.raises(ValueError, match=f"scale: expected a finite number, got {bad}$"):
            ops.unique_prefill(**arguments("unique_prefill", device), scale=bad)


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_be_estimated_is_kept(device: str) -> None:
    args = arguments("unique_prefill", device)
    args["k"] = torch.full_like(args["k"], torch.nan)
    out, _, mask, kept = ops.unique_prefill(**args)
    assert out.isnan().all()
    assert mask.flatten(1).tolist() == [[1] * 6, [0] * 6, [1] * 6, [0] * 6]
    assert bool((kept == 1.0).all())
