"""Charts of results on GPUs: speed against context, latency of one sequence, time beside the floor of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure.machine import slug
from benchmarks.report import plots

Result = Mapping[str, Any]
BASE = {"head_dim": 128, "page_size": 8}  # of the charts over contexts
PEERS = {"flashinfer": "FlashInfer, dense", "sdpa": "SDPA, dense"}
OPS = {"scores": ("page_scores", "ours"), "attention": ("sparse_decode", "ours"), "index": ("page_index", "ours")}


@dataclass(frozen=True)
class Figure:
    """One picture: what it shows of which device, and its numbers."""

    name: str
    title: str
    device: str
    subtitle: str
    data: Mapping[str, Any]


def figures(results: Sequence[Result]) -> dict[str, Figure]:
    """Every chart that the results allow, by file name."""
    found: dict[str, Figure] = {}
    sweeps = [r for r in results if r["bench"] in ("decode", *OPS) and "cases" in r]
    for device in dict.fromkeys(r["environment"]["device"] for r in sweeps):
        if device == "cpu":
            continue
        mine = [r for r in sweeps if r["environment"]["device"] == device]
        for figure in (_speed(mine, device), _latency(mine, device), _roofline(mine, device)):
            if figure is not None:
                found[f"{figure.name}_{slug(device)}.png"] = figure
    return found


def _decode_cases(results: Sequence[Result]) -> list[Mapping[str, Any]]:
    """Timed shapes of ``decode`` with the page size and head dim of the charts."""
    return [
        case
        for result in results
        if result["bench"] == "decode"
        for case in result["cases"]
        if "median_ms" in case.get("unique_decode", {}) and BASE.items() <= case["options"].items()
    ]


def _over_contexts(lines: Mapping[str, Mapping[int, float]]) -> dict[str, Any] | None:
    """The lines of two contexts and more, over all of those, NaN where one was not measured; None without any."""
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    lengths = sorted({length for line in lines.values() for length in line})
    if not lines:
        return None
    return {"lengths": lengths, "lines": {k: [line.get(n, math.nan) for n in lengths] for k, line in lines.items()}}


def _options(cases: Sequence[Mapping[str, Any]]) -> str:
    o = cases[0]["options"]
    rule = "" if _several_rules(cases) else f"{o['rule']}, "
    return f"{o['heads']} heads, D={o['head_dim']}, {o['dtype']}, {rule}{o['budget']} tokens, S={o['page_size']}"


def _several_rules(cases: Sequence[Mapping[str, Any]]) -> bool:
    return len({case["options"]["rule"] for case in cases}) > 1


def _variant(case: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> str:
    """Rule and storage of the index, as far as a line of the chart needs them."""
    rule = f", {case['options']['rule']}" if _several_rules(cases) else ""
    storage = case["options"].get("index_format", "exact")
    return rule if storage == "exact" else f"{rule}, {storage}"


def _speed(results: Sequence[Result], device: str) -> Figure | None:
    cases = [case for case in _decode_cases(results) if case.get("speedup")]
    lines: dict[str, dict[int, float]] = {}
    for case in cases:
        line = lines.setdefault(f"batch {case['options']['batch']}{_variant(case, cases)}", {})
        line[case["options"]["context"]] = case["speedup"]
    data = _over_contexts(lines)
    if data is None:
        return None
    return Figure("decode_speed", "Times faster than dense attention", device, f"{device}; {_options(cases)}", data)


def _latency(results: Sequence[Result], device: str) -> Figure | None:
    cases = [case for case in _decode_cases(results) if case["options"]["batch"] == 1]
    lines: dict[str, dict[int, float]] = {}
    for case in cases:
        context, ours = case["options"]["context"], case["unique_decode"]
        of = _variant(case, cases)
        values = {f"unique_decode{of}": ours["median_ms"], f"floor of its bytes{of}": ours["floor_ms"]}
        values |= {PEERS[name]: case[name]["median_ms"] for name in PEERS if "median_ms" in case.get(name, {})}
        for name, value in values.items():
            lines.setdefault(name, {})[context] = 1e3 * value
    data = _over_contexts(lines)
    if data is None:
        return None
    return Figure("batch1_latency", "Decode step of one sequence", device, f"{device}; {_options(cases)}", data)


def _roofline(results: Sequence[Result], device: str) -> Figure | None:
    if all(result["bench"] != "decode" for result in results):
        return None
    points: dict[str, list[tuple[float, float]]] = {}
    ceilings = []
    for result in results:
        sides = {"unique_decode": "unique_decode", **PEERS} if result["bench"] == "decode" else {}
        if result["bench"] in OPS:
            title, side = OPS[result["bench"]]
            sides = {side: title}
        for case in result["cases"]:
            for side, title in sides.items():
                if "median_ms" in case.get(side, {}):
                    row = case[side]
                    points.setdefault(title, []).append((row["bytes"] / 2**20, 1e3 * row["median_ms"]))
        if sides:
            ceilings.append(result["ceiling"]["gb_per_s"])
    if not points:
        return None
    data = {"points": points, "gb_per_s": max(ceilings)}
    return Figure("roofline", "Time beside the floor of bytes", device, f"{device}; every measured shape", data)


# ---- Drawing. ----


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write every chart into ``folder``.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    return [_draw(figure, folder / file) for file, figure in figures(results).items()]


def _draw(figure: Figure, path: Path) -> Path:
    shown: dict[str, Any] = {"title": figure.title, "subtitle": figure.subtitle}
    if figure.name == "roofline":
        return plots.plot_roofline(figure.data["points"], figure.data["gb_per_s"], path, **shown)
    speed = figure.name == "decode_speed"
    ylabel = "times faster than the fastest dense peer" if speed else "µs, medians with cold caches"
    lengths, lines = figure.data["lengths"], figure.data["lines"]
    return plots.plot_lengths(lengths, lines, path, ylabel=ylabel, logarithmic=True, **shown)
