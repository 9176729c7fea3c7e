"""What a decode op does on the host beside its work: asked of what can be counted, not of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import Case, Spec, build, needs_cuda, step

from benchmarks import cli
from benchmarks.suite.host import op_of, runtime_calls
from unique_attn import ops

NAMES = ["append_kv", "page_index", "page_scores", "topk_pages", "sparse_decode", "unique_decode"]


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """Each decode op on ``case``, with results that are not looked at."""
    device, batch = case.q.device, case.q.shape[0]
    slots = torch.arange(case.k.shape[0] * case.k.shape[1], device=device)
    starts = torch.zeros_like(case.seq_lens)
    k, v = case.k.flatten(0, 1), case.v.flatten(0, 1)
    caches = (case.k_cache, case.v_cache)
    table = {"block_table": case.block_table, "seq_lens": case.seq_lens}
    scores = torch.zeros(batch, 1, 2, case.block_table.shape[1] * case.index.shape[2], device=device)
    pages = torch.arange(4, dtype=torch.int32, device=device).expand(batch, 1, 2, 4).contiguous()
    size = {"page_size": case.paging["page_size"]}
    return {
        "append_kv": lambda: ops.append_kv(k, v, *caches, slots),
        "page_index": lambda: ops.page_index(
            case.k_cache, case.index, start_lens=starts, max_new_tokens=300, **table, **case.paging
        ),
        "page_scores": lambda: ops.page_scores(case.q, case.index, **table, **case.paging),
        "topk_pages": lambda: ops.topk_pages(scores, case.seq_lens, 4, **size),
        "sparse_decode": lambda: ops.sparse_decode(case.q, *caches, pages, **table, **size),
        "unique_decode": lambda: step(case, 4),
    }


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_is_asked_for_launches_alone(name: str, dtype: torch.dtype) -> None:
    """What does not change between two calls is asked for, and said, once."""
    case = build(Spec((300, 9), 1, 2, 4, 64, 8, dtype=dtype), "cuda")
    run = calls(case)[name]
    for _ in range(2):  # the first call of a kernel on a device, and the profiler's first use, make calls of their own
        runtime_calls(run)
    found = runtime_calls(run)
    launches = sum(count for call, count in found.items() if call.startswith("cudaLaunchKernel"))
    assert 1 <= launches <= (5 if name == "unique_decode" else 2)
    assert launches == sum(found.values()), dict(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_dispatcher_stays_out_of_python(name: str) -> None:
    """A formula that is registered from Python would be called by every call, gradients or not."""
    registered = torch._C._dispatch_dump(f"unique_attn::{name}")
    assert "CPU" in registered
    kernels = [line for line in registered.splitlines() if line.startswith("Autograd")]
    assert not kernels, registered


def test_the_recorded_op_is_the_call() -> None:
    case = build(Spec((300, 9), 1, 2, 4, 64, 8), "cpu")
    run = calls(case)["page_scores"]
    assert torch.equal(op_of(run)(), run())


def test_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    result = cli.run("host", device="cpu", repeats=1)
    assert {case["call"] for case in result["cases"]} > {"unique_decode", "page_scores", "topk_pages", "sparse_decode"}
    assert all(case["median_us"] > 0 for case in result["cases"])
    cli.module("host").report(result)
