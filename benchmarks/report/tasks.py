"""Tables and picture of ``tasks``: scores by setting and task, and their average against the budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.measure.tasks import TASKS
from benchmarks.report import plots
from benchmarks.report.summary import machine
from benchmarks.report.tables import tokens
from examples.support.results import markdown

Result = Mapping[str, Any]
Row = Mapping[str, Any]
FIGURE = "tasks.png"


def found(results: Sequence[Result]) -> list[Result]:
    """The results of ``tasks``."""
    return [result for result in results if result["bench"] == "tasks"]


def _setting(row: Row) -> str:
    if "rule" not in row:
        return "dense"
    storage = "" if row["index_format"] == "exact" else f", {row['index_format']}"
    return f"`{row['rule']}`{storage}, {row['budget']}"


def _cell(score: Mapping[str, float]) -> str:
    return f"{100 * score['mean']:.0f} ± {100 * score['std']:.0f}"


def table(case: Mapping[str, Any]) -> str:
    """A row for each setting, a column for each task and the average; of one length."""
    rows = [
        {
            "rule, budget": _setting(row),
            **{TASKS[name].title: _cell(score) for name, score in row["tasks"].items()},
            "average": f"{100 * row['average']['mean']:.1f} ± {100 * row['average']['std']:.1f}",
        }
        for row in case["rows"]
    ]
    return markdown(pd.DataFrame(rows).fillna("-"))


def block(results: Sequence[Result]) -> str:
    """The block ``TASKS``; empty without results."""
    parts = []
    for result in found(results):
        o = result["options"]
        parts.append(
            f"`python -m benchmarks tasks` with {result['model']} on {machine(result['environment'])}, {o['dtype']}, "
            f"pages of {o['page_size']} tokens: share of the expected texts that an answer contains (%), mean and "
            f"standard deviation of {o['seeds']} seeds with {o['samples']} samples each.\n"
        )
        parts += [f"{tokens(case['length'])} tokens:\n\n{table(case)}" for case in result["cases"]]
    if parts:
        parts.append(plots.image("Average score against the budget, by rule, model and length", FIGURE))
    return "\n".join(parts)


def _panels(results: Sequence[Result]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for result in found(results):
        for case in result["cases"]:
            yield f"{result['model']}, {tokens(case['length'])} tokens", case


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw the average score against the budget.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    panels: dict[str, dict[str, dict[int, float]]] = {}
    levels: dict[str, float] = {}
    for name, case in _panels(results):
        for row in case["rows"]:
            score = round(100 * row["average"]["mean"], 2)
            if "rule" not in row:
                levels[name] = score
                continue
            line = row["rule"] if row["index_format"] == "exact" else f"{row['rule']}, {row['index_format']}"
            panels.setdefault(name, {}).setdefault(line, {})[row["budget"]] = score
    if not panels:
        return []
    figure = plots.plot_budgets(
        panels,
        levels,
        folder / FIGURE,
        title="Tasks over long prompts",
        subtitle="average score of all tasks against the budget in tokens; dashed: dense attention",
    )
    return [figure]
