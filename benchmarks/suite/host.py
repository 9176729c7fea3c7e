"""Time of the host: what a decode op takes until its kernels are in the queue, and what it asks of the CUDA runtime."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure.harness import Call
from benchmarks.measure.text_table import text_table
from benchmarks.suite.decode import Step
from examples.support.results import environment

COMMITTED = {"cuda": [["--repeats", "100"]]}
# Kernels that take less than their launches: what is timed is the host.
SHAPE = {
    "batch": 2, "context": 4096, "table": 0, "heads": "32/8", "head_dim": 128, "page_size": 8, "block_size": 64,
    "budget": 512, "rule": "directional", "index_format": "exact", "dtype": "bf16",
}  # fmt: skip
CALLS = 40  # of a round: their launches fit into the queue


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


class _Recorder(TorchDispatchMode):
    """The op that a Python function calls, with its arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unique_attn":
            self.call = (func, args)
        return func(*args, **(kwargs or {}))


def op_of(run: Call) -> Call:
    """The op that ``run`` calls, with arguments that are ready."""
    with _Recorder() as recorder:
        run()
    op, args = recorder.call
    return lambda: op(*args)


def runtime_calls(run: Call) -> Counter[str]:
    """Calls of the CUDA runtime during ``run``, by name, that ``torch.profiler`` records: all but ``cudaGetDevice`` and
    a few as small."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    names = Counter(event.name for event in profile.events() if event.name.startswith("cuda"))
    del names["cudaDeviceSynchronize"]  # the profiler's own, at its end
    return names


def _microseconds(runs: Mapping[str, Call], rounds: int, wait: Callable[[], None]) -> dict[str, list[float]]:
    """Of each run, in turn, round after round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            elapsed = time.perf_counter() - start
            if i >= 3:
                found[name].append(1e6 * elapsed / CALLS)
    return found


def _summary(values: Sequence[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    return {
        "median_us": round(statistics.median(values), 2),
        "p10_us": round(tenths[0], 2),
        "p90_us": round(tenths[-1], 2),
        "best_us": round(min(values), 2),
    }


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    step = Step(argparse.Namespace(**SHAPE), device)
    ours: dict[str, Call] = {"unique_decode": lambda: step.unique(0)}
    ours |= {name: side.calls[0] for name, side in step.parts().items()}
    x = step.queries[0].transpose(1, 2)
    yardsticks: dict[str, Call] = {
        "torch.empty": lambda: torch.empty(8, device=device),
        "scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    }
    op_names = {name: f"{name}, op alone" for name in ours}
    runs = {**ours, **{op_names[name]: op_of(call) for name, call in ours.items()}, **yardsticks}
    cuda = device.type == "cuda"
    found = _microseconds(runs, options.repeats, lambda: torch.cuda.synchronize(device) if cuda else None)
    cases = []
    for name, call in {**ours, **yardsticks}.items():
        case: dict[str, Any] = {"call": name, **_summary(found[name])}
        if name in op_names:
            case["op_alone"] = _summary(found[op_names[name]])
        if cuda:
            runtime_calls(call)  # the profiler's first use makes calls of its own
            case["runtime_calls"] = dict(runtime_calls(call))
        cases.append(case)
    facts = environment(device)
    return {"bench": "host", "environment": facts, "options": SHAPE, "calls_per_round": CALLS, "cases": cases}


def report(result: dict[str, Any]) -> str:
    rows = [
        {
            "call": case["call"],
            "us": f"{case['median_us']:.1f}",
            "10th": f"{case['p10_us']:.1f}",
            "90th": f"{case['p90_us']:.1f}",
            "op alone": f"{case['op_alone']['median_us']:.1f}" if "op_alone" in case else "",
            "CUDA runtime": ", ".join(f"{count} {name}" for name, count in case.get("runtime_calls", {}).items()),
        }
        for case in result["cases"]
    ]
    e = result["environment"]
    where = f"{e['device']}, {e['cpu']}, torch {e['torch']}, Python {e['python']}; microseconds of the host, medians"
    return "\n".join([where, "", *text_table(rows, left=["call", "CUDA runtime"])])
