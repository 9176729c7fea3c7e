"""Tables and pictures of what sparse prefill drops, from results of ``prefill_quality``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import plots
from benchmarks.report.summary import machine
from benchmarks.report.tables import tokens
from examples.support.results import markdown

Result = Mapping[str, Any]
Case = Mapping[str, Any]
Row = Mapping[str, Any]

FIGURE, LENGTHS_FIGURE = "prefill_quality.png", "prefill_density.png"
SETTINGS = {"threshold": "threshold", "top_p": "top-p"}
GOAL = 0.01  # KL that is looked for
DRAWN_LENGTHS = 2  # of a model, the longest


def qualities(results: Sequence[Result]) -> list[Result]:
    """The results of ``prefill_quality`` that hold something."""
    return [result for result in results if result["bench"] == "prefill_quality" and result["cases"]]


def _kind(row: Row) -> tuple[str, str]:
    """Method, and how it selects."""
    return row["method"], next(name for name in SETTINGS if name in row)


def _setting(row: Row) -> str:
    method, name = _kind(row)
    return f"`{method}`, {SETTINGS[name]} {row[name]:g}"


def _kinds(cases: Sequence[Case]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(_kind(row) for case in cases for row in case["settings"]))


def _lengths(cases: Sequence[Case]) -> dict[int, list[Case]]:
    found: dict[int, list[Case]] = {}
    for case in cases:
        found.setdefault(case["length"], []).append(case)
    return dict(sorted(found.items()))


# ---- Tables. ----


def goal_table(result: Result) -> str:
    """By length and text, the sparsest setting of each way to select whose KL is at most ``GOAL``."""
    rows = []
    timed = any("attention_ms" in row for case in result["cases"] for row in case["settings"])
    for length, cases in _lengths(result["cases"]).items():
        for case in cases:
            for kind in _kinds(result["cases"]):
                good = [row for row in case["settings"] if _kind(row) == kind and row["kl"] <= GOAL]
                head = {"tokens": tokens(length), "text": case["text"]}
                if not good:
                    rows.append({**head, "setting": f"`{kind[0]}`, {SETTINGS[kind[1]]}: none tried"})
                    continue
                best = min(good, key=lambda row: row["density"])
                found = {
                    **head,
                    "setting": _setting(best),
                    "density": f"{best['density']:.3f}",
                    "KL": f"{best['kl']:.4f}",
                    "same likeliest token": f"{100 * best['top1']:.1f}%",
                }
                if timed:
                    factor = _faster(case, best)
                    found["attention, times faster"] = f"{factor:.2f}x" if factor else "-"
                rows.append(found)
    return markdown(pd.DataFrame(rows).fillna("-"))


def _faster(case: Case, row: Row) -> float | None:
    """Of the attention of the sparse layers against the fastest dense one, on the model's own inputs."""
    sides = [side for side in case.get("attention", {}).values() if isinstance(side, dict) and "median_ms" in side]
    if not sides or not row.get("attention_ms"):
        return None
    return float(min(side["median_ms"] for side in sides) / row["attention_ms"])


def ladder_table(cases: Sequence[Case]) -> str:
    """KL and density of every setting, a column for each text; of one length."""
    rows = []
    for number, setting in enumerate(cases[0]["settings"]):
        row = {"setting": _setting(setting)}
        for case in cases:
            found = case["settings"][number]
            row[case["text"]] = f"{found['kl']:.4f} @ {found['density']:.3f}"
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def needle_table(result: Result) -> str:
    """Nats per token of the answer and right answers, a column for each length."""
    names = list(dict.fromkeys(name for each in result["needles"] for name in each["results"]))
    rows = []
    for name in names:
        found = {each["length"]: each["results"].get(name) for each in result["needles"]}
        some = next(row for row in found.values() if row)
        cells = {
            f"{tokens(length)} tokens": f"{row['nats']:.3f}, {row['right']} of {row['trials']}" if row else "-"
            for length, row in found.items()
        }
        rows.append({"setting": "dense" if name == "dense" else _setting(some), **cells})
    return markdown(pd.DataFrame(rows))


