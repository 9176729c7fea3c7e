"""Render the README's tables of numbers and pictures from the committed benchmark results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unique_attn._command import Parser
from unique_attn.bench import _charts, _families, _quality, _tables
from unique_attn.bench._tables import table as _table

BEGIN, END = "<!-- results -->\n", "<!-- /results -->\n"
TRAINING_BEGIN, TRAINING_END = "<!-- training results -->\n", "<!-- /training results -->\n"
FIGURES = "docs"  # folder beside the README
PASSES = ("forward", "backward")
FIGURE_NAMES = {"time": "Time of a training step against length", "memory": "Extra memory of a step against length"}
SIDES = {"soft": "soft mask", "hard": "hard mask", "dense": "no mask, our kernels"}
ROOT = Path(__file__).resolve().parent.parent


def load(folder: Path) -> list[dict[str, Any]]:
    """All results in ``folder``, by file name.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there are no benchmark results in {folder}: they are part of a checkout, not of an installed package; "
            "run this in a checkout, or name their folder with --results and the file to write with --readme"
        )
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]


def _machine(environment: dict[str, Any]) -> str:
    if environment["device"] == "cpu":
        return f"{environment['cpu']}, {environment['threads']} threads, {environment['cpu_isa']}"
    return str(environment["device"])


def decode_table(results: Sequence[dict[str, Any]]) -> str:
    """One row a shape of ``bench decode`` against SDPA."""
    rows = []
    for r in results:
        o, ours, dense = r["options"], r["unique_decode"], r["sdpa"]
        shape = f"{o['batch']} x {o['context'] // 1024}K, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}"
        rows.append(
            (
                _machine(r["environment"]),
                shape,
                f"`{o['rule']}`, {o['budget']} tokens, S={o['page_size']}",
                f"{ours['median_ms']:.2f} ms",
                f"{dense['median_ms']:.2f} ms",
                f"**{r['speedup']:.1f}x**",
                f"{ours['bytes'] / 2**20:.0f} of {dense['bytes'] / 2**20:.0f} MiB",
            )
        )
    head = ("machine", "one decode step of one layer", "selection", "`unique_decode`", "SDPA", "faster", "must read")
    return _table(head, rows)


def demo_table(result: dict[str, Any]) -> str:
    """What ``demo`` printed, as a table."""
    sides = [result["dense"], result["unique"]]
    settings = result["settings"]
    read = [str(result["prompt_tokens"]), str(settings["budget"])]
    rows = [
        ("answer", *(side["answer"] for side in sides)),
        (f"perplexity of the document's last {result['tail_tokens']} tokens", *_each(sides, "tail_perplexity", ".2f")),
        ("tokens/s there", *_each(sides, "tail_tokens_per_second", ".1f")),
        ("cache read per step", *(f"{side['cache_bytes_per_step']['total'] / 2**20:.1f} MiB" for side in sides)),
        ("tokens read per layer and KV head", *read),
    ]
    where = f"{result['model']}, {result['dtype']}, {_machine(result['environment'])}"
    return _table((where, "dense", f"page-sparse, `{settings['rule']}`, S={settings['page_size']}"), rows)


def _each(sides: Sequence[dict[str, Any]], key: str, form: str) -> list[str]:
    return [format(side[key], form) for side in sides]


def render(results: Sequence[dict[str, Any]]) -> str:
    """The block between the two markers of the README."""
    demos = [r for r in results if r["bench"] == "demo"]
    decodes = [
        case
        for r in results
        if r["bench"] == "decode" and r["environment"]["device"] == "cpu"
        for case in _tables.cases_of(r)
        if "median_ms" in case.get("sdpa", {}) and "median_ms" in case["unique_decode"]
    ]
    parts = [demo_table(result) for result in demos]
    if decodes:
        parts.append(
            "`python -m unique_attn bench decode`, medians with cold caches; SDPA is the fastest of the ways to call "
            "it:\n\n" + decode_table(decodes)
        )
    return "\n".join(parts)


