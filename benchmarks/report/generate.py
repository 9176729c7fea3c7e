"""What plain ``generate()`` gives: a table and a picture of milliseconds per new token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import plots
from benchmarks.report.tables import Case, Result, machine, ms, tokens
from benchmarks.suite.generate import COMPILED, STATIC, STOCK, UNIQUE
from examples.support.results import markdown

FIGURE = "generate_speed.png"
SIDES = {STOCK: "stock attention", f"{UNIQUE}_exact": "exact index", f"{UNIQUE}_compressed": "compressed index"}
STATIC_SIDES = {  # of shapes in which static caches were timed as well
    STOCK: "stock attention",
    STATIC: "stock, static cache, compiled",
    f"{UNIQUE}_compressed": "ours",
    f"{COMPILED}_compressed": "ours, static cache, compiled",
}


def of_gpus(results: Sequence[Result]) -> list[tuple[Result, list[Case]]]:
    """Results of a GPU, each with the shapes in which stock attention and ours were timed."""
    found = []
    for result in results:
        if result["bench"] == "generate" and result["environment"]["device"] != "cpu":
            cases = [case for case in result["cases"] if all(name in _times(case) for name in SIDES)]
            found += [(result, cases)] if cases else []
    return found


def _times(case: Case) -> dict[str, float]:
    return {name: side["median_ms"] for name, side in case.get("sides", {}).items() if "median_ms" in side}


def _has_static(case: Case) -> bool:
    return set(STATIC_SIDES) <= set(_times(case))


def block(results: Sequence[Result]) -> str:
    """The block ``generate results``."""
    parts, with_static = [], []
    for result, every in of_gpus(results):
        cases = [case for case in every if not _has_static(case)]
        with_static += [_static_table(result, [case for case in every if _has_static(case)])]
        if not cases:
            continue
        o = cases[0]["options"]
        rows = [
            {
                "batch": tokens(case["options"]["batch"]),
                "context": tokens(case["options"]["context"]),
                **{name: _cell(case, side) for side, name in SIDES.items()},
                "of the captured step": _range(case["over_step"].values()),
                "first token": _range(_first(case).values()),
            }
            for case in cases
        ]
        parts.append(
            f"`model.generate()` on {machine(result)}, transformers {result['peers']['transformers']}: Llama with "
            f"{o['layers']} layers, {o['heads']} heads, D={o['head_dim']}, hidden {o['hidden']}, {o['dtype']}, random "
            f"weights; `{o['rule']}`, {o['budget']} tokens in pages of {o['page_size']}. Time of a new token, memory "
            "that is held after the last one beside the weights, and how many times faster than stock. In brackets: a "
            "token of stock's first call, in which the attention that PyTorch chose here plans every length anew. *Of "
            "the captured step*: a token's time by that of the step alone, without transformers' loop. *First token*: "
            "its time by stock's.\n\n" + markdown(pd.DataFrame(rows))
        )
    return "\n".join([*parts, *filter(None, with_static)])


def _static_table(result: Result, cases: Sequence[Case]) -> str:
    """Of stock's fastest way, a static cache that transformers compiles (reduce-overhead), and ours beside it."""
    if not cases:
        return ""
    o = cases[0]["options"]
    rows = [
        {
            "batch": tokens(case["options"]["batch"]),
            "context": tokens(case["options"]["context"]),
            **{name: _against_static(case, side) for side, name in STATIC_SIDES.items()},
        }
        for case in cases
    ]
    return (
        f'The same model of {o["layers"]} layers on {machine(result)}, with `cache_implementation="static"`, whose '
        "steps transformers compiles and captures, beside the usual caches; ours with the compressed index. How many "
        "times faster than stock's static cache:\n\n" + markdown(pd.DataFrame(rows))
    )


def _against_static(case: Case, name: str) -> str:
    factor = case["speedups"].get(name, {}).get(STATIC)
    return ms(_times(case)[name]) + (f", **{factor:.1f}x**" if factor else "")


def _cell(case: Case, name: str) -> str:
    side = case["sides"][name]
    cell = ms(side["median_ms"])
    if name == STOCK:
        cell += f" ({ms(side['cold_ms'])})"
    if side["held_bytes"]:
        cell += f", {side['held_bytes'] / 2**30:.2f} GiB"
    factor = case["speedups"].get(name, {}).get(STOCK)
    return f"{cell}, **{factor:.1f}x**" if factor else cell


def _first(case: Case) -> dict[str, float]:
    stock = case["sides"][STOCK]["first_ms"]
    return {name: case["sides"][name]["first_ms"] / stock for name in SIDES if name != STOCK}


def _range(values: Any) -> str:
    found = sorted({f"{value:.2f}" for value in values})
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else ""


def headline(results: Sequence[Result], shapes: Sequence[Mapping[str, Any]]) -> list[tuple[Case, str, float, float]]:
    """Cases of these shapes, with the name and the milliseconds of stock attention, and ours. Where stock was timed
    with a static cache too, with that one."""
    cases = [case for _, each in of_gpus(results) for case in each]
    wanted = [case for shape in shapes for case in cases if shape.items() <= case["options"].items()]
    found = []
    for case in wanted:
        stock = STATIC if _has_static(case) else STOCK
        found.append((case, stock, _times(case)[stock], _times(case)[f"{UNIQUE}_compressed"]))
    return found


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw milliseconds of a new token against the context, for one sequence.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    for result, cases in of_gpus(results):
        single = sorted((c for c in cases if c["options"]["batch"] == 1), key=lambda c: c["options"]["context"])
        if len(single) < 3:
            continue
        o = single[0]["options"]
        lines = {name: [_times(case)[side] for case in single] for side, name in SIDES.items()}
        subtitle = (
            f"{result['environment']['device']}, one sequence; {o['layers']} layers, {o['heads']} heads, "
            f"D={o['head_dim']}, {o['dtype']}; {o['budget']} tokens read per KV head"
        )
        lengths = [case["options"]["context"] for case in single]
        title = "What a new token of generate() takes"
        return [
            plots.plot_lengths(
                lengths,
                lines,
                folder / FIGURE,
                title=title,
                subtitle=subtitle,
                ylabel="milliseconds",
                logarithmic=True,
            )
        ]
    return []