def block(results: Sequence[Result]) -> str:
    """The block ``PREFILL-QUALITY``; empty without results."""
    parts = []
    for result in qualities(results):
        o = result["options"]
        texts = ", ".join(dict.fromkeys(case["text"] for case in result["cases"]))
        parts.append(
            f"`python -m benchmarks prefill_quality` with {result['model']} on {machine(result['environment'])}, "
            f"{o['dtype']}: all {len(result['layers'])} layers of full attention prefill sparsely through "
            f"`UniqueConfig(prefill=...)`; next tokens after the last {o['tail']:,} tokens of {texts}, against stock "
            f"attention. The sparsest of the settings that were tried whose KL is at most {GOAL:g} nats:\n\n"
            f"{goal_table(result)}"
        )
        ladders = [f"{tokens(n)} tokens:\n\n{ladder_table(cases)}" for n, cases in _lengths(result["cases"]).items()]
        parts.append(
            "<details>\n<summary>All settings</summary>\n\nKL in nats @ density. "
            + "\n".join(ladders)
            + "\n</details>\n"
        )
        if result["needles"]:
            parts.append(
                "A six-digit code somewhere in a text, asked for at its end; nats per token of the answer, and answers "
                f"of which every token is the likeliest:\n\n{needle_table(result)}"
            )
    if parts:
        parts.append(plots.image("KL from dense attention against density, by text and length", FIGURE))
        if _density_lines(results):
            parts.append(plots.image("Density against length at fixed settings", LENGTHS_FIGURE))
    return "\n".join(parts)


# ---- Pictures. ----


def _panels(results: Sequence[Result]) -> Iterator[tuple[str, str, Case]]:
    """Model and length, text, and case of what is drawn."""
    for result in qualities(results):
        for length, cases in list(_lengths(result["cases"]).items())[-DRAWN_LENGTHS:]:
            for case in cases:
                yield f"{result['model']}, {tokens(length)} tokens", case["text"], case


def _density_lines(results: Sequence[Result]) -> dict[str, dict[int, float]]:
    """Density by length, mean of the texts that are there at all lengths of a model, of the setting of each way to
    select that is the sparsest with a mean KL of at most ``GOAL`` at the longest; of models with several lengths."""
    found: dict[str, dict[int, float]] = {}
    for result in qualities(results):
        by_length = _lengths(result["cases"])
        if len(by_length) < 2:
            continue
        common = set.intersection(*({case["text"] for case in cases} for cases in by_length.values()))
        shared = {n: [case for case in cases if case["text"] in common] for n, cases in by_length.items()}
        if not common:
            continue
        longest = list(shared.values())[-1]
        for kind in _kinds(longest):
            good = [
                number
                for number, row in enumerate(longest[0]["settings"])
                if _kind(row) == kind
                and _mean(longest, number, "kl") <= GOAL
                and _mean(longest, number, "density") < 1  # else it is there to show what rounding does
            ]
            if good:
                number = min(good, key=lambda i: _mean(longest, i, "density"))
                name = f"{result['model']}, {_setting(longest[0]['settings'][number])}".replace("`", "")
                found[name] = {n: _mean(cases, number, "density") for n, cases in shared.items()}
    return found


def _mean(cases: Sequence[Case], number: int, name: str) -> float:
    return round(sum(case["settings"][number][name] for case in cases) / len(cases), 4)


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw KL against density, and density against length.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    panels: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for row, text, case in _panels(results):
        lines: dict[str, list[tuple[float, float]]] = {}
        for each in case["settings"]:
            method, name = _kind(each)
            if each["density"] < 1:  # else the KL is that of rounding
                lines.setdefault(f"{method}, {SETTINGS[name]}", []).append((each["density"], each["kl"]))
        panels.setdefault(row, {})[text] = {name: sorted(points) for name, points in lines.items()}
    if not panels:
        return []
    drawn = [
        plots.plot_panels(
            panels,
            folder / FIGURE,
            title="What sparse prefill changes",
            subtitle=f"KL of next tokens from dense attention (nats, up) against density; dashed: {GOAL:g}",
            level=GOAL,
        )
    ]
    lengths = _density_lines(results)
    if lengths:
        every = sorted({n for line in lengths.values() for n in line})
        drawn.append(
            plots.plot_lengths(
                every,
                {name: [line.get(n, math.nan) for n in every] for name, line in lengths.items()},
                folder / LENGTHS_FIGURE,
                title="Density against length",
                subtitle=f"settings whose KL is at most {GOAL:g} at the longest, mean of the texts",
                ylabel="density",
            )
        )
    return drawn
