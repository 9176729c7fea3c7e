"""Every op names the argument that is wrong, what it expected and what came, and writes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICES, Spec, assert_same, build, needs_cuda
from torch import Tensor

from unique_attn import ops, reference

Change = Callable[[Any], Any]


def arguments(name: str, device: str) -> dict[str, Any]:
    """Valid arguments of each op: B=2, T=2, H=2, G=3, D=16, page size 4, blocks of 8."""
    case = build(Spec((61, 38), num_tokens=2, group=3), device)
    case.seq_lens = case.seq_lens.clone()
    caches = {"k_cache": case.k_cache, "v_cache": case.v_cache}
    table = {"block_table": case.block_table, "seq_lens": case.seq_lens}
    paging = {"rule": "directional", "page_size": 4, "index_format": "exact"}
    scoring = {**paging, "window": 0}
    if name == "append_kv":
        slots = torch.tensor([5, -1, 0, 9], device=device)
        return {"k": case.k.flatten(0, 1), "v": case.v.flatten(0, 1), **caches, "slot_mapping": slots}
    if name == "page_index":
        starts = torch.zeros_like(case.seq_lens)
        args = {"k_cache": case.k_cache, "index": case.index, **table, "start_lens": starts}
        return {**args, "max_new_tokens": 61, **paging}
    if name == "page_scores":
        return {"q": case.q, "index": case.index, **table, **scoring}
    if name == "topk_pages":
        scores = torch.randn(2, 2, 2, 16).to(device)
        budget = torch.tensor([4, 3], dtype=torch.int32, device=device)
        options = {"page_size": 4, "sink_pages": 1, "recent_pages": 1, "window": 0, "budget_pages": budget}
        return {"scores": scores, "k": 4, **table, "pages_per_block": 2, **options}
    if name == "sparse_decode":
        pages = torch.tensor([0, 2, 5, -1], dtype=torch.int32, device=device).expand(2, 2, 2, 4).contiguous()
        return {"q": case.q, **caches, "pages": pages, **table, "page_size": 4, "window": 0}
    budget = torch.tensor([4, 3], dtype=torch.int32, device=device)
    step = {"q": case.q, "k": case.k, "v": case.v, **caches, "index": case.index, **table, "num_pages": 4}
    return {
        **step, **scoring, "sink_pages": 1, "recent_pages": 1, "budget_pages": budget, "out": torch.ones_like(case.q),
        "slot_mapping": reference.step_slots(case.block_table, case.seq_lens, 2, case.k_cache.shape[2]),
    }  # fmt: skip


@dataclass(frozen=True)
class Bad:
    """``change`` makes ``argument`` wrong; the message names it (or ``named``) and holds every word of ``words``."""

    op: str
    argument: str
    change: Change
    words: tuple[str, ...] = ()
    named: str = ""
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.note or '-'.join(self.words)}".replace(" ", "_")


def value(constant: Any) -> Change:
    return lambda old: constant


def to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def widen_channels(tensor: Tensor) -> Tensor:
    """The same numbers with channel stride 2."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def odd_rows(tensor: Tensor) -> Tensor:
    """The same numbers in rows whose stride is no multiple of 8 elements."""
    return torch.cat([tensor, tensor[..., :3]], dim=-1)[..., : tensor.shape[-1]]


