"""What decoding under vLLM gives: a table of milliseconds per step, and what the index takes of the cache."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.report.tables import Case, Result, machine, ms, tokens
from benchmarks.suite.serve import STOCK
from examples.support.results import markdown

SIDES = {STOCK: "vLLM's attention", "unique_exact": "exact index", "unique_compressed": "compressed index"}


def block(results: Sequence[Result]) -> str:
    """The block ``serve results``; empty without results of a GPU."""
    parts = []
    for result in results:
        if result["bench"] != "serve" or result["environment"]["device"] == "cpu":
            continue
        sides = [name for name in SIDES if any("median_ms" in case["sides"][name] for case in result["cases"])]
        rows = [
            {
                "batch": tokens(case["options"]["batch"]),
                "context": tokens(case["options"]["context"]),
                **{SIDES[name]: _cell(case, name) for name in sides},
                **{f"first token, {SIDES[name]}": _first(case, name) for name in sides},
            }
            for case in result["cases"]
        ]
        o = result["cases"][0]["options"]
        longest = tokens(max(case["options"]["context"] for case in result["cases"]))
        text = (
            f"`python -m benchmarks serve` on {machine(result)}, vLLM {result['peers']['vllm']}: Llama with "
            f"{o['layers']} layers, {o['heads']} heads, D={o['head_dim']}, bf16, dummy weights, full CUDA graphs, "
            f"prefix caching, max_model_len {longest}; `directional`, {result['budget']} tokens. A decode step, and "
            "how many times faster than vLLM's own attention in the same run."
        )
        if "note" in result:
            text += f" The engine ran {result['engine']}. This file was {result['note']}."
        parts.append(f"{text}\n\n{markdown(pd.DataFrame(rows))}\n\n{_engines(result)}")
    return "\n".join(parts)


def _cell(case: Case, name: str) -> str:
    side = case["sides"][name]
    if "median_ms" not in side:
        return "-"
    factor = case["speedups"].get(name)
    return ms(side["median_ms"]) + (f", **{factor:.2f}x**" if factor else "")


def _first(case: Case, name: str) -> str:
    first = case["sides"][name].get("first_ms")
    return f"{first:.0f} ms" if first else ""


def _engines(result: Result) -> str:
    lines = []
    for each in result["engines"]:
        if "kv_tokens" not in each:
            continue
        line = f"- {SIDES[each['side']]}: room for {each['kv_tokens'] / 1e6:.2f} million tokens"
        load = each.get("load")
        if load:
            line += (
                f"; {load['requests']} requests of mixed lengths ({load['prompt_tokens']} tokens of prompts, "
                f"{load['answer_tokens']} of answers) take {load['seconds']:.1f} s"
            )
        lines.append(line + ".")
    return "\n".join(lines) + "\n"
