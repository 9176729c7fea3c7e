"""What a reader is told first: the most and the least that a decode step gains, by the default rule, in a table and in
a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import generate, plots
from benchmarks.report.tables import Result, cases_of, ms, tokens
from benchmarks.suite.generate import STOCK
from examples.support.results import markdown

SETTINGS = {"rule": "directional", "page_size": 8, "budget": 512}
MODEL = [{"batch": 80, "context": 32768}, {"batch": 1, "context": 32768}]  # shapes, of one result
GENERATE = [{"layers": 16, "batch": 1, "context": 32768}, {"layers": 32, "batch": 8, "context": 16384}]
FIGURE = "model_speed.png"
BATCHES = (80, 1)  # of the picture
INDEXES = {"unique_compressed": "compressed index", "unique_exact": "exact index"}

Row = tuple[str, float, float]  # what ran, milliseconds of dense and of page-sparse attention


def _calls(results: Sequence[Result]) -> list[Row]:
    """New tokens of ``generate()``, against stock attention."""
    found: list[Row] = []
    for case, stock, dense, ours in generate.headline(results, [{**SETTINGS, **shape} for shape in GENERATE]):
        o = case["options"]
        shape = f"{o['layers']} layers, D={o['head_dim']}, batch {o['batch']}, {tokens(o['context'])} context"
        against = "stock" if stock == STOCK else "stock with a static cache, compiled"
        found.append((f"a token of `generate()`, {shape}, against {against}", dense, ours))
    return found


def _models(results: Sequence[Result]) -> list[Row]:
    """Steps of a compiled model."""
    found: list[Row] = []
    for case in _wanted(_model_cases(results), SETTINGS, MODEL):
        if "unique_compressed" in case["best"]:
            dense, ours = (case["sides"][case["best"][name]] for name in (case["peer"], "unique_compressed"))
            what = f"a step of the model of {case['options']['layers']} layers, compiled, against FlashInfer or SDPA"
            found.append((_name(what, case, found), dense["median_ms"], ours["median_ms"]))
    return found


def _model_cases(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Shapes of a compiled model that were timed against a dense side, of the first GPU that there is a result of."""
    for result in results:
        cases = cases_of(result) if result["bench"] == "model" and result["environment"]["device"] != "cpu" else []
        found = [case for case in cases if case.get("compiled") and case.get("best") and case["peer"]]
        if found:
            return found
    return []


def _wanted(
    cases: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The cases of these shapes, in the order of the shapes."""
    return [case for shape in shapes for case in cases if {**settings, **shape}.items() <= case["options"].items()]


def _name(what: str, case: Mapping[str, Any], above: Sequence[Row]) -> str:
    o = case["options"]
    shape = f"batch {o['batch']}, {tokens(o['context'])} context"
    return f"the same, {shape}" if above else f"{what}, D={o['head_dim']}, {shape}, {case['environment']['device']}"


def block(results: Sequence[Result]) -> str:
    """The block ``headline``; empty without results of a GPU."""
    rows = [
        (what, ms(dense), ms(ours), f"**{dense / ours:.1f}x**")
        for what, dense, ours in (*_calls(results), *_models(results))
    ]
    head = ["512 tokens read", "dense", "page-sparse, compressed index", "faster"]
    return markdown(pd.DataFrame(rows, columns=head)) if rows else ""


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw how many times faster a step of the compiled model is than its fastest dense side, against the context.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    cases = [case for case in _model_cases(results) if SETTINGS.items() <= case["options"].items()]
    lines: dict[str, dict[int, float]] = {}
    for batch in BATCHES:
        for side, name in INDEXES.items():
            found = {c["options"]["context"]: c for c in cases if c["options"]["batch"] == batch and side in c["best"]}
            if len(found) > 1:
                line = {context: case["speedups"][side][case["peer"]] for context, case in sorted(found.items())}
                lines[f"batch {batch}, {name}"] = line
    if not lines:
        return []
    o = cases[0]["options"]
    subtitle = (
        f"{cases[0]['environment']['device']}; {o['layers']} layers, {o['heads']} heads, D={o['head_dim']}, "
        f"{o['dtype']}; a step reads {o['budget']} tokens per KV head"
    )
    title = "How many times faster a whole model decodes"
    return [plots.plot_speedups(lines, folder / FIGURE, title=title, subtitle=subtitle)]
