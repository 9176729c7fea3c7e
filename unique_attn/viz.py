"""Pictures of what page-sparse decoding and sparse prefill read, drawn from records.

:class:`Selections` holds one sequence's choices as a boolean array ``[steps, layers, heads, pages]``;
:func:`plot_selection` draws them in one figure (how many heads read the pages that matter, then maps by step and by
layer and head), :func:`plot_layers` draws every single choice, one panel a layer. :func:`plot_prefill` draws how much
prefill kept. Needs matplotlib; the rest of the package imports this module only to draw.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from unique_attn.prefill import PrefillRecord

Record = tuple[int, torch.Tensor, torch.Tensor]  # layer, seq_lens [B], pages [B, T, H, k]

INK, MUTED, GRID, ACCENT, PAPER = "#1f2933", "#7b8794", "#d9dee3", "#d9730d", "#ffffff"
RAMP = ["#f5f7f9", "#cfdfe8", "#8fb8cc", "#3f87a6", "#14566f", "#0a2e3d"]  # light to dark, one hue
HEADS = ["#14566f", "#b5541c", "#5b6f2f", "#6b4c8a", "#8a6d1d", "#a03e5a", "#37756b", "#4f5b66"]


@dataclass(frozen=True)
class Selections:
    """Which pages one sequence read.

    Attributes:
        read: bool ``[steps, layers, heads, pages]``; True where the head of that layer read the page in that step.
        layers: the model's layer number of each row of ``read``.
        page_size: tokens per page.
        seq_lens: tokens in the cache at each step, the query's own included.
    """

    read: np.ndarray
    layers: tuple[int, ...]
    page_size: int
    seq_lens: tuple[int, ...]

    @classmethod
    def from_records(cls, records: Iterable[Record], *, page_size: int, sequence: int = 0) -> Selections:
        """Collect what :func:`unique_attn.record_selection` recorded.

        Args:
            records: ``(layer, seq_lens [B], pages [B, T, H, k])`` for each layer and decode step, in the order of the
                steps; negative pages are padding. With several query tokens a page counts as read if any read it.
            page_size: tokens per page.
            sequence: which row of the batch.

        Raises:
            ValueError: no records, or layers with different numbers of steps.
        """
        by_layer: dict[int, list[Record]] = {}
        for record in records:
            by_layer.setdefault(record[0], []).append(record)
        if not by_layer:
            raise ValueError("records: expected at least one decode step over pages, got none")
        layers = tuple(sorted(by_layer))
        counts = sorted({len(steps) for steps in by_layer.values()})
        if len(counts) != 1:
            raise ValueError(f"records: expected the same number of steps of each layer, got {counts}")
        seq_lens = tuple(int(lens[sequence]) for _, lens, _ in by_layer[layers[0]])
        heads = by_layer[layers[0]][0][2].shape[2]
        read = np.zeros((counts[0], len(layers), heads, -(-max(seq_lens) // page_size)), dtype=bool)
        for row, layer in enumerate(layers):
            for step, (_, _, pages) in enumerate(by_layer[layer]):
                for head in range(heads):
                    chosen = pages[sequence, :, head].flatten().cpu().numpy()
                    read[step, row, head, chosen[chosen >= 0]] = True
        return cls(read, layers, page_size, seq_lens)

    @property
    def tokens(self) -> int:
        """Length of the position axis, that is the tokens that the pages cover."""
        return int(self.read.shape[-1] * self.page_size)

    def shares(self) -> np.ndarray:
        """How much of the model read each page.

        Returns:
            float64 ``[steps, pages]``: the share, 0 to 1, of the pairs of layer and KV head; NaN for pages that began
            after the step.
        """
        shares = self.read.mean((1, 2))
        for step, length in enumerate(self.seq_lens):
            shares[step, -(-length // self.page_size) :] = np.nan
        return shares

    def numbers(self) -> dict[str, Any]:
        """What a picture shows, as far as numbers can say it: how many pages were read, by step, layer and head."""
        return {"layers": self.layers, "seq_lens": self.seq_lens, "pages_read": self.read.sum(-1).tolist()}


def pyplot() -> Any:
    """``matplotlib.pyplot``, without a window where there is no choice yet."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("unique_attn.viz needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _ramp() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("unique_attn", RAMP)


def _norm() -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, 1)  # a page that few heads read must still show


def style(ax: Any) -> None:
    """No frame, small quiet ticks."""
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.tick_params(length=0, labelsize=8, colors=INK)


