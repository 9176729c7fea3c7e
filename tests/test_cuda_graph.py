"""One decode step is captured once in a CUDA graph and replayed while everything on the device changes."""

from __future__ import annotations

import pytest
import torch
from op_cases import CUDA_DTYPES, INDEXES, Case, Spec, assert_same, assert_step, build, needs_cuda, step

pytestmark = needs_cuda


def grow(case: Case, n: int, ages: tuple[int, ...]) -> None:
    """Put the inputs of step ``n`` into the static tensors of ``case``."""
    random = torch.Generator().manual_seed(n)
    case.seq_lens.copy_(torch.tensor([max(0, n - age) for age in ages], dtype=torch.int32))
    for tensor in (case.q, case.k, case.v):
        tensor.copy_(torch.randn(tensor.shape, generator=random))


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "index_format"), INDEXES)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_replays_equal_eager_while_lengths_grow(
    rule: str, index_format: str, dtype: torch.dtype, num_tokens: int
) -> None:
    """Over every page (4), block (8) and budget (16 tokens) border up to 77 tokens, with a budget on the device."""
    ages = (0, 20, 70)
    spec = Spec((77, 57, 7), num_tokens, 2, 3, 64, 4, 2, dtype=dtype, rule=rule, index_format=index_format)
    static = build(spec, "cuda")
    for tensor in (static.k_cache, static.v_cache):
        tensor.fill_(torch.nan)
    budget = torch.full((3,), 4, dtype=torch.int32, device="cuda")
    eager = static.clone()

    warm = static.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        grow(warm, 1, ages)
        step(warm, 4, budget_pages=budget)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static, 4, budget_pages=budget)

    for n in range(1, 78):
        budget.copy_(torch.tensor([4, 2 + n % 3, 4]))
        grow(static, n, ages)
        grow(eager, n, ages)
        before = eager.clone() if n in (8, 33, 77) else None
        for tensor in captured:
            tensor.fill_(-77)
        graph.replay()
        expected = step(eager, 4, budget_pages=budget)
        for name, got, wanted in zip(("out", "lse", "pages"), captured, expected, strict=True):
            assert_same(got, wanted, f"{name} at {n} tokens")
        for name in ("k_cache", "v_cache", "index"):
            assert_same(getattr(static, name), getattr(eager, name), f"{name} at {n} tokens")
        if before is not None:
            assert_step(before, eager, expected, 4, budget_pages=budget)


def test_a_step_does_not_synchronise() -> None:
    case = build(Spec((300, 9), 1, 2, 4, 64, 8, dtype=torch.bfloat16), "cuda")
    step(case, 8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream() -> None:
    """The step waits for its inputs on the stream that it is called on, and only there."""
    case = build(Spec((3000,), 1, 2, 4, 64, 8, dtype=torch.bfloat16), "cuda")
    expected = step(case.clone(), 32)
    q = case.q.clone()
    case.q.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        case.q.copy_(q)
        result = step(case, 32)
    stream.synchronize()
    for got, wanted in zip(result, expected, strict=True):
        assert_same(got, wanted)
