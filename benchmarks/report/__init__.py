"""Write the tables of committed results into the pages, and draw their pictures.

Each table is a block with a name. It goes wherever its markers stand, in the README or in a page of docs/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import (
    ablation,
    charts,
    families,
    finetune,
    generate,
    headline,
    layer_budgets,
    pages,
    plots,
    prefill,
    prefill_ablation,
    prefill_quality,
    quality,
    serve,
    summary,
    tables,
    tasks,
    training,
)
from examples.support.results import ROOT


def load(folder: Path) -> list[dict[str, Any]]:
    """All results in ``folder``, by file name.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there are no benchmark results in {folder}: name their folder with --results")
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]


def blocks(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What goes between which markers; empty where there is no result."""
    return {
        "headline": headline.block(results),
        "generate results": generate.block(results),
        "demo results": summary.demo(results),
        "decode results cpu": summary.decode(results),
        "training results": training.block(results),
        "index quality results": quality.block(results),
        "finetune results": finetune.block(results),
        "families": families.block(results),
        "PREFILL-SPEED": prefill.block(results),
        "PREFILL-QUALITY": prefill_quality.block(results),
        "PREFILL-ABLATION": prefill_ablation.block(results),
        "serve results": serve.block(results),
        "TASKS": tasks.block(results),
        "TASK-FAILURES": tasks.failures_block(results),
        "ABLATION": ablation.block(results),
        "ABLATION-TERMS": ablation.terms_block(results),
        "ABLATION-FAILURES": ablation.failures_block(results),
        "ABLATION-LAYERS": layer_budgets.block(results),
        **tables.blocks(results),
    }


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every picture of the results.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    parts = (headline, generate, training, charts, quality, finetune, prefill, prefill_quality, prefill_ablation)
    return [path for part in (*parts, tasks, ablation) for path in part.draw(results, folder)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/, where pictures go, too")
    parser.add_argument("--print", action="store_true", help="print the tables instead")


def run(options: argparse.Namespace) -> None:
    results = load(options.results)
    found = blocks(results)
    if options.print:
        print("\n".join(filter(None, found.values())), end="")
        return
    texts = pages.rewrite(options.root, found)
    for page, text in texts.items():
        page.write_text(text, "utf-8")
    folder = options.root / plots.FOLDER
    draw(results, folder)
    print(f"wrote {', '.join(str(page) for page in texts)} and the pictures in {folder}")
