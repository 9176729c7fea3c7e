"""Table and picture of which blocks a sparse prefill should keep, from results of ``prefill_ablation``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.measure.block_shares import words
from benchmarks.report import plots
from benchmarks.report.summary import machine, of_models
from benchmarks.report.tables import tokens
from examples.support.results import markdown

Result = Mapping[str, Any]
Case = Mapping[str, Any]
Row = Mapping[str, Any]

FIGURE = "prefill_ablation.png"
GOAL = 0.01  # KL that is marked
MIDDLE = 0.3  # density at which ways are told apart
DEFAULT = ("directional", "max", "threshold")
DRAWN = {  # by panel; all together eight, which is how many colors there are
    "estimates": [
        DEFAULT, ("xattention", "max", "threshold"), ("pooled", "", "threshold"), ("random", "", "threshold"),
        ("oracle", "max", "threshold"),
    ],
    "aggregates, selection": [
        DEFAULT, ("directional", "mean", "threshold"), ("directional", "max", "top_p"), ("oracle", "max", "threshold"),
        ("oracle", "mean", "threshold"),
    ],
}  # fmt: skip


def _kind(row: Row) -> tuple[str, str, str]:
    return row["estimate"], row["aggregate"], row["selection"]


def cases(results: Sequence[Result]) -> Iterator[tuple[Result, Case]]:
    for result in of_models(results, "prefill_ablation"):
        for case in result["cases"]:
            yield result, case


# ---- Tables. ----


def _at(row: Row, density: float) -> Row | None:
    return next((at for at in row["at"] if at["density"] == density), None)


def _more(row: Row, density: float) -> str:
    """By how much the KL exceeds that of the default."""
    at = _at(row, density)
    if at is None or "kl_more" not in at or _kind(row) == DEFAULT:
        return "-"
    return f"{at['kl_more']:+.4f} ± {at['kl_more_se']:.4f}"


def way_table(case: Case, densities: Sequence[float]) -> str:
    """A line for each way, the nearest to dense attention at ``MIDDLE`` on top."""
    rows = []

    def order(way: Row) -> float:
        at = _at(way, MIDDLE)
        return at["kl"] if at else float("inf")

    for way in sorted(case["ways"], key=order):
        name = words(way)
        row = {"share of a block": f"**{name}**" if _kind(way) == DEFAULT else name}
        for density in densities:
            at = _at(way, density)
            row[f"KL at {density:g}"] = f"{at['kl']:.4f}" if at else "-"
        for density in [density for density in densities if density >= MIDDLE]:
            row[f"beyond the default's at {density:g}"] = _more(way, density)
        at = _at(way, MIDDLE)
        row[f"same likeliest token at {MIDDLE:g}"] = f"{100 * at['top1']:.1f}%" if at else "-"
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def setting_table(case: Case) -> str:
    """Every setting that was run."""
    rows = []
    for way in case["ways"]:
        for setting in way["settings"]:
            row = {
                "share of a block": words(way),
                "threshold or top-p": f"{setting[way['selection']]:.3g}",
                "density": f"{setting['density']:.3f}",
                "KL": f"{setting['kl']:.4f} ± {setting['kl_se']:.4f}",
                "same likeliest token": f"{100 * setting['top1']:.1f}%",
                "true attention kept": f"{setting['mass']:.3f}",
                **{name: f"{kl:.4f}" for name, kl in zip(case["texts"], setting["kl_texts"])},
            }
            if "needles" in setting:
                found = setting["needles"]
                row["codes"] = f"{found['nats']:.3f}, {found['right']} of {found['trials']}"
            rows.append(row)
    return markdown(pd.DataFrame(rows))


def case_block(result: Result, case: Case) -> str:
    o = result["options"]
    head = (
        f"`python -m benchmarks prefill_ablation`, {result['model']}, {machine(result['environment'])}, {o['dtype']}: "
        f"{tokens(case['length'])} tokens of {', '.join(case['texts'])}; blocks of {o['block_q']} queries and "
        f"{o['block_k']} keys, all layers of full attention sparse. KL (nats) of the next tokens after the last "
        f"{o['tail']} of each text from those of dense attention, at equal density; by threshold, but where top-p is "
        "said. The default is in bold; the difference from it is given with the standard error of its mean over tokens"
    )
    codes = ""
    if "needles" in case:
        dense = case["needles"]
        codes = f" Dense attention on hidden codes: {dense['nats']:.3f}, {dense['right']} of {dense['trials']}."
    return (
        f"{head}:\n\n{way_table(case, o['densities'])}\n"
        "<details>\n<summary>All settings, and the texts</summary>\n\n"
        f"KL ± its standard error; attention kept is that of dense attention's queries and keys.{codes}\n\n"
        f"{setting_table(case)}\n</details>\n"
    )


def block(results: Sequence[Result]) -> str:
    """The block ``PREFILL-ABLATION``; empty without results."""
    parts = [case_block(result, case) for result, case in cases(results)]
    if parts:
        parts.append(plots.image("KL from dense attention against density, by estimate of the shares", FIGURE))
    return "\n".join(parts)


# ---- Picture. ----


def _short(kind: tuple[str, str, str]) -> str:
    estimate, aggregate, selection = kind
    return " ".join(filter(None, (estimate, aggregate))) + (", top-p" if selection == "top_p" else "")


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw KL against density, mean of the texts, of some ways.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    panels: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for result, case in cases(results):
        found = {_kind(way): way["settings"] for way in case["ways"] if way["settings"]}
        row = panels.setdefault(f"{result['model']}, {tokens(case['length'])} tokens", {})
        for panel, kinds in DRAWN.items():
            row[panel] = {
                _short(kind): sorted((x["density"], x["kl"]) for x in found[kind]) for kind in kinds if kind in found
            }
    if not panels:
        return []
    return [
        plots.plot_panels(
            panels,
            folder / FIGURE,
            title="Which blocks to keep",
            subtitle=f"KL of next tokens from dense attention (nats, up) against density; dashed: {GOAL:g}",
            level=GOAL,
        )
    ]
