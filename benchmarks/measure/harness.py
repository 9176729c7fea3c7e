"""What every benchmark shares: cold caches, fair timing, outputs checked before they are timed, JSON.

:func:`measure` times named callables; :func:`compare` does the same for :class:`Side` s, after their outputs were
overwritten with rubbish, computed anew and checked. Sides run in turn, round after round, so that a slow moment of the
machine meets all of them. Medians are what counts.

Caches are flushed before everything that is timed. On the CPU that is one call. On CUDA it is a graph, replayed between
two events, of one call for each input set of a side, so that launches do not count; if the sets together are
``ROTATED`` times as large as the last-level cache, the graph goes through them until it takes ``REPLAY`` seconds.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure.machine import cache_bytes

GB = 1e9
ROTATED = 4  # at random replacement, 2% of a cyclic walk over this many times the cache would hit
REPLAY = 2e-4  # seconds: an event's resolution and a graph's start are lost in it
MAX_CYCLES = 64
MAX_SETS = 64
MIN_ROUNDS = 5

Call = Callable[[], Any]


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
    """Evicts the data caches by going through a buffer that is several times their size: rewriting it on the CPU,
    reading it on CUDA, where lines that must be written back first would cost the next call bandwidth."""

    def __init__(self, device: torch.device) -> None:
        size = max(256 << 20, ROTATED * cache_bytes(device))
        self.buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        return self.buffer.numel() * self.buffer.itemsize

    def flush(self) -> None:
        if self.buffer.is_cuda:
            self.buffer.sum()
        else:
            self.buffer.add_(1)


@dataclass
class Side:
    """One way to compute what a benchmark computes.

    Attributes:
        calls: one for each input set; returns the tensors that it wrote.
        bytes: what a call must move.
        check: raises AssertionError when the outputs of input set i are wrong.
    """

    calls: Sequence[Call]
    bytes: int = 0
    check: Callable[[int, Any], object] | None = None

    def rotates(self, device: torch.device) -> bool:
        """Whether going through the input sets leaves nothing of them in the cache."""
        return len(self.calls) * self.bytes >= 0.75 * ROTATED * cache_bytes(device)


def sets_needed(size: int, device: torch.device, at_most: int = MAX_SETS) -> int:
    """Input sets of ``size`` bytes each until they rotate; 1 on the CPU, where caches are flushed."""
    if device.type == "cpu":
        return 1
    return max(1, min(at_most, math.ceil(ROTATED * cache_bytes(device) / size)))


@dataclass
class _Prepared:
    """A side as it is timed: ``run`` makes ``calls`` calls."""

    run: Call
    calls: int
    outputs: list[Any] = field(default_factory=list)
    seconds: float = 0.0  # of one run, roughly


def _prepare(side: Side, device: torch.device) -> _Prepared:
    if device.type == "cpu":
        return _Prepared(_in_turn(side.calls), 1)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for i in range(max(3, min(len(side.calls), 8))):
            side.calls[i % len(side.calls)]()
    torch.cuda.current_stream(device).wait_stream(stream)
    prepared = _capture(side.calls, 1, device)
    if side.rotates(device) and prepared.seconds < REPLAY:
        cycles = min(MAX_CYCLES, math.ceil(REPLAY / max(prepared.seconds, 1e-7)))
        prepared = _capture(side.calls, cycles, device)
    return prepared


def _capture(calls: Sequence[Call], cycles: int, device: torch.device) -> _Prepared:
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for cycle in range(cycles):
            for call in calls:
                written = call()
                if cycle == 0:
                    outputs.append(written)
                del written
    graph.replay()
    torch.cuda.synchronize(device)
    return _Prepared(graph.replay, cycles * len(calls), outputs, time_cuda(graph.replay))


def _in_turn(calls: Sequence[Call]) -> Call:
    count = 0

    def run() -> Any:
        nonlocal count
        count += 1
        return calls[(count - 1) % len(calls)]()

    return run


def time_cpu(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_cuda(run: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _rounds(
    prepared: Mapping[str, _Prepared], device: torch.device, rounds: int, warmup: int, *, launches: bool = False
) -> dict[str, Timing]:
    """Time every side once a round. ``launches``: from an idle device, so that launching counts."""
    cold = ColdCache(device)
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for i in range(warmup + rounds):
        for name, side in prepared.items():
            cold.flush()  # on CUDA it also keeps the device busy until the replay is in its queue
            if launches and device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed = time_cuda(side.run) if device.type == "cuda" else time_cpu(side.run)
            if i >= warmup:
                seconds[name].append(elapsed / side.calls)
    return {name: Timing.of(values) for name, values in seconds.items()}


def measure(candidates: Mapping[str, Call], device: torch.device, *, rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """Time each callable ``rounds`` times, in turn, with the caches flushed before every call."""
    prepared = {name: _prepare(Side([run]), device) for name, run in candidates.items()}
    return _rounds(prepared, device, rounds, warmup)


# ---- Checked sides. ----


@dataclass
class Compared:
    """What :func:`compare` found: timings of the sides that are right, reasons of the others."""

    timings: dict[str, Timing]
    failed: dict[str, str]
    launched: dict[str, Timing] = field(default_factory=dict)
    launched_failed: dict[str, str] = field(default_factory=dict)


def poison(outputs: Any) -> None:
    """Overwrite tensors, nested in any way, with values that no benchmark expects."""
    if isinstance(outputs, torch.Tensor):
        outputs.fill_(math.nan if outputs.is_floating_point() else 255 if outputs.dtype == torch.uint8 else -77)
    elif isinstance(outputs, (tuple, list)):
        for each in outputs:
            poison(each)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, memory comes with NaN or the largest integer in it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = importlib.import_module("torch.utils.deterministic")  # its attribute is a property of the module
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _checked_eagerly(side: Side, device: torch.device) -> None:
    with poisoned_allocations(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peers that have no deterministic implementation
        outputs = side.calls[0]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if side.check is not None:
        side.check(0, outputs)


def compare(
    sides: Mapping[str, Side],
    device: torch.device,
    *,
    rounds: int,
    seconds: float = math.inf,
    launches: bool = False,
) -> Compared:
    """Check every side, then time those that are right, in turn.

    A side is called once eagerly, into memory full of NaN, and checked. On CUDA what is replayed is checked too: its
    outputs are overwritten, the graph replayed, the first and the last of them checked.

    Args:
        sides: by name.
        device: where they run.
        rounds: timed rounds.
        seconds: device time after which there are fewer, at least five, rounds.
        launches: also time single calls from an idle device, launching included.

    Returns:
        Timings of the right sides; for the others (wrong, or raising) the reason.
    """
    found = Compared({}, {})
    prepared: dict[str, _Prepared] = {}
    for name, side in sides.items():
        try:
            _checked_eagerly(side, device)
        except Exception as error:  # peers raise what they like
            found.failed[name] = found.launched_failed[name] = reason(error)
            continue
        try:
            prepared[name] = _prepare(side, device)
            if device.type == "cuda" and side.check is not None:
                outputs = prepared[name].outputs
                poison(outputs)
                prepared[name].run()
                torch.cuda.synchronize(device)
                for i in sorted({0, len(outputs) - 1}):
                    side.check(i, outputs[i])
        except Exception as error:
            prepared.pop(name, None)
            found.failed[name] = f"in a CUDA graph: {reason(error)}" if device.type == "cuda" else reason(error)
    if prepared:
        planned = sum(side.seconds for side in prepared.values())
        if planned > 0:
            rounds = int(min(rounds, max(MIN_ROUNDS, seconds / planned)))
        found.timings = _rounds(prepared, device, rounds, 2)
    if launches and device.type == "cuda":
        eager = {
            name: _Prepared(_in_turn(side.calls), 1)
            for name, side in sides.items()
            if name not in found.launched_failed
        }
        found.launched = _rounds(eager, device, max(rounds, 20), 5, launches=True)
    return found


# ---- Results. ----


def row(timing: Timing, size: int, ceiling: Mapping[str, Any]) -> dict[str, Any]:
    """A timing beside the fewest bytes it must move and the time that those take at the ceiling."""
    floor = size / (ceiling["gb_per_s"] * GB)
    return {
        **timing.to_json(),
        "bytes": size,
        "gb_per_s": round(size / timing.median / GB, 2),
        "floor_ms": round(1e3 * floor, 5),
        "times_floor": round(timing.median / floor, 2),
        "percent_of_ceiling": round(100 * floor / timing.median, 1),
    }


def outcome(found: Compared, name: str, size: int, ceiling: Mapping[str, Any]) -> dict[str, Any]:
    """A side's :func:`row`, and how long a launched call takes if that was measured; or why there is none."""
    if name not in found.timings:
        return {"failed": found.failed[name]}
    launched = {"launched": found.launched[name].to_json()} if name in found.launched else {}
    return {**row(found.timings[name], size, ceiling), **launched}


def best_of(found: Compared, names: Sequence[str], size: int, ceiling: Mapping[str, Any]) -> dict[str, Any]:
    """The fastest of several ways, by name, beside all of them; what failed and why if none is left."""
    ways = {name: outcome(found, name, size, ceiling) for name in names}
    timed = [name for name in names if name in found.timings]
    if not timed:
        return {"failed": "; ".join(f"{name}: {way['failed']}" for name, way in ways.items()), "ways": ways}
    best = min(timed, key=lambda name: found.timings[name].median)
    return {"way": best, **row(found.timings[best], size, ceiling), "ways": ways}


def ratio(of: Mapping[str, Any], to: Mapping[str, Any]) -> float | None:
    """Medians of two rows, the first divided by the second; None if one of them is missing."""
    if "median_ms" not in of or "median_ms" not in to:
        return None
    return round(of["median_ms"] / to["median_ms"], 3)
