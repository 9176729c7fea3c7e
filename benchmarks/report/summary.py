"""The tables of a CPU: what the demo printed, and a decode step of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.report import tables
from examples.support.results import markdown


def machine(environment: dict[str, Any]) -> str:
    """The machine of a result in a few words."""
    if environment["device"] == "cpu":
        return f"{environment['cpu']}, {environment['threads']} threads, {environment['cpu_isa']}"
    return str(environment["device"])


def of_models(results: Sequence[Mapping[str, Any]], bench: str) -> list[Mapping[str, Any]]:
    """The results of a benchmark of real models, by model and length; those on a CPU if no GPU has the length."""
    every = [result for result in results if result["bench"] == bench and result["cases"]]

    def shapes(result: Mapping[str, Any]) -> set[tuple[str, int]]:
        return {(result["model"], case["length"]) for case in result["cases"]}

    on_gpu = [r for r in every if r["environment"]["device"] != "cpu"]
    known = set().union(*map(shapes, on_gpu))
    chosen = [*on_gpu, *(r for r in every if r["environment"]["device"] == "cpu" and not shapes(r) & known)]
    return sorted(chosen, key=lambda r: (r["model"], max(case["length"] for case in r["cases"])))


def decode_table(results: Sequence[dict[str, Any]]) -> str:
    """One row a shape of ``decode`` against SDPA."""
    rows = []
    for r in results:
        o, ours, dense = r["options"], r["unique_decode"], r["sdpa"]
        shape = f"{o['batch']} x {o['context'] // 1024}K, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}"
        rows.append(
            (
                machine(r["environment"]),
                shape,
                f"`{o['rule']}`, {o['budget']} tokens, S={o['page_size']}",
                f"{ours['median_ms']:.2f} ms",
                f"{dense['median_ms']:.2f} ms",
                f"**{r['speedup']:.1f}x**",
                f"{ours['bytes'] / 2**20:.0f} of {dense['bytes'] / 2**20:.0f} MiB",
            )
        )
    head = ["machine", "one decode step of one layer", "selection", "`unique_decode`", "SDPA", "faster", "must read"]
    return markdown(pd.DataFrame(rows, columns=head))


def demo_table(result: dict[str, Any]) -> str:
    """What the demo printed, as a table."""
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
    where = f"{result['model']}, {result['dtype']}, {machine(result['environment'])}"
    head = [where, "dense", f"page-sparse, `{settings['rule']}`, S={settings['page_size']}"]
    return markdown(pd.DataFrame(rows, columns=head))


def _each(sides: Sequence[dict[str, Any]], key: str, form: str) -> list[str]:
    return [format(side[key], form) for side in sides]


def demo(results: Sequence[dict[str, Any]]) -> str:
    """The block ``demo results``."""
    return "\n".join(demo_table(result) for result in results if result["bench"] == "demo")


def decode(results: Sequence[dict[str, Any]]) -> str:
    """The block ``decode results cpu``."""
    cases = [
        case
        for r in results
        if r["bench"] == "decode" and r["environment"]["device"] == "cpu"
        for case in tables.cases_of(r)
        if "median_ms" in case.get("sdpa", {}) and "median_ms" in case["unique_decode"]
    ]
    if not cases:
        return ""
    return (
        "`python -m benchmarks decode`, medians with cold caches; SDPA is the fastest of the ways to call it:\n\n"
        + decode_table(cases)
    )
