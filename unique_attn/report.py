"""Render the README's tables of numbers from the committed benchmark results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results -->\n", "<!-- /results -->\n"
ROOT = Path(__file__).resolve().parent.parent


def load(folder: Path) -> list[dict[str, Any]]:
    """All results in ``folder``, by file name."""
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]


def _machine(environment: dict[str, Any]) -> str:
    if environment["device"] == "cpu":
        return f"{environment['cpu']}, {environment['threads']} threads, {environment['cpu_isa']}"
    return str(environment["device"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def decode_table(results: Sequence[dict[str, Any]]) -> str:
    """One row a result of ``bench decode``."""
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
    decodes = [r for r in results if r["bench"] == "decode"]
    parts = [demo_table(result) for result in demos]
    if decodes:
        parts.append(
            "`python -m unique_attn bench decode`, medians with cold caches; SDPA is the fastest of the ways to call "
            "it:\n\n" + decode_table(decodes)
        )
    return "\n".join(parts)


def replace_block(text: str, block: str) -> str:
    """``text`` with ``block`` between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}{block}{END}{after}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m unique_attn report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to rewrite")
    parser.add_argument("--print", action="store_true", help="print the tables instead")
    options = parser.parse_args(argv)
    try:
        block = render(load(options.results))
        if options.print:
            print(block, end="")
        else:
            old = options.readme.read_text("utf-8")
            options.readme.write_text(replace_block(old, block), "utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
