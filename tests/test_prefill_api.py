"""What block_sparse_attention refuses, and by which name, bad values among it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import DEVICES, assert_same, needs_cuda
from prefill_cases import PrefillSpec, build
from test_bad_input import Bad, assert_refused, look_at_values, resize, tensors_of, to, value

from unique_attn import ops

OP = "block_sparse_attention"


def arguments(device: str) -> dict[str, Any]:
    """N=98, Nk=168, B=3, H=2, G=3, D=16: two slots more than sequences."""
    case = build(PrefillSpec(((61, 61), (0, 70), (37, 37)), group=3, block_q=64), device)
    packing = {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k, "max_seqlen_q": 61}
    return {"q": case.q, "k": case.k, "v": case.v, **packing, "mask": case.mask, **case.spec.blocks}


def all_bad() -> list[Bad]:
    bad = [
        Bad(OP, "q", to(torch.int32), ("int32",), note="int32"),
        Bad(OP, "q", to(torch.bfloat16), named="k", note="mixed dtypes"),
        Bad(OP, "q", resize(1, 7), ("7", "query heads"), note="Hq no multiple of H"),
        Bad(OP, "q", resize(1, 34), ("34", "16"), note="G is 17"),
        Bad(OP, "q", resize(1, 1), ("1 query heads",), note="fewer heads than H"),
        Bad(OP, "q", resize(2, 12), ("12",), note="D is 12"),
        Bad(OP, "q", resize(2, 264), ("264",), note="D is 264"),
        Bad(OP, "q", resize(2, 24), named="k", note="another D"),
        Bad(OP, "q", lambda x: x[0, 0, 0], ("dimensions",), note="a number"),
        Bad(OP, "k", resize(1, 5), ("5",), named="v", note="heads of k alone"),
        Bad(OP, "v", resize(0, 167), ("168", "167"), note="fewer tokens"),
        Bad(OP, "mask", to(torch.int64), ("int32", "int64")),
        Bad(OP, "mask", lambda x: x[0], ("dimensions",), note="rank too low"),
        Bad(OP, "mask", lambda x: x[:3], ("4 query block slots", "got 3"), note="too few slots"),
        Bad(OP, "mask", resize(1, 3), ("1, 2", "6", "got 3"), note="heads"),
        Bad(OP, "mask", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), ("contiguous",), note="strided"),
        Bad(OP, "max_seqlen_q", value(-1), ("got -1",)),
        *(
            Bad(OP, name, value(x), ("64 or 128", f"got {x}"))
            for name in ("block_q", "block_k")
            for x in (0, 32, 96, 256)
        ),
        Bad(OP, "cu_seqlens_k", lambda x: x[:3], ("4", "3"), note="fewer sequences"),
    ]
    for name in ("q", "k", "v"):
        bad += [
            Bad(OP, name, lambda x: x[None], ("dimensions",), note="rank too high"),
            Bad(OP, name, lambda x: x[0], ("dimensions",), note="rank too low"),
        ]
    for name in ("k", "v"):
        bad += [
            Bad(OP, name, to(torch.float16), ("float32", "float16")),
            Bad(OP, name, resize(2, 24), ("16", "24"), note="another D"),
        ]
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        bad += [
            Bad(OP, name, to(torch.int64), ("int32", "int64")),
            Bad(OP, name, lambda x: x[None], ("dimension",), note="rank too high"),
            Bad(OP, name, lambda x: x[:0], note="empty"),
            Bad(OP, name, lambda x: x.repeat_interleave(2)[::2], ("contiguous",), note="strided"),
        ]
    return bad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", all_bad(), ids=str)
def test_is_refused(device: str, bad: Bad) -> None:
    args = arguments(device)
    args[bad.argument] = bad.change(args[bad.argument])
    assert_refused(bad.op, args, bad.named or bad.argument, bad.words)


def test_a_meta_tensor_among_others_is_refused() -> None:
    for name in tensors_of(arguments("cpu")):
        args = arguments("cpu")
        args[name] = args[name].to("meta")
        with pytest.raises(ValueError, match="device"):
            ops.block_sparse_attention(**args)


@needs_cuda
def test_tensors_of_two_devices_and_fp64_are_refused() -> None:
    names = list(tensors_of(arguments("cuda")))
    for name in names:
        args = arguments("cuda")
        args[name] = args[name].cpu()
        assert_refused(OP, args, "|".join(names), ("device", "cpu", "cuda:0"))
    args = arguments("cuda")
    assert_refused(OP, {**args, **{name: args[name].double() for name in "qkv"}}, "q", ("float64", "CUDA"))


PACKINGS = [
    ("cu_seqlens_q", [1, 61, 61, 98], ()),
    ("cu_seqlens_q", [0, 62, 61, 98], ("ascending",)),
    ("cu_seqlens_q", [0, 61, 61, 97], ("98", "97")),
    ("cu_seqlens_q", [0, 61, 61, 99], ("98", "99")),
    ("cu_seqlens_q", [0, 36, 36, 98], ("max_seqlen_q = 61",)),
    ("cu_seqlens_q", [0, 60, 60, 98], ("as many queries", "37", "got 38 at [2]")),
    ("cu_seqlens_k", [1, 61, 131, 168], ()),
    ("cu_seqlens_k", [0, 131, 61, 168], ("ascending",)),
    ("cu_seqlens_k", [0, 61, 131, 167], ("168", "167")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "bounds", "words"), PACKINGS, ids=str)
def test_bad_packing_is_named(
    device: str, name: str, bounds: list[int], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_values(device, monkeypatch)
    args = {**arguments(device), name: torch.tensor(bounds, dtype=torch.int32, device=device)}
    assert_refused(OP, args, name, words)


@pytest.mark.parametrize("device", DEVICES)
def test_good_values_are_accepted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ops.block_sparse_attention(**arguments(device))
    monkeypatch.setenv("UNIQUE_ATTN_CHECK", "1")
    for got, same in zip(ops.block_sparse_attention(**arguments(device)), expected, strict=True):
        assert_same(got, same)
