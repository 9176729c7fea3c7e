"""What the training ops refuse, and by which name, bad values among it, and what PyTorch's opcheck asks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import DEVICES, assert_same, needs_cuda
from test_bad_input import Bad, assert_refused_by, look_at_values, resize, tensors_of, to, value
from test_compile import Recorder
from training_cases import MODES, RULES, TrainSpec, build, library_mask

from unique_attn import ops, train

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "page_boundary": ops.page_boundary,
    "soft_mask_attention": ops.soft_mask_attention,
    "packed_index": train.packed_index,
    "select_pages": train.select_pages,
    "masked_attention": train.masked_attention,
}


def arguments(name: str, device: str, mode: str = "soft") -> dict[str, Any]:
    """Valid arguments of each function: N=98, H=2, G=3, D=16, page size 4; ``name`` may end in the mode."""
    name, _, given = name.partition(":")
    mode = given or mode
    case = build(TrainSpec((61, 0, 37), group=3, mode=mode), device)
    packing = {"cu_seqlens": case.cu_seqlens, "max_seqlen": 61}
    fixed = {"sink_pages": 1, "recent_pages": 1}
    scoring = {"rule": "directional", "page_size": 4}
    if name == "packed_index":
        return {"k": case.k, **packing, **scoring}
    if name in ("page_boundary", "select_pages"):
        index = train.packed_index(case.k, *case.packing, **scoring)
        budget = {"k" if name == "page_boundary" else "num_pages": 6}
        return {"q": case.q, "index": index, **packing, **budget, **scoring, **fixed}
    if name == "masked_attention":
        budget = {"num_pages": 6, "mode": mode, "tau": case.tau}
        return {"q": case.q, "k": case.k, "v": case.v, **packing, **budget, **scoring, **fixed}
    mask = {"index": None, "theta": None, "tau": None, "pages": None, **library_mask(case)}
    return {"q": case.q, "k": case.k, "v": case.v, **packing, **mask, **scoring, **fixed}


def call(name: str, args: dict[str, Any]) -> Any:
    return FUNCTIONS[name.partition(":")[0]](**args)


def all_bad() -> list[Bad]:
    bad: list[Bad] = []
    soft, hard, dense = (f"soft_mask_attention:{mode}" for mode in MODES)
    for op in ("page_boundary", soft, hard, dense, *list(FUNCTIONS)[2:], "masked_attention:hard"):
        bad += [
            Bad(op, "cu_seqlens", to(torch.int64), ("int32", "int64")),
            Bad(op, "cu_seqlens", lambda x: x[None], ("dimension",), note="rank too high"),
            Bad(op, "cu_seqlens", lambda x: x[:0], note="empty"),
            Bad(op, "max_seqlen", value(-1), ("got -1",)),
            *(Bad(op, "page_size", value(x), (f"got {x}",)) for x in (0, 3, -4, 128)),
            *(Bad(op, "rule", value(x), ("mean", "directional", repr(x))) for x in ("quest", None, 2)),
        ]
        if op != "packed_index":
            bad += [
                Bad(op, "q", to(torch.int32), named="q|k", note="int32"),
                Bad(op, "q", to(torch.bfloat16), named="q|k|index", note="mixed dtypes"),
                Bad(op, "q", lambda x: x[None], ("dimensions",), note="rank too high"),
                Bad(op, "q", lambda x: x[0], ("dimensions",), note="rank too low"),
                Bad(op, "q", lambda x: x[0, 0, 0], ("dimensions",), note="a number"),
                Bad(op, "q", resize(1, 7), ("7", "query heads"), note="Hq no multiple of H"),
                Bad(op, "q", resize(1, 34), ("34", "16"), note="G is 17"),
                Bad(op, "q", resize(1, 1), ("1 query heads",), note="fewer heads than H"),
                Bad(op, "q", resize(2, 12), ("12",), named="q|k", note="D is 12"),
                Bad(op, "q", resize(2, 264), ("264",), named="q|k", note="D is 264"),
                Bad(op, "q", resize(2, 24), named="index|k", note="another D"),
                Bad(op, "sink_pages", value(-1), ("got -1",)),
                Bad(op, "recent_pages", value(-1), ("got -1",)),
            ]
        if op in ("page_boundary", "select_pages", soft):
            bad += [
                Bad(op, "index", to(torch.int32), ("uint8", "int32")),
                Bad(op, "index", lambda x: x[0], ("dimensions",), note="rank too low"),
                Bad(op, "index", lambda x: x[..., :-16].contiguous(), ("128", "112"), note="entry size"),
                Bad(op, "index", resize(1, 5), ("5",), named="index|q", note="five KV heads"),
                Bad(op, "rule", value("unique"), ("80", "128"), named="index", note="of another rule"),
            ]
        if op != "packed_index" and not op.startswith("soft"):
            name = "k" if op == "page_boundary" else "num_pages"
            bad += [
                Bad(op, name, value(0), ("got 0",)),
                Bad(op, name, value(1), ("sink_pages + recent_pages = 2", "got 1")),
            ]
        if op not in ("packed_index", dense):
            bad += [Bad(op, "recent_pages", value(0), ("got 0",))]
        if op.startswith(("soft", "masked")):
            for name in ("k", "v"):
                bad += [
                    Bad(op, name, to(torch.float16), ("float32", "float16")),
                    Bad(op, name, lambda x: x[0], ("dimensions",), note="rank too low"),
                    Bad(op, name, resize(0, 97), ("98", "97"), note="fewer tokens"),
                    Bad(op, name, resize(2, 24), ("16", "24"), note="another D"),
                    Bad(op, name, resize(1, 5), ("5",), named="q|k|v|index|theta|pages", note="five heads"),
                ]
    for op in ("page_boundary", soft):
        bad += [
            Bad(op, "index", lambda x: x[:20], ("27 page slots", "got 20"), note="too few slots"),
            Bad(op, "index", lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), ("stride",), note="byte stride"),
            Bad(op, "rule", value("minmax"), ("mean, unique or directional", "minmax")),
        ]
    bad += [
        Bad("page_boundary", "cu_seqlens", lambda x: x.repeat_interleave(2)[::2], ("contiguous",), note="strided"),
        Bad(soft, "theta", to(torch.float64), ("float32", "float64")),
        Bad(soft, "theta", lambda x: x[0], ("dimensions",), note="rank too low"),
        Bad(soft, "theta", resize(0, 97), ("98", "97"), note="fewer tokens"),
        Bad(soft, "theta", resize(1, 6), ("2", "6"), note="query heads"),
        Bad(soft, "theta", lambda x: x.mT.contiguous().mT, ("contiguous",), note="strided"),
        *(
            Bad(soft, name, value(None), ("index, theta and tau", "got"), named="theta")
            for name in ("index", "theta", "tau")
        ),
        Bad(soft, "tau", lambda x: x.double(), ("float32", "float64")),
        Bad(soft, "tau", lambda x: x[None], ("0 dimensions", "got 1"), note="one dimension"),
        Bad(soft, "tau", value(0.5), ("0-dim float32 tensor", "got 0.5"), note="a number"),
        Bad(hard, "pages", to(torch.int64), ("int32", "int64")),
        Bad(hard, "pages", lambda x: x[0], ("dimensions",), note="rank too low"),
        Bad(hard, "pages", resize(0, 97), ("98", "97"), note="fewer tokens"),
        Bad(hard, "pages", resize(1, 6), ("2", "6"), note="query heads"),
        Bad(hard, "pages", lambda x: x.mT.contiguous().mT, ("contiguous",), note="strided"),
        *(Bad("masked_attention", "mode", value(x), ("soft, hard or dense", repr(x))) for x in ("sparse", "", None)),
        Bad("masked_attention", "tau", value(None), ("mode 'soft'", "got None")),
        Bad("masked_attention", "tau", value(1.0), ("0-dim float32 tensor", "got 1.0"), note="a number"),
        Bad("packed_index", "k", to(torch.int32), named="k|k_cache", note="int32"),
        Bad("packed_index", "k", lambda x: x[0], ("3 dimensions",), note="rank too low"),
        Bad("packed_index", "k", resize(2, 12), ("12",), named="k|k_cache", note="D is 12"),
    ]
    return bad


def assert_refused(name: str, args: dict[str, Any], named: str, words: tuple[str, ...]) -> None:
    """Perhaps by an op that the function calls."""
    assert_refused_by(lambda **given: call(name, given), args, rf"(\w+: )?({named})", words)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", all_bad(), ids=str)
def test_is_refused(device: str, bad: Bad) -> None:
    args = arguments(bad.op, device)
    args[bad.argument] = bad.change(args[bad.argument])
    assert_refused(bad.op, args, bad.named or bad.argument, bad.words)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_the_arguments_are_good_otherwise(device: str, name: str, mode: str) -> None:
    call(name, arguments(name, device, mode))


def test_theta_and_pages_exclude_each_other() -> None:
    args = {**arguments("soft_mask_attention:hard", "cpu"), **library_mask(build(TrainSpec((61, 0, 37), group=3)))}
    assert_refused("soft_mask_attention", args, "pages", ("either theta", "got both"))


@pytest.mark.parametrize("name", ["page_boundary", "soft_mask_attention:soft", "soft_mask_attention:hard"])
def test_a_meta_tensor_among_others_is_refused(name: str) -> None:
    for key in tensors_of(arguments(name, "cpu")):
        args = arguments(name, "cpu")
        args[key] = args[key].to("meta")
        with pytest.raises(ValueError, match="device"):
            call(name, args)


@needs_cuda
@pytest.mark.parametrize("name", ["page_boundary", "soft_mask_attention:soft", "soft_mask_attention:hard"])
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    names = list(tensors_of(arguments(name, "cuda")))
    for key in names:
        args = arguments(name, "cuda")
        args[key] = args[key].cpu()
        assert_refused(name, args, "|".join(names), ("device", "cpu", "cuda:0"))


@needs_cuda
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_fp64_on_cuda_is_refused(name: str, mode: str) -> None:
    args = arguments(name, "cuda", mode)
    for key in {"q", "k", "v"} & set(tensors_of(args)):
        args[key] = args[key].double()
    assert_refused(name, args, "q|k|k_cache", ("float64", "CUDA"))


# ---- Values on the device. ----

PACKINGS = [
    ("does not start at 0", [1, 61, 98], 61),
    ("descends", [0, 70, 61, 98], 98),
    ("ends early", [0, 61, 97], 61),
    ("ends late", [0, 61, 99], 61),
    ("longer than max_seqlen", [0, 61, 98], 60),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("note", "bounds", "longest"), PACKINGS, ids=[row[0] for row in PACKINGS])
@pytest.mark.parametrize("name", [*FUNCTIONS, "soft_mask_attention:hard", "masked_attention:dense"])
def test_bad_packing_is_named(
    device: str, note: str, bounds: list[int], longest: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_values(device, monkeypatch)
    args = arguments(name, device)
    args["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    args["max_seqlen"] = longest
    assert_refused(name, args, "cu_seqlens", ())


@pytest.mark.parametrize("device", DEVICES)
def test_bad_masks_are_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look_at_values(device, monkeypatch)
    for tau in (0.0, -1.0, torch.nan):
        args = {**arguments("soft_mask_attention", device), "tau": torch.tensor(tau, device=device)}
        assert_refused("soft_mask_attention", args, "tau", ("positive",))
    for row in ([0, 16], [3, 2], [0, -2], [-1, 4], [2, 2]):
        if row == [2, 2]:  # which changes nothing
            monkeypatch.setenv("UNIQUE_ATTN_CHECK", "1")
        args = arguments("soft_mask_attention:hard", device)
        args["pages"][7, 1, :2] = torch.tensor(row, dtype=torch.int32)
        args["pages"][7, 1, 2:] = -1
        assert_refused("soft_mask_attention", args, "pages", ("ascending", f"got {row[1]}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_good_values_are_accepted(device: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = call("masked_attention", arguments("masked_attention", device, mode))
    monkeypatch.setenv("UNIQUE_ATTN_CHECK", "1")
    assert_same(call("masked_attention", arguments("masked_attention", device, mode)), expected)


# ---- opcheck. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_opcheck(device: str, mode: str, rule: str) -> None:
    """Schema, fake kernels, autograd registration and AOT dispatch of the boundary, the forward and the backward op, as
    the Python functions call them."""
    case = build(TrainSpec((33, 0, 9), group=2, head_dim=8, num_pages=3, mode=mode, rule=rule), device)
    leaves = case.leaves()
    with Recorder() as recorder:
        mask = library_mask(case)
        out, _ = ops.soft_mask_attention(*leaves, *case.packing, **mask, **case.spec.scoring)
        out.backward(case.grad_out)
    calls = {func.name(): (func, args, kwargs) for func, args, kwargs in recorder.calls}
    names = ["page_boundary"] * (mode == "soft") + ["soft_mask_forward", "soft_mask_backward"]
    for name in names:
        func, args, kwargs = calls[f"unique_attn::{name}"]
        args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
        if name == "soft_mask_forward":
            args = (*leaves, *args[3:])  # with autograd
        result = torch.library.opcheck(func, args, kwargs)
        assert set(result.values()) == {"SUCCESS"}
