"""What every benchmark shares: cold caches, fair timing, bandwidth ceilings, facts about the machine, JSON.

A benchmark gives named callables to :func:`measure`. They run in turn, round after round, with the caches flushed
before each call, so that a slow moment of the machine meets all of them. Medians are what counts.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unique_attn._version import __version__

GB = 1e9
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---- Timing. ----


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all rounds."""

    median: float
    p10: float
    p90: float
    best: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            p10=ordered[round(0.1 * last)],
            p90=ordered[round(0.9 * last)],
            best=ordered[0],
            rounds=len(ordered),
        )

    def to_json(self) -> dict[str, float | int]:
        seconds = {"median_ms": self.median, "p10_ms": self.p10, "p90_ms": self.p90, "best_ms": self.best}
        return {**{name: round(1e3 * value, 5) for name, value in seconds.items()}, "rounds": self.rounds}


class ColdCache:
    """Evicts the data caches by rewriting a buffer that is several times their size."""

    def __init__(self, device: torch.device) -> None:
        size = 256 << 20 if device.type == "cuda" else max(256 << 20, 4 * _last_level_cache_bytes())
        self.buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        return self.buffer.numel() * self.buffer.itemsize

    def flush(self) -> None:
        self.buffer.add_(1)


def _last_level_cache_bytes() -> int:
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


def measure(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, warmup: int = 3
) -> dict[str, Timing]:
    """Time each callable ``rounds`` times, in turn, with cold caches.

    On CUDA a call is captured in a graph once and replayed between two events, so that launches do not count.
    """
    cold = ColdCache(device)
    runs = {name: _graphed(run) if device.type == "cuda" else run for name, run in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            cold.flush()
            elapsed = _time_cuda(run) if device.type == "cuda" else _time_cpu(run)
            if i >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _time_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_cuda(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _graphed(run: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ---- The ceiling. ----


def bandwidth(device: torch.device, *, rounds: int = 15, size: int | None = None) -> dict[str, Any]:
    """The fastest that plain PyTorch moves memory here, in GB/s: the best of copying and summing a large buffer.

    Counts bytes read plus bytes written. It is the yardstick of every floor in a benchmark's result.
    """
    size = size or (1 << 30 if device.type == "cuda" else 512 << 20)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: target.copy_(source), 2 * size),
        "sum": (lambda: source.sum(), size),
    }
    if device.type == "cpu":  # one thread's sum may be bound by arithmetic
        ways["dot"] = (lambda: torch.dot(source, target), 2 * size)
    target.copy_(source)
    timings = measure({name: run for name, (run, _) in ways.items()}, device, rounds=rounds)
    rates = {name: ways[name][1] / timing.median / GB for name, timing in timings.items()}
    best = max(rates, key=lambda name: rates[name])
    return {"gb_per_s": round(rates[best], 2), "way": best, "all": {name: round(r, 2) for name, r in rates.items()}}


# ---- Facts and files. ----


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a number: machine, threads, versions, commit, date. No paths, no host names."""
    build = json.loads(torch.ops.unique_attn.build_info())
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpu": _cpu_model(),
        "cpu_isa": build.get("cpu_isa"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "unique_attn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["cuda_archs"] = build.get("cuda_archs")
    return facts


def _output(*command: str) -> str | None:
    try:
        root = Path(__file__).resolve().parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """The commit of the source tree, with ``+changes`` if code or tests differ from it; None outside a repository.

    ``UNIQUE_ATTN_COMMIT`` names it where the tree was copied without its history.
    """
    named = os.environ.get("UNIQUE_ATTN_COMMIT")
    if named:
        return named
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "..", "../../csrc")
    return f"{commit}+changes" if changed else commit


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write a result, one indented JSON file, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
