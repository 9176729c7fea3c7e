"""The picture of a calibration: quality against budget, and where attention is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unique_attn.calibration.result import Calibration, Row
from unique_attn.viz import ACCENT, GRID, HEADS, INK, MUTED, PAPER, RAMP, pyplot, save, style

STYLES = ("-", "--", ":", "-.")


def draw(calibration: Calibration, path: str | Path) -> Path:
    """Write the picture, a PNG; see :meth:`Calibration.plot`."""
    figure = pyplot().figure(figsize=(11.5, 4.6), facecolor=PAPER, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    style(left)
    style(right)
    _quality(left, calibration)
    _layers(right, calibration)
    return save(figure, path, calibration.to_dict())


def _groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows without dense layers, by rule and page size, in ascending budget."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.config is not None and not row.config.dense_layers:
            found.setdefault((row.config.rule, row.config.page_size), []).append(row)
    return {key: sorted(each, key=lambda row: row.config.budget if row.config else 0) for key, each in found.items()}


def _quality(axes: Any, calibration: Calibration) -> None:
    groups = _groups(calibration.rows)
    rules = list(dict.fromkeys(rule for rule, _ in groups))
    pages = list(dict.fromkeys(page for _, page in groups))
    for (rule, page), rows in groups.items():
        axes.plot(
            [row.config.budget for row in rows if row.config],
            [max(row.kl, 1e-5) for row in rows],
            STYLES[pages.index(page) % len(STYLES)],
            color=HEADS[rules.index(rule) % len(HEADS)],
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            label=f"{rule}, pages of {page}",
        )
    axes.axhline(calibration.tolerance, color=ACCENT, linewidth=1)
    axes.annotate(
        f"tolerance {calibration.tolerance:g}", (1, calibration.tolerance), xycoords=("axes fraction", "data"),
        xytext=(-4, 4), textcoords="offset points", ha="right", color=ACCENT, fontsize=8,
    )  # fmt: skip
    best = calibration.recommended
    row = next((each for each in calibration.rows if each.config == best), None)
    if best is not None and row is not None:
        axes.plot([best.budget], [max(row.kl, 1e-5)], "o", markersize=9, fillstyle="none", color=ACCENT)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    budgets = sorted({row.config.budget for row in calibration.rows if row.config})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("tokens that a step reads", color=INK)
    axes.set_ylabel("KL of next tokens from dense attention (nats)", color=INK)
    axes.set_title("Quality by budget", loc="left", color=INK, fontsize=10)
    axes.grid(color=GRID, linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def _layers(axes: Any, calibration: Calibration) -> None:
    """Of the recommended rule and page size, or of those with the least KL, the mass by budget and layer."""
    from matplotlib.colors import LinearSegmentedColormap

    groups = _groups(calibration.rows)
    best = calibration.recommended
    key = (best.rule, best.page_size) if best is not None else None
    if key not in groups:
        key = min(groups, key=lambda each: min(row.kl for row in groups[each]))
    rows = groups[key]
    layers = sorted({layer for row in rows for layer in row.mass})
    shares = np.array([[row.mass.get(layer, np.nan) for layer in layers] for row in rows])
    colours = LinearSegmentedColormap.from_list("mass", RAMP)
    image = axes.imshow(shares, aspect="auto", cmap=colours, vmin=min(0.5, float(np.nanmin(shares))), vmax=1)
    axes.set_yticks(range(len(rows)), [str(row.config.budget) for row in rows if row.config])
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer", color=INK)
    axes.set_ylabel("tokens that a step reads", color=INK)
    axes.set_title(f"Attention kept: {key[0]}, pages of {key[1]}", loc="left", color=INK, fontsize=10)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.ax.tick_params(labelsize=8, colors=MUTED)
    bar.outline.set_visible(False)
