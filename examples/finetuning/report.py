"""What a person reads of the measurements: a table and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pandas as pd

from examples.support.results import markdown

METRICS = {  # name: title, format, factor
    "perplexity": ("perplexity of held-out prose", ".2f", 1),
    "retrieval": ("answers right, document prefilled (%)", ".1f", 100),
    "retrieval_decoded": ("answers right, all decoded (%)", ".1f", 100),
    "answer_nll": ("nats per answer token, all decoded", ".3f", 1),
}


def variant(train: dict[str, Any] | None) -> str:
    """How a run was trained, in words."""
    if train is None:
        return "trained densely"
    words = f"trained {train['mode']}"
    if train["mode"] == "soft":
        words += f", tau {train['tau']:g}" + (f" to {train['tau_end']:g}" if train["tau_end"] else "")
    return words if train["hard_after"] is None else f"{words}, hard after {train['hard_after']:g}"


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds, by variant, side (``dense``, ``sparse``) and metric."""
    groups: dict[str, list[dict[str, Any]]] = {"as it came": [result["before"]]}
    for run in result["runs"]:
        groups.setdefault(variant(run["train"]), []).append(run)
    summary: dict[str, Any] = {}
    for name, runs in groups.items():
        for side in ("dense", "sparse"):
            for metric in METRICS:
                values = [run[side][metric] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else None
                facts = {"mean": statistics.fmean(values), "spread": spread}
                summary.setdefault(name, {}).setdefault(side, {})[metric] = facts
    return summary


def _cell(facts: dict[str, Any], metric: str) -> str:
    _, form, factor = METRICS[metric]
    spread = "" if facts["spread"] is None else f" ± {factor * facts['spread']:{form}}"
    return f"{factor * facts['mean']:{form}}{spread}"


def table(result: dict[str, Any]) -> str:
    """The summary as a Markdown table: a row a variant and side."""
    head = ["", "decodes", *(title for title, _, _ in METRICS.values())]
    lines = []
    for name, sides in result["summary"].items():
        for side, metrics in sides.items():
            reads = "densely" if side == "dense" else f"{result['settings']['budget']} tokens"
            lines.append([name, reads, *(_cell(metrics[metric], metric) for metric in METRICS)])
    return markdown(pd.DataFrame(lines, columns=head))


def plot(result: dict[str, Any], path: str | Path) -> Path:
    """Draw the summary, a panel a metric: bars are means, dots are seeds.

    Raises:
        ImportError: matplotlib is missing.
    """
    from unique_attn import viz

    plt = viz.pyplot()
    names = list(result["summary"])
    runs = [(variant(run["train"]), run) for run in result["runs"]]
    shown = ["perplexity", "retrieval", "retrieval_decoded"]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.3 * len(shown), 4.4), facecolor=viz.PAPER)
    colors = {"dense": viz.RAMP[2], "sparse": viz.RAMP[4]}
    for ax, metric in zip(axes, shown):
        title, form, factor = METRICS[metric]
        for place, name in enumerate(names):
            for offset, side in ((-0.2, "dense"), (0.2, "sparse")):
                mean = factor * result["summary"][name][side][metric]["mean"]
                seeds = [factor * run[side][metric] for label, run in runs if label == name]
                ax.bar(place + offset, mean, 0.38, color=colors[side])
                if len(seeds) > 1:
                    ax.plot([place + offset] * len(seeds), seeds, "o", color=viz.ACCENT, markersize=3)
                ax.annotate(
                    f"{mean:{form}}", (place + offset, max([mean, *seeds])), xytext=(0, 3), textcoords="offset points",
                    ha="center", va="bottom", fontsize=8, color=viz.INK,
                )  # fmt: skip
        viz.style(ax)
        ax.set_title(title, loc="left", fontsize=10, color=viz.INK)
        ax.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    labels = ["decodes densely", f"decodes with a budget of {result['settings']['budget']} tokens"]
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=9, labelcolor=viz.INK)
    o, count = result["options"], len(result["options"]["seeds"])
    note = f"{result['model']}, {o['length']} tokens, {o['steps']} steps of {o['batch']} sequences, {o['method']}"
    note += f", {count} seeds (dots)" if count > 1 else ""
    figure.text(0.02, 0.97, "Fine-tuning for a small budget", fontsize=14, color=viz.INK, weight="bold", va="top")
    figure.text(0.02, 0.905, note, fontsize=9, color=viz.MUTED, va="top")
    figure.tight_layout(rect=(0, 0.06, 1, 0.88))
    return viz.save(figure, path, {"note": note, "summary": result["summary"]})
