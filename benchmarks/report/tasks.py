"""Tables and picture of ``tasks``: scores by setting and task, their average against the budget, what is lost."""

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
MOST = 60  # characters of a text in a cell


def found(results: Sequence[Result]) -> list[Result]:
    """The results of ``tasks``, one for each model and way of asking: runs of single lengths are put together."""
    groups: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["bench"] != "tasks":
            continue
        o = {name: value for name, value in result["options"].items() if name != "batch"}
        key = repr((result["model"], sorted(o.items()), machine(result["environment"])))
        group = groups.setdefault(key, {**result, "cases": []})
        group["cases"] = sorted([*group["cases"], *result["cases"]], key=lambda case: case["length"])
    return list(groups.values())


def _setting(row: Row) -> str:
    if "rule" not in row:
        return "dense"
    storage = "" if row["index_format"] == "exact" else f", {row['index_format']}"
    return f"`{row['rule']}`{storage}, {row['budget']}"


def _percent(score: Mapping[str, float], digits: int = 0) -> str:
    return f"{100 * score['mean']:.{digits}f} ± {100 * score['std']:.{digits}f}"


def table(case: Mapping[str, Any]) -> str:
    """A row for each setting, a column for each task and the average; of one length."""
    rows = [
        {
            "rule, budget": _setting(row),
            **{TASKS[name].title: _percent(score) for name, score in row["tasks"].items()},
            "average": _percent(row["average"], 1),
        }
        for row in case["rows"]
    ]
    return markdown(pd.DataFrame(rows).fillna("-"))


def averages(cases: Sequence[Mapping[str, Any]]) -> str:
    """A row for each setting, a column for each length: the average over the tasks."""
    columns = {
        f"{tokens(case['length'])} tokens": {_setting(row): _percent(row["average"], 1) for row in case["rows"]}
        for case in cases
    }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [{"rule, budget": name, **{c: each.get(name, "-") for c, each in columns.items()}} for name in names]
    return markdown(pd.DataFrame(rows))


def _ladder(case: Mapping[str, Any], rule: str) -> list[Row]:
    """The rows of a rule with an exact index, by budget."""
    rows = [row for row in case["rows"] if row.get("rule") == rule and row["index_format"] == "exact"]
    return sorted(rows, key=lambda row: row["budget"])


def _quoted(text: str) -> str:
    """A text within a cell of a table, in one line and cut."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{line if len(line) <= MOST else line[: MOST - 3] + '...'}`" if line else "nothing"


def failures(case: Mapping[str, Any], rule: str) -> str:
    """A row for each task: what the smallest budget of a rule loses, which budget is enough, and a sample."""
    dense, *_ = case["rows"]
    ladder = _ladder(case, rule)
    rows = []
    for name, whole in dense["tasks"].items():
        least = ladder[0]["tasks"][name]
        enough = [
            row["budget"] for row in ladder if row["tasks"][name]["mean"] >= whole["mean"] - max(whole["std"], 0.01)
        ]
        shown = case["examples"][name]
        answers = shown["answers"]
        rows.append(
            {
                "task": TASKS[name].title,
                "dense": _percent(whole),
                f"{ladder[0]['budget']} tokens": _percent(least),
                "enough": f"{enough[0]}" if enough else f"more than {ladder[-1]['budget']}",
                "expected": _quoted(", ".join(shown["expected"])),
                "dense said": _quoted(answers["dense"]),
                f"with {ladder[0]['budget']} tokens": _quoted(answers[ladder[0]["setting"]]),
                f"with {ladder[-1]['budget']} tokens": _quoted(answers[ladder[-1]["setting"]]),
            }
        )
    return markdown(pd.DataFrame(rows))


def block(results: Sequence[Result]) -> str:
    """The block ``TASKS``; empty without results."""
    parts = []
    for result in found(results):
        o = result["options"]
        parts.append(
            f"`python -m benchmarks tasks` with {result['model']} on {machine(result['environment'])}, {o['dtype']}, "
            f"pages of {o['page_size']} tokens: share of the expected texts that an answer contains (%), average of "
            f"the tasks; mean and deviation of {o['seeds']} seeds with {o['samples']} samples of each task.\n\n"
            + averages(result["cases"])
        )
        tables = "\n".join(f"{tokens(case['length'])} tokens:\n\n{table(case)}" for case in result["cases"])
        parts.append(f"<details>\n<summary>By task</summary>\n\n{tables}\n</details>\n")
    if parts:
        parts.append(plots.image("Average score against the budget, by rule, model and length", FIGURE))
    return "\n".join(parts)


def failures_block(results: Sequence[Result]) -> str:
    """The block ``TASK-FAILURES``: of the longest prompts of each model."""
    parts = []
    for result in found(results):
        case = result["cases"][-1]
        rule = next((row["rule"] for row in case["rows"] if row.get("rule") == "directional"), None)
        if rule is not None:
            parts.append(
                f"{result['model']}, {tokens(case['length'])} tokens, `{rule}`. Enough is the smallest budget that is "
                "within dense attention's standard deviation, at least a point, of it. The sample of a task is the one "
                "on which all settings together lose most.\n\n" + failures(case, rule)
            )
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
