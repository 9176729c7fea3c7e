"""Table and pictures of a training step over lengths, from results of ``soft_mask``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import plots
from benchmarks.report.summary import machine
from examples.support.results import markdown

PASSES = ("forward", "backward")
FIGURE_NAMES = {"time": "Time of a training step against length", "memory": "Extra memory of a step against length"}
SIDES = {"soft": "soft mask", "hard": "hard mask", "dense": "no mask, our kernels"}


def sweeps(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of ``soft_mask`` over lengths."""
    return [r for r in results if r["bench"] == "soft_mask" and "lengths" in r]


def side_name(name: str, environment: dict[str, Any]) -> str:
    """How a reader knows a side of ``soft_mask``."""
    if name == "sdpa_flash_attention" and environment["device"] != "cpu":
        return "FlashAttention-2"
    return {**SIDES, "sdpa_flash_attention": "SDPA", "sdpa_cudnn": "cuDNN"}.get(name, name)


def training_table(result: dict[str, Any]) -> str:
    """One row a length of a result of ``soft_mask``."""
    environment, peer = result["environment"], result["peer"]
    names = [peer, *(n for n in result["lengths"][0]["sides"] if n.startswith("sdpa_") and n != peer), *SIDES]
    rows = []
    for each in result["lengths"]:
        sides, parts = each["sides"], each["parts"]
        times = []
        for name in names:
            if name not in sides:
                times.append("-")
                continue
            side = sides[name]
            ratio = side["times_peer"]["step"]
            factor = "" if name == peer else f" (**{ratio:.2f}x**)" if name == "soft" else f" ({ratio:.2f}x)"
            times.append(f"{side['forward']['median_ms']:.2f} + {side['backward_ms']:.2f} ms{factor}")
        rates = " / ".join(f"{sides[name]['tflops']['step']:.3g}" for name in ("soft", peer))
        before = " + ".join(f"{parts[name]['median_ms']:.2f}" for name in ("index", "boundary"))
        memory = sides["soft"]["memory"]
        extra = [] if memory is None else [" / ".join(f"{memory[f'{p}_bytes'] / 2**20:.0f}" for p in PASSES) + " MiB"]
        rows.append((f"{each['tokens']:,}", *times, rates, f"{before} ms", *extra))
    shown = [side_name(name, environment) for name in names]
    head = ("tokens", *shown, f"TFLOP/s, soft / {shown[0]}", "index + boundary", "extra memory, soft")
    return markdown(pd.DataFrame(rows, columns=head[: len(rows[0])]))


def block(results: Sequence[dict[str, Any]]) -> str:
    """The block of training; empty without results over lengths."""
    parts = []
    for number, result in enumerate(sweeps(results)):
        o, environment = result["options"], result["environment"]
        peer = side_name(result["peer"], environment)
        text = (
            f"`python -m benchmarks soft_mask` on {machine(environment)} (torch {environment['torch']}): one "
            f"layer, one sequence, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}, `{o['rule']}`, {o['budget']} "
            f"tokens in pages of {o['page_size']}; forward + backward, medians with cold caches, total against {peer}. "
            "TFLOP/s count causal attention (2 N^2 D Hq forward, 2.5 times that backward). Soft mode's time contains "
            "its index and boundary."
        )
        if result["bytes_per_token"]:
            soft = result["bytes_per_token"]["soft"]
            text += (
                " Extra memory is the peak beside inputs, output and gradients, forward / backward; soft mode's grows "
                f"by {soft['forward']:.0f} / {soft['backward']:.0f} bytes per token (least squares)."
            )
        parts.append(f"{text}\n\n{training_table(result)}")
        for name, alt in FIGURE_NAMES.items():
            if name == "time" or result["lengths"][0]["sides"]["soft"]["memory"]:
                parts.append(plots.image(f"{alt}, {machine(environment)}", figure_file(name, number)))
    return "\n".join(parts)


# ---- Figures. ----


def figure_file(name: str, number: int) -> str:
    return f"training_{name}{f'_{number + 1}' if number else ''}.png"


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw time and extra memory against length of every result of ``soft_mask`` over lengths.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    drawn = []
    for number, result in enumerate(sweeps(results)):
        environment = result["environment"]
        names = result["lengths"][0]["sides"]
        tokens = [each["tokens"] for each in result["lengths"]]
        sides = {
            side_name(n, environment): [each["sides"][n] for each in result["lengths"]]
            for n in names
            if all(n in each["sides"] for each in result["lengths"])
        }
        o = result["options"]
        subtitle = f"{machine(environment)}; {o['heads']} heads, D={o['head_dim']}, {o['dtype']}, budget {o['budget']}"
        drawn.append(
            plots.plot_lengths(
                tokens,
                {name: [each["step"]["median_ms"] for each in points] for name, points in sides.items()},
                folder / figure_file("time", number),
                title="One training step of one layer",
                subtitle=subtitle,
                ylabel="ms, forward and backward",
                logarithmic=True,
            )
        )
        if all(each["memory"] is not None for points in sides.values() for each in points):
            drawn.append(
                plots.plot_lengths(
                    tokens,
                    {
                        name: [max(each["memory"][f"{part}_bytes"] for part in PASSES) / 2**20 for each in points]
                        for name, points in sides.items()
                    },
                    folder / figure_file("memory", number),
                    title="Memory beside inputs, output and gradients",
                    subtitle=subtitle,
                    ylabel="MiB at the peak of a training step",
                )
            )
    return drawn