def _mark(axes: Sequence[Any], marks: Mapping[str, int]) -> None:
    """Point at each marked token position from above every axis, and name it above the first: the data stays free."""
    for name, position in marks.items():
        for ax in axes:
            ax.plot(
                [position], [1.0], marker="v", markersize=6, color=ACCENT, clip_on=False,
                transform=ax.get_xaxis_transform(), zorder=5,
            )  # fmt: skip
        axes[0].annotate(
            name,
            (position, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=ACCENT,
        )


def _bar(figure: Any, image: Any, box: Sequence[float], label: str) -> None:
    bar = figure.colorbar(image, cax=figure.add_axes(box), ticks=[0, 0.02, 0.1, 0.25, 0.5, 0.75, 1], format="{x:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, colors=INK)
    bar.set_label(label, fontsize=8.5, color=INK)


def _shares(ax: Any, selections: Selections, marks: Mapping[str, int], labels: Sequence[str]) -> dict[str, Any]:
    """Lines over the steps: the share of the heads that read each marked page, and below them the pages as a whole.

    Returns:
        What is drawn: each line by name.
    """
    shares = selections.shares()
    steps = range(len(shares))
    low, median, high = np.nanquantile(shares, (0.1, 0.5, 0.9), axis=1)
    lines = {name: shares[:, position // selections.page_size] for name, position in marks.items()}
    ax.fill_between(steps, low, high, color=RAMP[1], linewidth=0)
    ax.plot(steps, median, color=RAMP[3], linewidth=2)
    shown: dict[str, Any] = {"textcoords": "offset points", "fontsize": 10, "annotation_clip": False}
    for name, values in lines.items():
        ax.plot(steps, values, color=ACCENT, linewidth=2.4, marker="o", markersize=5)
        top = int(np.nanargmax(values))
        ax.annotate(f"page of {name}", (top, values[top]), xytext=(0, 8), ha="center", color=ACCENT, **shown)
    for name, values, color in (("median page", median, RAMP[3]), ("90th percentile\nof all pages", high, MUTED)):
        ax.annotate(name, (steps[-1], values[-1]), xytext=(9, 0), va="center", color=color, **shown)
    ax.set_ylim(0, 1.2 * max(high.max(), *(np.nanmax(values) for values in lines.values())))
    ax.set_xlim(-0.3, len(shares) - 0.7)
    every = max(1, -(-len(shares) // 24))
    ax.set_xticks(range(0, len(shares), every), labels[::every])
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.grid(axis="y", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    return {
        "median page": median.tolist(),
        "90th percentile": high.tolist(),
        **{name: values.tolist() for name, values in lines.items()},
    }


def plot_selection(
    selections: Selections,
    path: str | Path,
    *,
    title: str = "What each decode step read",
    subtitle: str = "",
    step_labels: Sequence[str] | None = None,
    marks: Mapping[str, int] | None = None,
) -> Path:
    """Draw the selections over the token positions, by step and below that by layer and head.

    With ``marks``, a panel on top shows how many heads read the marked pages in each step, beside what they read of the
    other pages: the median, and a band from the 10th to the 90th percentile of all pages.

    Args:
        selections: what was read.
        path: where the PNG goes; its folder is made.
        title, subtitle: above the picture.
        step_labels: a name for each step, such as the generated token.
        marks: positions to point at (in tokens, all in pages of ``selections``), by name, such as "the answer".

    Returns:
        ``path``.
    """
    plt = pyplot()
    read, marks = selections.read, marks or {}
    steps, layers, heads, _ = read.shape
    rows = layers * heads
    by_step = np.nan_to_num(selections.shares())
    by_head = read.mean(0).reshape(rows, -1)
    labels = list(step_labels) if step_labels is not None else [str(i + 1) for i in range(steps)]

    # Inches, from the top: heading, panel of the marked pages, both maps, the axis of positions.
    follow, top, bottom = 2.3 if marks else 0.0, max(1.2, 0.16 * steps), max(2.2, 0.05 * rows)
    head, gap, foot = 1.15, 0.75, 0.62
    height = head + (follow + gap if marks else 0.0) + top + gap + bottom + foot
    figure = plt.figure(figsize=(10.5, height), facecolor=PAPER)
    left, width = 0.1, 0.775
    y_step = foot + bottom + gap
    ax_step = figure.add_axes((left, y_step / height, width, top / height))
    ax_head = figure.add_axes((left, foot / height, width, bottom / height), sharex=ax_step)

    extent = (0, selections.tokens)
    shading: dict[str, Any] = {"aspect": "auto", "cmap": _ramp(), "norm": _norm(), "interpolation": "nearest"}
    image = ax_step.imshow(by_step, extent=(*extent, steps, 0), **shading)
    ax_head.imshow(by_head, extent=(*extent, rows, 0), **shading)
    every = max(1, -(-steps // 48))
    ax_step.set_yticks([i + 0.5 for i in range(0, steps, every)], labels[::every])
    ax_step.set_ylabel("decode step", fontsize=9, color=INK)
    ax_step.tick_params(labelbottom=False)
    every = max(1, -(-layers // 32))
    shown = list(range(0, layers, every))
    ax_head.set_yticks([(i + 0.5) * heads for i in shown], [str(selections.layers[i]) for i in shown])
    ax_head.set_ylabel(f"layer ({heads} KV heads each)", fontsize=9, color=INK)
    ax_head.set_xlabel(f"position in the context (tokens; one page is {selections.page_size})", fontsize=9, color=INK)
    captions = {
        ax_step: f"Which pages, by step: share of the {rows} heads",
        ax_head: f"Which pages, by layer and KV head: share of the {steps} steps",
    }
    shares: dict[str, Any] = {}
    if marks:
        box = (left, (y_step + top + gap) / height, width, follow / height)
        ax_share = figure.add_axes(box)
        shares = _shares(ax_share, selections, marks, labels)
        captions[ax_share] = f"How many of the {rows} heads (layers x KV heads) read a page, by step"
    for ax, caption in captions.items():
        style(ax)
        ax.set_title(caption, loc="left", fontsize=11, color=INK, pad=8)
    for layer in range(1, layers):
        ax_head.axhline(layer * heads, color=PAPER, linewidth=0.5)
    _mark((ax_step, ax_head), marks)

    _bar(figure, image, (left + width + 0.02, foot / height, 0.014, bottom / height), "share that read the page")
    figure.text(left, 1 - 0.28 / height, title, fontsize=15, color=INK, weight="bold", va="top")
    figure.text(left, 1 - 0.59 / height, subtitle, fontsize=9.5, color=MUTED, va="top")
    return save(figure, path, selections.numbers() | {"marks": marks, "shares": shares})


def plot_layers(
    selections: Selections,
    path: str | Path,
    *,
    title: str = "Every page that was read",
    subtitle: str = "",
    marks: Mapping[str, int] | None = None,
    columns: int = 3,
) -> Path:
    """Draw every choice: one panel a layer, a band for each KV head, and in it a line for each step, first step on top.

    Arguments are those of :func:`plot_selection`; ``columns`` is the number of panels side by side.
    """
    plt = pyplot()
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    steps, layers, heads, pages = selections.read.shape
    columns = min(columns, layers)
    lines = -(-layers // columns)
    gap = max(1, steps // 10)
    panel = min(2.2, max(0.55, 0.0095 * heads * (steps + gap)))
    height = lines * (panel + 0.26) + 1.75
    figure = plt.figure(figsize=(5.6 * columns, height), facecolor=PAPER)
    for i, layer in enumerate(selections.layers):
        line, column = divmod(i, columns)
        picture = np.ones((heads * (steps + gap) - gap, pages, 3))
        for head in range(heads):
            band = slice(head * (steps + gap), head * (steps + gap) + steps)
            picture[band] = to_rgb(RAMP[0])
            picture[band][selections.read[:, i, head]] = to_rgb(HEADS[head % len(HEADS)])
        bottom = 1 - (1.05 + (line + 1) * (panel + 0.26)) / height
        box = (0.035 + column * 0.965 / columns, bottom, 0.965 / columns - 0.02, panel / height)
        ax = figure.add_axes(box)
        ax.imshow(
            picture,
            aspect="auto",
            interpolation="nearest",
            extent=(0, selections.tokens, picture.shape[0], 0),
        )
        style(ax)
        ax.set_yticks([])
        ax.set_ylabel(str(layer), rotation=0, fontsize=9, color=INK, ha="right", va="center", labelpad=4)
        below = i + columns >= layers
        ax.tick_params(labelbottom=below)
        if below:
            ax.set_xlabel("position in the context (tokens)", fontsize=9, color=INK)
        for position in (marks or {}).values():
            ax.plot([position], [0], marker="v", markersize=4, color=ACCENT, clip_on=False, zorder=5)
    keys = [Patch(color=HEADS[h % len(HEADS)], label=f"KV head {h}") for h in range(heads)]
    for name in marks or {}:
        keys.append(plt.Line2D([], [], color=ACCENT, marker="v", markersize=6, linewidth=0, label=name))
    figure.legend(
        handles=keys,
        loc="upper right",
        bbox_to_anchor=(0.985, 1 - 0.22 / height),
        ncols=min(len(keys), 9),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    figure.text(0.035, 1 - 0.28 / height, title, fontsize=15, color=INK, weight="bold", va="top")
    note = "one panel a layer (its number at the left), one band a KV head, one line a decode step, first step on top"
    figure.text(
        0.035, 1 - 0.6 / height, f"{subtitle}\n{note}" if subtitle else note, fontsize=9.5, color=MUTED, va="top",
        linespacing=1.4,
    )  # fmt: skip
    return save(figure, path, selections.numbers() | {"marks": marks or {}})


def kept_by_head(records: Iterable[PrefillRecord]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """What sparse prefill kept, over all records of a layer together: of several rows, chunks and calls.

    Args:
        records: what :func:`unique_attn.record_prefill` recorded.

    Returns:
        The layers; ``density`` and ``mass``, both float64 ``[layers, heads]``, NaN where a layer has fewer heads.

    Raises:
        ValueError: no records, or records of one layer with different numbers of heads.
    """
    parts: dict[int, list[tuple[int, int, np.ndarray, np.ndarray]]] = {}
    for each in records:
        part = each.visible, each.query_blocks, each.density.cpu().numpy(), each.mass.cpu().numpy()
        parts.setdefault(each.layer_idx, []).append(part)
    if not parts:
        raise ValueError("records: expected at least one sparse prefill, got none")
    layers = sorted(parts)
    for layer in layers:
        heads = sorted({len(density) for _, _, density, _ in parts[layer]})
        if len(heads) != 1:
            raise ValueError(f"records: expected the same heads in all records of a layer, got {heads}")
    density, mass = (np.full((len(layers), max(len(parts[layer][0][2]) for layer in layers)), np.nan) for _ in range(2))
    for row, layer in enumerate(layers):
        visible, blocks, densities, masses = zip(*parts[layer], strict=True)
        density[row, : len(densities[0])] = np.average(np.stack(densities).astype(float), 0, visible)
        mass[row, : len(masses[0])] = np.average(np.stack(masses).astype(float), 0, blocks)
    return layers, density, mass


def plot_prefill(
    records: Iterable[PrefillRecord], path: str | Path, *, title: str = "What sparse prefill kept", subtitle: str = ""
) -> Path:
    """Draw by layer and head the share of the key blocks that prefill kept, and of the estimated attention that it
    dropped with the others.

    Args:
        records: what :func:`unique_attn.record_prefill` recorded.
        path: where the PNG goes; its folder is made.
        title, subtitle: above the picture.

    Returns:
        ``path``.

    Raises:
        ValueError: see :func:`kept_by_head`.
    """
    layers, density, mass = kept_by_head(records)
    plt = pyplot()
    maps = {
        f"Key blocks that were kept ({np.nanmean(density):.0%})": density,
        f"Estimated attention that was dropped ({np.nanmean(1 - mass):.1%})": 1 - mass,
    }
    # Inches.
    width, left, wide, apart, foot, tall = 10.5, 0.6, 4.0, 4.95, 0.55, max(1.6, 0.22 * len(layers))
    height = foot + tall + 1.35
    figure = plt.figure(figsize=(width, height), facecolor=PAPER)
    every = max(1, -(-len(layers) // 32))
    for column, (caption, values) in enumerate(maps.items()):
        x = left + column * apart
        ax = figure.add_axes((x / width, foot / height, wide / width, tall / height))
        image = ax.imshow(values, aspect="auto", cmap=_ramp(), norm=_norm(), interpolation="nearest")
        style(ax)
        ax.set_title(caption, loc="left", fontsize=11, color=INK, pad=8)
        ax.set_xlabel("head", fontsize=9, color=INK)
        ax.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        ax.xaxis.get_major_locator().set_params(integer=True)
        _bar(figure, image, ((x + wide + 0.12) / width, foot / height, 0.012, tall / height), "")
    figure.axes[0].set_ylabel("layer", fontsize=9, color=INK)
    figure.text(left / width, 1 - 0.28 / height, title, fontsize=15, color=INK, weight="bold", va="top")
    figure.text(left / width, 1 - 0.59 / height, subtitle, fontsize=9.5, color=MUTED, va="top")
    return save(figure, path, {"layers": layers, "density": density.tolist(), "mass": mass.tolist()})


def save(figure: Any, path: str | Path, numbers: Mapping[str, Any]) -> Path:
    """Write a picture and, as a text in it, the numbers it was drawn from: by them, not by pixels, which depend on
    matplotlib's version, the tests tell whether a picture is still the one of its data."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor=PAPER, metadata={"Comment": json.dumps(numbers)})
    pyplot().close(figure)
    return path
