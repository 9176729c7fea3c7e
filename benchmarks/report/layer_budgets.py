"""The table of budgets for each layer, from results of ``ablation --per-layer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.measure.layer_budgets import DENSE, GUARDED, MASS, SENSITIVITY, SQUARED
from benchmarks.report.summary import machine
from benchmarks.report.tables import tokens
from examples.support.results import markdown

Result = Mapping[str, Any]
Found = Mapping[str, Any]

NAMES = {
    MASS: "by attention lost",
    SENSITIVITY: "by attention lost times sensitivity",
    SQUARED: "by its square times sensitivity",
    GUARDED: "the same, at least half the one budget",
    DENSE: "layers dense that lose most",
}
WORTH = 0.15  # share of the bytes from which on budgets for each layer are worth a setting


def chosen(results: Sequence[Result]) -> list[Result]:
    """The results with budgets of layers; of a model those on GPUs, if there are any."""
    every = [result for result in results if result["bench"] == "ablation" and result.get("budgets")]
    on_gpu = {result["model"] for result in every if result["environment"]["device"] != "cpu"}
    return [r for r in every if r["model"] not in on_gpu or r["environment"]["device"] != "cpu"]


def _row_of(found: Found, method: str, total: int) -> dict[str, Any] | None:
    return next((row for row in found["rows"] if row["method"] == method and row["total"] == total), None)


def budget_table(found: Found, where: str) -> str:
    """A line for each total: KL of one budget for all layers, and of each method with the bytes that it saves."""
    saved = {method: found["saved"][method][where] for method in NAMES if found["saved"][method][where]}
    kl = {row["budget"]: row["kl"] for row in found["uniform"]}
    lines = []
    for total in sorted({row["total"] for row in found["rows"]}):
        line = {"bytes of": f"{total} tokens", "one budget": f"{kl[total]:.4f}"}
        for method, of in saved.items():
            row = _row_of(found, method, total)
            totals = [each["total"] for each in found["rows"] if each["method"] == method]
            line[NAMES[method]] = (
                f"{row[where]['kl']:.4f}, {_signed(of['totals'][totals.index(total)])}" if row else "-"
            )
        lines.append(line)
    mean = {
        NAMES[method]: f"{_signed(of['mean'])} ({_signed(of['low'])} to {_signed(of['high'])})"
        for method, of in saved.items()
    }
    lines.append({"bytes of": "bytes saved, mean", "one budget": "", **mean})
    free = {NAMES[method]: _signed(of["mean_without_index"]) for method, of in saved.items()}
    lines.append({"bytes of": "without the index", "one budget": "", **free})
    return markdown(pd.DataFrame(lines))


def _signed(share: float) -> str:
    return f"{100 * share:+.0f}%"


def verdict(found: Found) -> str:
    """Whether the best method is worth a setting, by its mean on the texts that its budgets were not chosen on."""
    held_out = {method: of["held_out"] for method, of in found["saved"].items() if of["held_out"]}
    best = max(held_out, key=lambda method: held_out[method]["mean"])
    share, low = held_out[best]["mean"], held_out[best]["low"]
    where = "on the texts that the budgets were not chosen on"
    limit = f"the {100 * WORTH:.0f}% from which on a setting for it would be worth having"
    if share < 0:
        return (
            f"Even the best, {NAMES[best]}, reads {-100 * share:.0f}% more bytes {where}, where it should save {limit}."
        )
    answer = "more than" if low >= WORTH else "more than, within the noise," if share >= WORTH else "less than"
    return f"The best, {NAMES[best]}, saves {100 * share:.0f}% of the bytes {where}: {answer} {limit}."


def layer_table(found: Found) -> str:
    """By layer: what it loses and costs, and the budgets that were chosen for the second total, text by text."""
    totals = sorted({row["total"] for row in found["rows"]})
    total = totals[min(1, len(totals) - 1)]
    probe = found["ladder"].index(found["probe"])
    curves = {(each["text"], each["layer"]): each for each in found["curves"]}
    lines = []
    for at, layer in enumerate(found["layers"]):
        line = {"layer": str(layer)}
        for text in found["texts"]:
            each = curves[text, layer]
            line[f"{text}: lost at {found['probe']}, KL alone"] = f"{each['lost'][probe]:.3f}, {each['kl_alone']:.5f}"
            budgets = []
            for method in (MASS, SENSITIVITY):
                row = _row_of(found, method, total)
                budget = row["chosen_on"][text]["budgets"][at] if row else "-"
                budgets.append("all" if budget is None else str(budget))
            line[f"{text}: tokens"] = ", ".join(budgets)
        lines.append(line)
    return (
        f"Attention lost at {found['probe']} tokens, the KL when the layer alone reads so few, and the budgets at the "
        f"bytes of {total} tokens (by attention lost; times sensitivity):\n\n{markdown(pd.DataFrame(lines))}"
    )


def block(results: Sequence[Result]) -> str:
    """The block ``ABLATION-LAYERS``; empty without results."""
    parts = []
    for result in chosen(results):
        o = result["options"]
        for found in result["budgets"]:
            setting = found["setting"]
            parts.append(
                f"`python -m benchmarks ablation --per-layer`, {result['model']}, {machine(result['environment'])}, "
                f"{o['dtype']}: {tokens(found['length'])} tokens of {', '.join(found['texts'])}, the last {o['tail']} "
                f"of each decoded, `{setting['score']}`, pages of {setting['page_size']} tokens, "
                f"{setting['index_format']} index. {verdict(found)}\n\nKL on the other texts, at the bytes that "
                "one budget for all layers reads, and the bytes saved at equal KL (in brackets the 5th to 95th "
                f"percentile over the tokens):\n\n{budget_table(found, 'held_out')}\n"
                "<details>\n<summary>On the text that the budgets were chosen on; the layers</summary>\n\n"
                f"{budget_table(found, 'own')}\n{layer_table(found)}\n</details>\n"
            )
    return "\n".join(parts)
