"""Table, list of formats and picture of ``index_quality``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import plots
from examples.support.results import markdown

FIGURE = "index_quality.png"


def qualities(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of ``index_quality``."""
    return [r for r in results if r["bench"] == "index_quality"]


def _masses(mass: dict[str, list[float]]) -> list[str]:
    """A cell a budget: the mass kept on each text."""
    return [" / ".join(f"{x:.3f}" for x in of_budget) for of_budget in zip(*mass.values())]


def quality_table(result: dict[str, Any]) -> str:
    """Mass kept by rule, format and page size: all at 8 tokens a page, the default rule at the others."""
    rows = []
    for oracle in result["oracle"]:
        size = oracle["page_size"]
        for r in result["ops"]:
            if r["page_size"] == size and (size == 8 or r["rule"] == "directional"):
                name = f"S={size} `{r['rule']}`, {r['index']}"
                rows.append((name, str(r["entry_bytes"]), f"{r['bits']:.3g}", *_masses(r["mass"])))
        rows.append((f"S={size} the pages with the most mass", "", "", *_masses(oracle["mass"])))
    budgets = [f"{budget} tokens" for budget in result["options"]["budgets"]]
    return markdown(pd.DataFrame(rows, columns=["index", "bytes an entry", "bits per key channel and token", *budgets]))


def format_table(result: dict[str, Any]) -> str:
    """What formats lose against exact entries, in thousandths of the mass."""
    rows = []
    for r in result["formats"]["results"]:
        lost = [" / ".join(f"{1e3 * x:.1f}".replace("-0.0", "0.0") for x in each) for each in r["lost"].values()]
        rows.append((r["name"], f"{r['bits']:.2f}", str(r["entry_bytes"]), *lost))
    names = ("keys as they are", "a channel shifted", "a channel scaled")
    return markdown(pd.DataFrame(rows, columns=["format of `directional`", "bits a channel", "bytes an entry", *names]))


def block(results: Sequence[dict[str, Any]]) -> str:
    """The block between the markers of the index; empty without a result."""
    parts = []
    for result in qualities(results):
        o = result["options"]
        texts = " / ".join(f"{name} ({tokens:,} tokens)" for name, tokens in result["texts"].items())
        parts.append(
            f"`python -m benchmarks index_quality`: share of the true attention on the selected pages, "
            f"{result['model']}, all layers, the last {o['queries']} queries of {texts}, D={o['head_dim']}, "
            f"{o['dtype']} queries and keys:\n\n{quality_table(result)}"
        )
        parts.append(plots.image("Attention kept against the size of the index", FIGURE))
        parts.append(
            "<details>\n<summary>Formats that were tried</summary>\n\n"
            f"Formats at S={result['formats']['page_size']} in PyTorch: thousandths of the attention lost against "
            f"exact entries, budgets {' / '.join(map(str, o['budgets']))}, mean of the texts; with the keys as "
            "they are, and with a channel in each half of every head a hundred times as large, shifted (as a key "
            f"bias does) or scaled (and the query's as small):\n\n{format_table(result)}\n</details>\n"
        )
    return "\n".join(parts)


def _draw(result: dict[str, Any], folder: Path) -> Path:
    """Draw mass kept at the largest budget against bits, by rule and format over page sizes."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for r in result["ops"]:
        kept = [of_text[-1] for of_text in r["mass"].values()]
        point = (r["bits"], sum(kept) / len(kept), f"S={r['page_size']}")
        lines.setdefault(f"{r['rule']}, {r['index']}", []).append(point)
    o = result["options"]
    return plots.plot_tradeoff(
        dict(sorted(lines.items(), key=lambda line: -max(y for _, y, _ in line[1]))),
        folder / FIGURE,
        title="Attention kept against the size of the index",
        subtitle=f"{result['model']}, budget {o['budgets'][-1]}, mean of {' and '.join(result['texts'])}",
        xlabel="index bits per key channel and token",
        ylabel="attention on the selected pages",
    )


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every result.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    return [_draw(result, folder) for result in qualities(results)]