def resize(dim: int, size: int) -> Change:
    """Another size of one dimension: cut, or repeated."""

    def change(tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * (size // tensor.shape[dim] + 1), dim=dim).narrow(dim, 0, size).contiguous()

    return change


def bad_tensor(op: str, argument: str, expected: str, wrong: torch.dtype, batch_dim: int | None) -> list[Bad]:
    """What is wrong for every tensor: dtype, rank, and the size of the dimension that others fix."""
    name = str(wrong).removeprefix("torch.")
    return [
        Bad(op, argument, to(wrong), (expected, name)),
        Bad(op, argument, lambda x: x[None], ("dimensions",), note="rank too high"),
        Bad(op, argument, lambda x: x[0], ("dimensions",), note="rank too low"),
        *(
            []
            if batch_dim is None
            else [Bad(op, argument, resize(batch_dim, 3), ("3",), named=r"\w+", note="one too many")]
        ),
    ]


def all_bad() -> list[Bad]:
    bad: list[Bad] = []
    for op in ("page_index", "page_scores", "topk_pages", "sparse_decode", "unique_decode"):
        bad += bad_tensor(op, "seq_lens", "int32", torch.int64, 0)
        bad += bad_tensor(op, "block_table", "int32", torch.int64, 0)
        bad += [Bad(op, "page_size", value(x), (f"got {x}",)) for x in (0, 3, 5, -4, 128)]
        if op not in ("topk_pages", "page_scores"):  # which do not see the block size
            bad += [Bad(op, "page_size", value(16), ("block size 8", "got 16"), note="more than a block")]
    for op in ("page_scores", "topk_pages", "sparse_decode", "unique_decode"):
        bad += [Bad(op, "window", value(-1), ("got -1",))]
    for op in ("page_index", "page_scores", "unique_decode"):
        bad += [Bad(op, "rule", value(x), ("mean", "directional", repr(x))) for x in ("quest", "", None, 2)]
        bad += [Bad(op, "index_format", value(x), ("exact, compressed", repr(x))) for x in ("packed", None, 1)]
        bad += [Bad(op, "index_format", value("compressed"), ("compressed", "size 16", "got 128"), named="index")]
        bad += bad_tensor(op, "index", "uint8", torch.int32, None)
        bad += [
            Bad(op, "index", lambda x: x[..., :-16].contiguous(), ("expected size 128", "got 112"), note="entry size"),
            Bad(op, "rule", value("unique"), ("expected size 80", "got 128"), named="index", note="of another rule"),
            Bad(op, "index", resize(1, 5), ("5",), named="index|q", note="five KV heads"),
            Bad(op, "index", lambda x: x.mT.contiguous().mT, ("stride",), note="byte stride"),
        ]
    for op in ("page_index", "unique_decode"):
        bad += [
            Bad(op, "index", resize(0, 2), ("got 2",), note="too few blocks"),
            Bad(op, "index", resize(2, 3), ("3",), note="pages of a block", named="index|page_size"),
        ]
    for op in ("page_scores", "sparse_decode", "unique_decode"):
        bad += bad_tensor(op, "q", "", torch.int32, None)
        bad += [Bad(op, "q", lambda x: x[0, 0, 0, 0], ("dimensions",), note="a number")]
        bad += [
            Bad(
                op,
                "q",
                lambda x: x.bfloat16(),
                named="index" if op == "page_scores" else "k_cache",
                note="mixed dtypes",
            ),
            Bad(op, "q", resize(2, 7), ("7", "query heads"), note="Hq no multiple of H"),
            Bad(op, "q", resize(2, 34), ("34", "16"), note="G is 17"),
            Bad(op, "q", lambda x: x[:, :, :1], ("1 query heads",), note="fewer heads than H"),
            Bad(op, "q", resize(1, 17), ("17", "16"), note="17 query tokens"),
            Bad(op, "q", lambda x: x[:, :0], ("got 0",), note="no query token"),
            Bad(op, "q", resize(3, 12), ("multiple of 8", "12"), note="D is 12"),
            Bad(op, "q", resize(3, 264), ("256", "264"), note="D is 264"),
            Bad(op, "q", resize(3, 24), named="index|k_cache|q", note="D of another cache"),
        ]
    for op in ("append_kv", "page_index", "sparse_decode", "unique_decode"):
        for name in ("k_cache", "v_cache"):
            if name == "v_cache" and op == "page_index":
                continue
            bad += bad_tensor(op, name, "", torch.int32, None)
            bad += [
                Bad(op, name, value(None), ("expected a tensor, got None",)),
                Bad(op, name, to(torch.float16), note="mixed dtypes", named="k_cache|v_cache|k|index"),
                Bad(op, name, widen_channels, ("channel stride 1",), note="channel stride 2"),
                Bad(op, name, odd_rows, ("stride",), note="rows not aligned"),
                Bad(op, name, resize(3, 20), ("20",), named="k_cache|v_cache|index|k|q", note="D is 20"),
            ]  # fmt: skip
        if op != "page_index":
            bad += [Bad(op, "v_cache", resize(dim, 3), ("3", "k_cache"), note=f"size {dim}") for dim in range(3)]
    for name in ("k", "v"):
        for op in ("append_kv", "unique_decode"):
            bad += bad_tensor(op, name, "float32", torch.float16, 0)
            bad += [
                Bad(op, name, resize(-2, 3), ("3",), note="heads", named="k|v"),
                Bad(op, name, resize(-1, 24), ("24",), note="head dimension", named="k|v"),
            ]
    bad += [
        *bad_tensor("append_kv", "slot_mapping", "int64", torch.int32, 0),
        Bad("append_kv", "slot_mapping", lambda x: x.repeat_interleave(2)[::2], ("contiguous",)),
        *bad_tensor("page_index", "start_lens", "int32", torch.int64, 0),
        Bad("page_index", "max_new_tokens", value(-1), ("got -1",)),
        *bad_tensor("topk_pages", "scores", "", torch.int32, 0),
        Bad("topk_pages", "scores", to(torch.float16), ("float16",)),
        Bad("topk_pages", "scores", lambda x: x.mT.contiguous().mT, ("contiguous", "strides")),
        Bad("topk_pages", "scores", resize(1, 17), ("17",), note="17 query tokens"),
        *bad_tensor("topk_pages", "budget_pages", "int32", torch.int64, 0),
        Bad("topk_pages", "block_table", lambda x: x[:, :3].contiguous(), ("16", "3 blocks")),
        Bad("topk_pages", "pages_per_block", value(0), ("got 0",)),
        *bad_tensor("unique_decode", "budget_pages", "int32", torch.int64, 0),
        *bad_tensor("unique_decode", "slot_mapping", "int64", torch.int32, 0),
        Bad("unique_decode", "slot_mapping", lambda x: x.repeat_interleave(2)[::2], ("contiguous",)),
        *bad_tensor("unique_decode", "out", "float32", torch.bfloat16, 0),
        Bad("unique_decode", "out", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), ("contiguous",)),
        *(
            Bad(op, name, value(bad), (f"got {bad}",))
            for op, name in (
                ("unique_decode", "scale"), ("sparse_decode", "scale"), ("unique_decode", "spread_weight"),
                ("page_scores", "spread_weight"),
            )
            for bad in (math.nan, math.inf)
        ),
        Bad("unique_decode", "index", lambda x: x[:1].expand_as(x), ("memory of its own", "strides")),
        Bad("page_index", "index", lambda x: x[:, :1].expand_as(x), ("memory of its own", "strides")),
        Bad("unique_decode", "out", lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape), ("16 bytes",)),
        *bad_tensor("sparse_decode", "pages", "int32", torch.int64, 0),
        Bad("sparse_decode", "pages", lambda x: x.mT.contiguous().mT, ("contiguous",)),
        Bad("sparse_decode", "pages", lambda x: x[..., :0], ("got 0",)),
        Bad("sparse_decode", "pages", resize(1, 3), ("3", "query tokens")),
        Bad("sparse_decode", "pages", resize(2, 3), ("3", "heads")),
        Bad("unique_decode", "k", value(None), ("k and v together",)),
        Bad("unique_decode", "v", value(None), ("k and v together",)),
        Bad("unique_decode", "k", resize(1, 3), ("3",), note="query tokens", named="k|v"),
    ]  # fmt: skip
    for op, name in (("topk_pages", "k"), ("unique_decode", "num_pages")):
        bad += [Bad(op, name, value(x), (f"got {x}",)) for x in (0, -3, 4097)]
        bad += [
            Bad(op, name, value(1), ("sink_pages + recent_pages = 2", "got 1")),
            Bad(op, "sink_pages", value(-1), ("got -1",)),
            Bad(op, "recent_pages", value(-1), ("got -1",)),
        ]
    return bad


