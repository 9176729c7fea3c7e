"""What PyTorch asks of an operator: opcheck, torch.compile without graph breaks or recompilation, honest autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_cases import DEVICES, INDEXES, Case, Spec, assert_same, build, step
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from unique_attn import ops

OPS = [
    "append_kv",
    "page_index",
    "page_scores",
    "topk_pages",
    "sparse_decode",
    "unique_decode",
    "block_sparse_attention",
    "composite_blocks",
    "select_blocks",
    "unique_prefill",
]
SPEC = Spec((61, 38), num_tokens=2, group=3, page_size=8, dtype=torch.bfloat16)


def finite_case(device: str, rule: str = "directional", index_format: str = "exact") -> Case:
    """A case without NaN, which opcheck cannot compare."""
    case = build(replace(SPEC, rule=rule, index_format=index_format), device)
    for tensor in (case.k_cache, case.v_cache):
        tensor.nan_to_num_(0.0)
    case.index[case.index == 0xFF] = 0
    return case


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """Each op on ``case`` through its Python function; tensors are read from ``case`` at call time."""
    selected = torch.tensor([0, 2, 4, -1], dtype=torch.int32, device=case.q.device).expand(2, 2, 2, 4).contiguous()
    scores = torch.randn(2, 2, 2, 9, generator=torch.Generator().manual_seed(1)).to(case.q.device)
    slots = torch.tensor([3, 60, -1, 17], device=case.q.device)
    starts = torch.zeros_like(case.seq_lens)
    budget = torch.tensor([4, 3], dtype=torch.int32, device=case.q.device)
    table = {"block_table": case.block_table, "seq_lens": case.seq_lens}
    k, v = case.k.flatten(0, 1), case.v.flatten(0, 1)
    caches = (case.k_cache, case.v_cache)
    bounds = (torch.tensor([0, 3, 4], dtype=torch.int32, device=case.q.device),) * 2
    q, shares = case.q.flatten(0, 1), scores[:, :, 0, :1].contiguous()
    return {
        "append_kv": lambda: ops.append_kv(k, v, *caches, slots),
        "page_index": lambda: ops.page_index(
            case.k_cache, case.index, start_lens=starts, max_new_tokens=61, **table, **case.paging
        ),
        "page_scores": lambda: ops.page_scores(case.q, case.index, **table, **case.paging),
        "topk_pages": lambda: ops.topk_pages(scores, case.seq_lens, 4, page_size=8, budget_pages=budget),
        "sparse_decode": lambda: ops.sparse_decode(case.q, *caches, selected, **table, page_size=8, window=40),
        "unique_decode": lambda: step(case, 4, budget_pages=budget),
        "block_sparse_attention": lambda: ops.block_sparse_attention(
            q, k, v, *bounds, 3, ops.pack_block_mask(torch.ones_like(slots[:2]).bool().view(2, 1, 1))
        ),
        "composite_blocks": lambda: ops.composite_blocks(q, k, *bounds, 3, 3, method="unisparse"),
        "select_blocks": lambda: ops.select_blocks(shares, *bounds, top_p=0.9),
        "unique_prefill": lambda: ops.unique_prefill(q, k, v, *bounds, 3, 3, threshold=0.1, max_blocks=9),
    }


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The arguments with which an op of this library was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unique_attn":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(device: str, name: str) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch, with what the Python function passes."""
    case = finite_case(device)
    with Recorder() as recorder:
        calls(case)[name]()
    (func, args, kwargs), = recorder.calls  # fmt: skip
    assert func is getattr(torch.ops.unique_attn, name).default
    result = torch.library.opcheck(func, args, kwargs)
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_with_optional_arguments() -> None:
    case = finite_case("cpu")
    with Recorder() as recorder:
        step(case, 4, new_keys=False, window=30)
        step(case, 4, out=torch.empty_like(case.q))
        ops.topk_pages(
            torch.randn(2, 2, 2, 8), case.seq_lens, 4, page_size=8, block_table=case.block_table, pages_per_block=2
        )
        for rule, index_format in INDEXES:
            case = finite_case("cpu", rule, index_format)
            step(case, 4)
            calls(case)["page_index"]()
            calls(case)["page_scores"]()
    for func, args, kwargs in recorder.calls:
        stored = func is torch.ops.unique_attn.unique_decode.stored
        tests = ["test_schema", "test_faketensor"] + [
            "test_autograd_registration",
            "test_aot_dispatch_dynamic",
        ] * stored
        assert set(torch.library.opcheck(func, args, kwargs, test_utils=tests).values()) == {"SUCCESS"}


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_compiles_without_a_graph_break(device: str, name: str) -> None:
    torch._dynamo.reset()
    eager, compiled = finite_case(device), finite_case(device)
    expected = calls(eager)[name]()
    got = torch.compile(calls(compiled)[name], fullgraph=True, backend="aot_eager")()
    for a, b in zip(outputs(got), outputs(expected), strict=True):
        assert_same(a, b)
    for field in ("k_cache", "v_cache", "index"):
        assert_same(getattr(compiled, field), getattr(eager, field), field)


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor, table: Tensor, lens: Tensor
) -> Tensor:
    """A step inside other computation, as in a model."""
    out, lse, _ = ops.unique_decode(
        q * 2, k + 1, v, k_cache, v_cache, index, table, lens, 3, rule="unique", page_size=4
    )
    return out.relu() + lse[..., None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_lengths_change_without_recompilation(device: str, backend: str) -> None:
    """Lengths and tables are values on the device: one graph serves every step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(decode_step, fullgraph=True, backend=counter)
    eager_case = build(Spec((61, 38), rule="unique", page_size=4), device)
    compiled_case = eager_case.clone()
    for n in (1, 4, 5, 8, 9, 12, 13, 40, 61):
        lens = torch.tensor([n, max(0, n - 23)], dtype=torch.int32, device=device)
        results = []
        for case, function in ((eager_case, decode_step), (compiled_case, compiled)):
            state = (case.k_cache, case.v_cache, case.index, case.block_table, lens)
            results.append(function(case.q, case.k, case.v, *state))
        torch.testing.assert_close(results[1], results[0])
        assert_same(compiled_case.k_cache, eager_case.k_cache)
        assert_same(compiled_case.index, eager_case.index)
    assert counter.frame_count == 1


def prefill_step(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """A prompt inside other computation, by the three ops and by the one."""
    bounds, q = (cu_seqlens_q, cu_seqlens_k), q * 2
    mask, _ = ops.select_blocks(ops.composite_blocks(q, k, *bounds, 512, 1024), *bounds, threshold=0.05)
    out, _ = ops.block_sparse_attention(q, k, v, *bounds, 512, mask)
    same, lse, _, _ = ops.unique_prefill(q, k, v, *bounds, 512, 1024, threshold=0.05)
    return out + same + lse[..., None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_prompts_change_without_recompilation(device: str, backend: str) -> None:
    """Bounds are values on the device, and tokens a dynamic dimension: one graph for prompts and chunks of all
    lengths, as long as the upper bounds, which are numbers of the host, stay."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(prefill_step, fullgraph=True, backend=counter)
    for chunks in (((300, 700), (65, 65)), ((512, 512), (1, 1)), ((9, 1000), (129, 131)), ((3, 3), (40, 44))):
        queries, keys = (torch.tensor([0, a, a + b]) for a, b in zip(*chunks, strict=True))
        q, k, v = (
            torch.randn(int(bounds[-1]), heads, 16, device=device)
            for bounds, heads in ((queries, 6), (keys, 3), (keys, 3))
        )
        for tensor in (q, k, v):
            torch._dynamo.mark_dynamic(tensor, 0)
        args = (q, k, v, queries.int().to(device), keys.int().to(device))
        torch.testing.assert_close(compiled(*args), prefill_step(*args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["page_scores", "sparse_decode", "block_sparse_attention", "composite_blocks", "unique_prefill"]
)
def test_backward_says_that_there_is_none(device: str, name: str) -> None:
    case = finite_case(device)
    case.q.requires_grad_()
    result = outputs(calls(case)[name]())[0]
    with pytest.raises(ops.NotDifferentiableError, match=f"unique_attn::{name} .*has no gradient.*torch.no_grad"):
        result.float().sum().backward()
    with torch.no_grad():
        assert not outputs(calls(case)[name]())[0].requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("append_kv", "k"),
        ("append_kv", "v_cache"),
        ("page_index", "k_cache"),
        ("unique_decode", "q"),
        ("unique_decode", "v"),
    ],
)
def test_writing_ops_refuse_gradients(device: str, name: str, field: str) -> None:
    case = finite_case(device)
    before = case.clone()
    getattr(case, field).requires_grad_()
    with pytest.raises(ops.NotDifferentiableError, match=f"^{field} requires grad.*unique_attn::{name}"):
        calls(case)[name]()
    for other in ("k_cache", "v_cache", "index"):
        assert_same(getattr(case, other).detach(), getattr(before, other), other)
    with torch.no_grad():
        calls(case)[name]()
