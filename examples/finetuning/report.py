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
                deviation = statistics.stdev(values) if len(values) > 1 else None
                facts = {"mean": statistics.fmean(values), "spread": deviation}  # the key of the committed results
                summary.setdefault(name, {}).setdefault(side, {})[metric] = facts
    return summary


def _cell(facts: dict[str, Any], metric: str) -> str:
    _, form, factor = METRICS[metric]
    deviation = "" if facts["spread"] is None else f" ± {factor * facts['spread']:{form}}"
    return f"{factor * facts['mean']:{form}}{deviation}"


def table(result: dict[str, Any]) -> str:
    """The summary as a Markdown table: a row a variant and side."""
    head = ["", "decodes", *(title for title, _, _ in METRICS.values())]
    lines = []
    for name, sides in result["summary"].items():
        for side, metrics in sides.items():
            reads = "densely" if side == "dense" else f"{result['settings']['budget']} tokens"
            lines.append([name, reads, *(_cell(metrics[metric], metric) for metric in METRICS)])
    return markdown(pd.DataFrame(lines, columns=head))


SHOWN = {  # metric: what its panel is called
    "perplexity": "Perplexity of held-out prose (lower is better)",
    "retrieval": "Right answers, % (document prefilled)",
}
LABELS = {
    "trained densely": "trained densely",
    "trained soft": "trained with\nthe soft mask",
    "trained hard": "trained with\nthe hard mask",
}


def _label(name: str) -> str:
    """A variant under its bars."""
    how, _, rest = name.partition(", ")
    return LABELS.get(how, how) + (f"\n({rest})" if rest else "")


def plot(result: dict[str, Any], path: str | Path) -> Path:
    """Draw what matters of the summary, a panel a metric: bars are means, dots are seeds.

    Raises:
        ImportError: matplotlib is missing.
    """
    from unique_attn import viz

    plt = viz.pyplot()
    names = list(result["summary"])
    runs = [(variant(run["train"]), run) for run in result["runs"]]
    width = max(9.0, 1.5 * len(SHOWN) * len(names))
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(width, 4.6), facecolor=viz.PAPER)
    colors = {"dense": viz.RAMP[2], "sparse": viz.RAMP[4]}
    for ax, (metric, title) in zip(axes, SHOWN.items()):
        _, form, factor = METRICS[metric]
        for place, name in enumerate(names):
            for offset, side in ((-0.2, "dense"), (0.2, "sparse")):
                mean = factor * result["summary"][name][side][metric]["mean"]
                seeds = [factor * run[side][metric] for label, run in runs if label == name]
                ax.bar(place + offset, mean, 0.38, color=colors[side])
                if len(seeds) > 1:
                    ax.plot([place + offset] * len(seeds), seeds, "o", color=viz.ACCENT, markersize=3)
                ax.annotate(
                    f"{mean:{form}}", (place + offset, max([mean, *seeds])), xytext=(0, 4), textcoords="offset points",
                    ha="center", va="bottom", fontsize=10, color=viz.INK,
                )  # fmt: skip
        viz.style(ax)
        ax.set_title(title, loc="left", fontsize=11.5, color=viz.INK, pad=16)
        ax.set_yticks([])  # the numbers are on the bars
        ax.set_xticks(range(len(names)), map(_label, names), fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    o, budget, count = result["options"], result["settings"]["budget"], len(result["options"]["seeds"])
    labels = ["decodes densely", f"decodes page-sparse, {budget} of {o['length']:,} tokens"]
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=10.5, labelcolor=viz.INK)
    method = {"full": "all weights", "lora": "LoRA"}[o["method"]]
    note = f"{result['model']}; trained on {o['steps']} x {o['batch']} sequences, {method}"
    note += f", means of {count} seeds (dots)" if count > 1 else ""
    figure.text(0.02, 0.97, "Quality before and after fine-tuning", fontsize=15, color=viz.INK, weight="bold", va="top")
    figure.text(0.02, 0.895, note, fontsize=9.5, color=viz.MUTED, va="top")
    figure.tight_layout(rect=(0, 0.07, 1, 0.87), w_pad=3)
    return viz.save(figure, path, {"note": note, "summary": result["summary"]})