def tensors_of(args: dict[str, Any]) -> dict[str, Tensor]:
    return {name: arg for name, arg in args.items() if isinstance(arg, Tensor)}


def assert_refused_by(call: Callable[..., Any], args: dict[str, Any], begins: str, words: tuple[str, ...]) -> None:
    """A ValueError whose message ``begins`` so and names the expectation and the value; every tensor is as it was."""
    before = {name: tensor.clone() for name, tensor in tensors_of(args).items()}
    with pytest.raises(ValueError, match=rf"^{begins}\b") as caught:
        call(**args)
    message = str(caught.value)
    assert re.search(r"expected .*\bgot\b", message, re.DOTALL), message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    for name, tensor in tensors_of(args).items():
        assert_same(tensor, before[name], name)


def assert_refused(op: str, args: dict[str, Any], named: str, words: tuple[str, ...]) -> None:
    assert_refused_by(getattr(ops, op), args, f"({op}: )?({named})", words)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", all_bad(), ids=str)
def test_is_refused(device: str, bad: Bad) -> None:
    args = arguments(bad.op, device)
    args[bad.argument] = bad.change(args.get(bad.argument))
    assert_refused(bad.op, args, bad.named or bad.argument, bad.words)


OPS = ["append_kv", "page_index", "page_scores", "topk_pages", "sparse_decode", "unique_decode"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_the_arguments_are_good_otherwise(device: str, op: str) -> None:
    getattr(ops, op)(**arguments(op, device))


@needs_cuda
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_two_devices_are_refused(op: str) -> None:
    names = list(tensors_of(arguments(op, "cuda")))
    for name in names:
        args = arguments(op, "cuda")
        args[name] = args[name].cpu()
        assert_refused(op, args, "|".join(names), ("device", "cpu", "cuda:0"))


@pytest.mark.parametrize("op", OPS)
def test_a_meta_tensor_among_others_is_refused(op: str) -> None:
    names = list(tensors_of(arguments(op, "cpu")))
    for name in names:
        args = arguments(op, "cpu")
        args[name] = args[name].to("meta")
        with pytest.raises(ValueError, match="device"):
            getattr(ops, op)(**args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["append_kv", "unique_decode"])
def test_caches_that_share_memory_are_not_written(op: str, device: str) -> None:
    args = arguments(op, device)
    assert_refused(op, {**args, "v_cache": args["k_cache"]}, "v_cache", ("memory of its own", "k_cache"))
    for name in ("k_cache", "v_cache"):
        for dim in range(3):
            shared = args[name].narrow(dim, 0, 1).expand_as(args[name])
            assert_refused(op, {**args, name: shared}, name, ("memory of its own for every token", "strides"))


@needs_cuda
@pytest.mark.parametrize("op", OPS)
def test_fp64_on_cuda_is_refused(op: str) -> None:
    args = arguments(op, "cuda")
    for name, tensor in tensors_of(args).items():
        if tensor.dtype == torch.float32:
            args[name] = tensor.double()
    assert_refused(op, args, "q|k_cache|scores", ("float64",))


def test_new_index_and_entry_size() -> None:
    cache = torch.zeros(3, 2, 8, 16)
    sizes = [{"page_size": x} for x in (3, 0, 16, 8.0, "8", True)]
    for wrong in ({"rule": "quest"}, *sizes):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected .* got "):
            ops.new_index(cache, **{"rule": "mean", "page_size": 4, **wrong})
    with pytest.raises(ValueError, match=r"^k_cache: expected 4 dimensions .* got \[2, 8, 16\]"):
        ops.new_index(cache[0], rule="mean", page_size=4)
    for bad, expected in ((cache.int(), "dtype"), (cache[..., :7], "a head dimension"), (cache[..., :0], "a head dim")):
        with pytest.raises(ValueError, match=f"^k_cache: expected {expected}"):
            ops.new_index(bad, rule="mean", page_size=4)
    with pytest.raises(ValueError, match=r"^rule: expected"):
        ops.index_entry_bytes("quest", 16, torch.float32)
    with pytest.raises(ValueError, match=r"^index_format: expected one of exact, compressed, got 'packed'"):
        ops.new_index(cache, rule="mean", page_size=4, index_format="packed")
    with pytest.raises(ValueError, match=r"^rule: expected .* for a compressed index, got 'minmax'"):
        ops.new_index(cache, rule="minmax", page_size=4, index_format="compressed")
    index = ops.new_index(cache, rule="mean", page_size=4, index_format="compressed")
    with pytest.raises(ValueError, match=r"^head_dim: expected"):
        ops.decode_index(index, rule="mean", dtype=torch.float32, index_format="compressed")


def test_the_library_refuses_formats_it_does_not_know() -> None:
    """What the wrappers never pass."""
    args = arguments("page_scores", "cpu")
    tensors = [args[name] for name in ("q", "index", "block_table", "seq_lens")]
    for rule, index_format, named in ((2, 2, "index_format"), (2, -1, "index_format"), (3, 1, "rule")):
        with pytest.raises(ValueError, match=rf"^page_scores: {named}: expected"):
            torch.ops.unique_attn.page_scores(*tensors, 4, rule, index_format, 0.0, 0)


# ---- Values: always on the CPU, with UNIQUE_ATTN_CHECK=1 on CUDA. ----

LENGTHS = [("seq_lens", (1,), bad) for bad in (-1, -(2**31), 65, 2**31 - 1)]
BLOCKS = [("block_table", place, bad) for place in ((0, 0), (0, 7), (1, 4)) for bad in (-1, 17, 2**30)]
VALUES = [
    *((op, *each) for op in OPS[1:] for each in LENGTHS),
    *((op, *each) for op in ("page_index", "page_scores", "sparse_decode", "unique_decode") for each in BLOCKS),
    *(("topk_pages", *each) for each in BLOCKS if each[2] != 17),  # it does not know how many there are
    *(("append_kv", "slot_mapping", (2,), bad) for bad in (15 * 8, 2**40, 2**63 - 1)),
    *(("unique_decode", "slot_mapping", (2,), bad) for bad in (0, 2**40, 2**63 - 1)),
    *(("sparse_decode", "pages", (1, 0, 1, 2), bad) for bad in (16, 2**31 - 1)),
    *(("page_index", "start_lens", (1,), bad) for bad in (-1, -(2**31), 39, 2**31 - 1)),
]


def look_at_values(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the CPU always does."""
    monkeypatch.setenv("UNIQUE_ATTN_CHECK", "0" if device == "cpu" else "1")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "name", "place", "bad"), VALUES)
def test_the_first_bad_value_is_named(
    device: str, op: str, name: str, place: tuple[int, ...], bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_values(device, monkeypatch)
    args = arguments(op, device)
    args[name][place] = bad
    where = ", ".join(str(i) for i in place)
    flat = sum(i * s for i, s in zip(place, args[name].stride(), strict=True))
    assert_refused(op, args, name, (f"got {bad}",))
    with pytest.raises(ValueError, match=rf"at (\[{where}\]|flat position {flat})$"):
        getattr(ops, op)(**args)


@pytest.mark.parametrize("device", DEVICES)
def test_more_new_tokens_than_told_are_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look_at_values(device, monkeypatch)
    args = {**arguments("page_index", device), "max_new_tokens": 60}
    assert_refused("page_index", args, "start_lens", ("max_new_tokens = 60", "got 0 for a length of 61 at [0]"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_good_values_are_accepted(device: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Junk past the end of a sequence, -1 in pages and negative slots are good; results are the same."""
    expected = getattr(ops, op)(**arguments(op, device))
    monkeypatch.setenv("UNIQUE_ATTN_CHECK", "1")
    got = getattr(ops, op)(**arguments(op, device))
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs if op not in ("append_kv", "page_index", "topk_pages") else []:
        assert_same(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["page_scores", "topk_pages", "sparse_decode", "unique_decode"])
def test_what_a_window_left_behind_may_be_gone(device: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 tokens: with a window of 20 the two queries of 61 tokens see from 40 on, block 5."""
    look_at_values(device, monkeypatch)
    args = {**arguments(op, device), "window": 20}
    args["block_table"][0, :5] = -1
    getattr(ops, op)(**args)
    args["block_table"][0, 5] = -1
    assert_refused(op, args, "block_table", ("got -1 at [0, 5]",))


@pytest.mark.parametrize("device", DEVICES)
def test_old_blocks_may_be_gone_where_only_new_ones_are_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look_at_values(device, monkeypatch)
    args = arguments("page_index", device)
    args["start_lens"] = args["seq_lens"] - 3  # 58, in the last block of the first sequence
    args["block_table"][0, :7] = -1
    ops.page_index(**args)
    args["block_table"][0, 7] = -1
    assert_refused("page_index", args, "block_table", ("got -1 at [0, 7]",))


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_that_are_no_error(device: str) -> None:
    """Scales and spreads are any finite numbers."""
    args = arguments("sparse_decode", device)
    assert ops.sparse_decode(**args, scale=-2.0)[0].isfinite().all()
    args = arguments("page_scores", device)
    assert ops.page_scores(**args, spread_weight=-1.0).shape == (2, 2, 2, args["block_table"].shape[1] * 2)
