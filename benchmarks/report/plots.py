"""Pictures of measurements: against lengths, of gains against costs, of times over bytes. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unique_attn import viz

FOLDER = "docs"  # of the pictures, seen from the root of a checkout


def image(alt: str, file: str) -> str:
    """A line that shows a picture, on a page at the root; :mod:`benchmarks.report.pages` fits it to other pages."""
    return f"![{alt}]({FOLDER}/{file})\n"


def _axes(title: str, subtitle: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure, ax = viz.pyplot().subplots(figsize=(8.4, 4.8), facecolor=viz.PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    figure.suptitle(title, x=0.02, ha="left", fontsize=15, color=viz.INK, weight="bold")
    ax.set_title(subtitle, loc="left", fontsize=9.5, color=viz.MUTED, pad=12)
    ax.grid(axis="y", color=viz.GRID, linewidth=0.7)
    viz.style(ax)
    ax.set_xlabel(xlabel, fontsize=9, color=viz.INK)
    ax.set_ylabel(ylabel, fontsize=9, color=viz.INK)
    return figure, ax


def _save(figure: Any, lines: Sequence[Any], path: str | Path, numbers: Mapping[str, Any]) -> Path:
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": viz.INK, "handlelength": 2.8}
    figure.legend(handles=lines, loc="outside right center", **style)
    return viz.save(figure, path, numbers)


def plot_lengths(
    lengths: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    ylabel: str = "",
    logarithmic: bool = False,
) -> Path:
    """Draw measured values against sequence lengths, one line a name.

    Args:
        lengths: tokens, ascending.
        lines: a value for each length, NaN where there is none (not in all places of a line).
        path: file to write.
        title: the heading.
        subtitle: a smaller line below it.
        ylabel: what the values are.
        logarithmic: both axes by factors, so that a straight line is a power; else from 0 on.

    Returns:
        ``path``.
    """
    figure, ax = _axes(title, subtitle, "tokens", ylabel)
    drawn = {}
    for i, (name, values) in enumerate(lines.items()):
        points = [(length, value) for length, value in zip(lengths, values) if not math.isnan(value)]
        style: dict[str, Any] = {
            "color": viz.HEADS[i % len(viz.HEADS)],
            "linestyle": "--" if i >= len(viz.HEADS) else "-",
        }
        (line,) = ax.plot(*zip(*points), marker="o", markersize=4, linewidth=1.8, label=name, **style)
        drawn[line] = points[-1][1]
    if logarithmic:
        from matplotlib.ticker import FormatStrFormatter, LogLocator

        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        low, high = ax.dataLim.intervaly
        factors = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if high < 8 * low else (1.0, 2.0, 5.0)
        ax.yaxis.set_major_locator(LogLocator(subs=factors))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
    ax.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    ax.minorticks_off()
    names = sorted(drawn, key=lambda line: -drawn[line])  # from top to bottom as the lines end
    return _save(figure, names, path, {"subtitle": subtitle, "lengths": lengths, "lines": lines})


def plot_speedups(
    lines: Mapping[str, Mapping[int, float]], path: str | Path, *, title: str, subtitle: str = ""
) -> Path:
    """Draw how many times faster something is against sequence lengths, with the names of the lines at their ends.

    Args:
        lines: by name, tokens (ascending) and the factor there.
        path: file to write.
        title: the heading.
        subtitle: a smaller line below it.

    Returns:
        ``path``.
    """
    figure, ax = _axes(title, subtitle, "tokens in the context", "times faster than the fastest dense attention")
    lengths = sorted({length for line in lines.values() for length in line})
    highest = max(factor for line in lines.values() for factor in line.values())
    ax.set_xscale("log", base=2)
    ax.set_xlim(lengths[0] / 1.15, lengths[-1] * 3.6)  # room for the names
    ax.set_ylim(0, 1.08 * highest)
    ax.axhline(1, color=viz.MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    style: dict[str, Any] = {"textcoords": "offset points", "zorder": 3}
    style["bbox"] = {"facecolor": viz.PAPER, "edgecolor": "none", "pad": 1}
    ax.annotate("as fast as dense", (lengths[0], 1), xytext=(0, -6), va="top", fontsize=10, color=viz.MUTED, **style)
    place = -math.inf  # of the name before, in the unit of the factors
    ends = [(*list(line.items())[-1], name, color) for (name, line), color in zip(lines.items(), viz.HEADS)]
    for length, factor, name, color in sorted(ends, key=lambda end: end[1]):
        line = lines[name]
        ax.plot(list(line), list(line.values()), color=color, marker="o", markersize=6, linewidth=2.4)
        place = max(factor, place + 0.06 * highest)
        text = f"{name}: {factor:.1f}x"
        ax.annotate(text, (length, place), xytext=(10, 0), va="center", fontsize=11.5, color=color, **style)
    ax.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.tick_params(labelsize=10)
    return viz.save(figure, path, {"subtitle": subtitle, "lines": lines})


def plot_tradeoff(
    lines: Mapping[str, Sequence[tuple[float, float, str]]],
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    xlabel: str = "",
    ylabel: str = "",
) -> Path:
    """Draw what is gained against what it costs, one line a name, the costs by factors of two.

    Args:
        lines: ``(cost, gain, label)`` of each point, in the order in which they are joined.
        path: file to write.
        title: the heading.
        subtitle: a smaller line below it.
        xlabel: what the costs are.
        ylabel: what the gains are.

    Returns:
        ``path``.
    """
    from matplotlib.ticker import FormatStrFormatter

    figure, ax = _axes(title, subtitle, xlabel, ylabel)
    for (name, points), color in zip(lines.items(), viz.HEADS):
        x, y, labels = zip(*points)
        ax.plot(x, y, color=color, marker="o", markersize=4.5, linewidth=1.8, label=name)
        for at, text in zip(zip(x, y), labels):
            ax.annotate(text, at, xytext=(4, -10), textcoords="offset points", fontsize=7.5, color=viz.MUTED)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.minorticks_off()
    return _save(figure, ax.lines, path, {"subtitle": subtitle, "lines": lines})


def plot_panels(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]],
    path: str | Path,
    *,
    title: str,
    subtitle: str,
    level: float,
) -> Path:
    """Draw a grid of small plots with the same axes: densities on a linear axis, what they cost on a logarithmic one.

    Args:
        panels: by row, by column, by name of a line, its points ``(density, value)``.
        path: file to write.
        title: the heading.
        subtitle: a smaller line below it.
        level: a value that is marked in every panel.

    Returns:
        ``path``.
    """
    columns = list(dict.fromkeys(column for row in panels.values() for column in row))
    figure, grid = viz.pyplot().subplots(
        len(panels), len(columns), figsize=(2.6 * len(columns) + 1, 2.3 * len(panels) + 1.6), facecolor=viz.PAPER,
        layout="constrained", sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1, rect=(0, 0, 1, 1 - 0.75 / figure.get_figheight()))
    figure.text(0.02, 1 - 0.12 / figure.get_figheight(), title, fontsize=15, color=viz.INK, weight="bold", va="top")
    figure.text(0.02, 1 - 0.45 / figure.get_figheight(), subtitle, fontsize=9.5, color=viz.MUTED, va="top")
    names = list(dict.fromkeys(name for row in panels.values() for lines in row.values() for name in lines))
    drawn: dict[str, Any] = {}
    for axes, (row, cells) in zip(grid, panels.items()):
        first = next(column for column in columns if column in cells)
        for ax, column in zip(axes, columns):
            viz.style(ax)
            ax.set_visible(column in cells)
            ax.set_yscale("log")
            ax.set_xlim(0, 1)
            ax.grid(color=viz.GRID, linewidth=0.7)
            ax.axhline(level, color=viz.MUTED, linewidth=1, linestyle=(0, (4, 3)))
            ax.set_title(column, fontsize=9, color=viz.INK)
            ax.tick_params(labelleft=column == first, labelbottom=True)
            if column == first:
                ax.set_ylabel(row.replace(", ", "\n"), fontsize=8.5, color=viz.INK)
            for name, points in cells.get(column, {}).items():
                style = {"marker": "o", "markersize": 3.5, "linewidth": 1.6, "clip_on": False}
                (drawn[name],) = ax.plot(*zip(*points), color=viz.HEADS[names.index(name) % len(viz.HEADS)], **style)
                drawn[name].set_label(name)
    style = {"frameon": False, "fontsize": 9, "labelcolor": viz.INK, "handlelength": 2.8}
    figure.legend(handles=[drawn[name] for name in names], loc="outside lower left", ncols=2, **style)
    return viz.save(figure, path, {"subtitle": subtitle, "panels": panels})


def plot_budgets(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    levels: Mapping[str, float],
    path: str | Path,
    *,
    title: str,
    subtitle: str,
    columns: int = 3,
) -> Path:
    """Draw small plots with the same axes: a value from 0 on against budgets by factors of two.

    Args:
        panels: by name, by name of a line, a value for each budget.
        levels: by name of a panel, what is marked in it: the value of dense attention.
        path: file to write.
        title: the heading.
        subtitle: a smaller line below it.
        columns: most panels side by side.

    Returns:
        ``path``.
    """
    wide = min(columns, len(panels))
    high = -(-len(panels) // wide)
    figure, grid = viz.pyplot().subplots(
        high, wide, figsize=(max(6.4, 3.1 * wide + 0.4), 2.5 * high + 1.5), facecolor=viz.PAPER, layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1, rect=(0, 0, 1, 1 - 0.75 / figure.get_figheight()))
    figure.text(0.02, 1 - 0.12 / figure.get_figheight(), title, fontsize=15, color=viz.INK, weight="bold", va="top")
    figure.text(0.02, 1 - 0.45 / figure.get_figheight(), subtitle, fontsize=9.5, color=viz.MUTED, va="top")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    budgets = sorted({budget for lines in panels.values() for line in lines.values() for budget in line})
    highest = max(
        *levels.values(), *(value for lines in panels.values() for line in lines.values() for value in line.values())
    )
    drawn: dict[str, Any] = {}
    for ax in grid.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (panel, lines) in zip(grid.flat, panels.items()):
        viz.style(ax)
        ax.grid(color=viz.GRID, linewidth=0.7)
        ax.axhline(levels[panel], color=viz.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_title(panel, fontsize=9, color=viz.INK)
        for name, line in lines.items():
            color = viz.HEADS[names.index(name) % len(viz.HEADS)]
            (drawn[name],) = ax.plot(*zip(*sorted(line.items())), color=color, marker="o", markersize=4, label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(budgets, [str(budget) for budget in budgets])
        ax.minorticks_off()
        ax.tick_params(labelbottom=True)
        ax.set_ylim(0, 1.06 * highest)
    for ax in grid[:, 0]:
        ax.set_ylabel("average score (%)", fontsize=8.5, color=viz.INK)
    style = {"frameon": False, "fontsize": 9, "labelcolor": viz.INK, "handlelength": 2.8}
    figure.legend(handles=[drawn[name] for name in names], loc="outside lower left", ncols=4, **style)
    return viz.save(figure, path, {"subtitle": subtitle, "panels": panels, "levels": levels})


def plot_roofline(
    points: Mapping[str, Sequence[tuple[float, float]]],
    gb_per_s: float,
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
) -> Path:
    """Draw measured times over bytes, both logarithmic, and the line of the bandwidth that no point can be below.

    Args:
        points: MiB and µs of every measurement, by name.
        gb_per_s: the bandwidth.
        path: file to write.
        title, subtitle: above the picture.

    Returns:
        ``path``.
    """
    figure, ax = _axes(title, subtitle, "MiB that must be moved", "µs")
    sizes = [size for values in points.values() for size, _ in values]
    ends = [min(sizes) / 1.5, max(sizes) * 1.5]
    floor = [size * 2**20 / gb_per_s / 1e3 for size in ends]
    ax.plot(ends, floor, color=viz.ACCENT, linewidth=1.5, label=f"{gb_per_s / 1e3:.2f} TB/s, measured")
    for i, (name, values) in enumerate(points.items()):
        ax.plot(*zip(*values), "o", color=viz.HEADS[i % len(viz.HEADS)], markersize=4, alpha=0.8, label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.minorticks_off()
    ax.grid(color=viz.GRID, linewidth=0.7)
    return _save(figure, ax.lines, path, {"subtitle": subtitle, "points": points, "gb_per_s": gb_per_s})