def sweeps(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of ``bench soft_mask`` over lengths."""
    return [r for r in results if r["bench"] == "soft_mask" and "lengths" in r]


def side_name(name: str, environment: dict[str, Any]) -> str:
    """How a reader knows a side of ``bench soft_mask``."""
    if name == "sdpa_flash_attention" and environment["device"] != "cpu":
        return "FlashAttention-2"
    return {**SIDES, "sdpa_flash_attention": "SDPA", "sdpa_cudnn": "cuDNN"}.get(name, name)


def training_table(result: dict[str, Any]) -> str:
    """One row a length of a result of ``bench soft_mask``."""
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
    return _table(head[: len(rows[0])], rows)


def training(results: Sequence[dict[str, Any]]) -> str:
    """The block between the markers of training in the README; empty without results over lengths."""
    parts = []
    for number, result in enumerate(sweeps(results)):
        o, environment = result["options"], result["environment"]
        peer = side_name(result["peer"], environment)
        text = (
            f"`python -m unique_attn bench soft_mask` on {_machine(environment)} (torch {environment['torch']}): one "
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
                parts.append(f"![{alt}, {_machine(environment)}]({FIGURES}/{figure_file(name, number)})\n")
    return "\n".join(parts)


# ---- Figures. ----


def figure_file(name: str, number: int) -> str:
    return f"training_{name}{f'_{number + 1}' if number else ''}.png"


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw time and extra memory against length of every result of ``bench soft_mask`` over lengths.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    drawn = []
    for number, result in enumerate(sweeps(results)):
        from unique_attn import viz

        environment = result["environment"]
        names = result["lengths"][0]["sides"]
        tokens = [each["tokens"] for each in result["lengths"]]
        sides = {
            side_name(n, environment): [each["sides"][n] for each in result["lengths"]]
            for n in names
            if all(n in each["sides"] for each in result["lengths"])
        }
        o = result["options"]
        subtitle = f"{_machine(environment)}; {o['heads']} heads, D={o['head_dim']}, {o['dtype']}, budget {o['budget']}"
        drawn.append(
            viz.plot_lengths(
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
                viz.plot_lengths(
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


def draw_all(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every picture of the results.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    return [*draw(results, folder), *_charts.draw(results, folder), *_quality.draw(results, folder)]


# ---- The README. ----


def replace_block(text: str, block: str, opening: str = BEGIN, closing: str = END) -> str:
    """``text`` with ``block`` between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise ValueError(f"expected the lines {opening.strip()} and {closing.strip()}")
    return f"{before}{opening}{block}{closing}{after}"


def blocks(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What goes between which markers of the README."""
    first = {"results": render(results), "training results": training(results)}
    return {
        **first,
        "index quality results": _quality.block(results),
        "families": _families.block(results),
        **_tables.blocks(results),
    }


def markers(name: str) -> tuple[str, str]:
    """The lines around a block."""
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"


def rewrite(text: str, results: Sequence[dict[str, Any]]) -> str:
    """The README ``text`` with the tables of ``results``.

    Raises:
        ValueError: the markers are missing; other ones than the first only if there is something to put there.
    """
    for name, block in blocks(results).items():
        opening, closing = markers(name)
        if block or opening in text or opening == BEGIN:
            text = replace_block(text, block, opening, closing)
    return text


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m unique_attn report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "README.md", help="file to rewrite; pictures go into docs/ beside it"
    )
    parser.add_argument("--print", action="store_true", help="print the tables instead")
    options = parser.parse_args(argv)
    results = load(options.results)
    if options.print:
        print("\n".join(filter(None, blocks(results).values())), end="")
    else:
        old = options.readme.read_text("utf-8")
        options.readme.write_text(rewrite(old, results), "utf-8")
        draw_all(results, options.readme.parent / FIGURES)
        print(f"wrote {options.readme} and the pictures in {options.readme.parent / FIGURES}")
