"""Tables and picture of how fast sparse prefill is, from results of ``prefill`` and ``ttft``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import plots
from benchmarks.report.summary import machine
from benchmarks.report.tables import ms, tokens
from examples.support.results import markdown

Result = Mapping[str, Any]

FIGURE = "prefill_speed.png"
SIDES = {"sdpa_flash_attention": "FlashAttention-2", "sdpa_cudnn": "cuDNN", "dense": "our dense kernel"}
PEERS = ("sdpa_flash_attention", "sdpa_cudnn")
FLASHINFER = "flashinfer_"  # and the backend
SETTINGS = {"threshold": "threshold", "top_p": "top-p"}


def _name(side: str, result: Result) -> str:
    if side == PEERS[0] and result["environment"]["device"] == "cpu":
        return "SDPA"
    return SIDES[side]


def _timed(result: Result) -> list[dict[str, Any]]:
    """The cases of which sparse attention was timed."""
    return [case for case in result["cases"] if "median_ms" in case.get("sides", {}).get("lists", {})]


def _results(results: Sequence[Result], bench: str) -> list[Result]:
    found = [result for result in results if result["bench"] == bench]
    return sorted(found, key=lambda result: result["environment"]["device"] == "cpu")  # GPUs first


# ---- One layer. ----


def _cell(case: Mapping[str, Any], name: str) -> str:
    side = case["sides"].get(name, {})
    return ms(side["median_ms"]) if "median_ms" in side else "-"


def _flashinfer_cell(case: Mapping[str, Any]) -> str:
    """The fastest backend's time, and its name."""
    timed = {
        name: side["median_ms"]
        for name, side in case["sides"].items()
        if name.startswith(FLASHINFER) and "median_ms" in side
    }
    if not timed:
        return "-"
    best = min(timed, key=lambda name: timed[name])
    return f"{ms(timed[best])} ({best.removeprefix(FLASHINFER)})"


def speed_table(result: Result, cases: Sequence[Mapping[str, Any]]) -> str:
    """A row for each length and density, and each method of selection."""
    dense = [name for name in SIDES if any("median_ms" in case["sides"].get(name, {}) for case in cases)]
    peers = [name for name in PEERS if name in dense]
    flex = any("median_ms" in case["sides"].get("flex", {}) for case in cases)
    flashinfer = any(_flashinfer_cell(case) != "-" for case in cases)
    methods = list(dict.fromkeys(method for case in cases for method in case["calls"]))
    rows = []
    for case in cases:
        for method in methods:
            call = case["calls"].get(method, {})
            per_block = case["lists"]["percent_of_dense_per_block"]
            row = {"tokens": tokens(case["tokens"]), "density": f"{case['density']:g}%"}
            row |= {_name(name, result): _cell(case, name) for name in dense}
            row["given lists"] = _cell(case, "lists") + (f", {per_block:.0f}% a block" if per_block else "")
            if flex:
                row["FlexAttention, same lists"] = _cell(case, "flex")
            if flashinfer:
                row["a list per KV head"] = _cell(case, "shared_lists")
                row["FlashInfer, the same"] = _flashinfer_cell(case)
            if len(methods) > 1:
                row["method"] = f"`{method}`"
            row["whole call"] = _cell(case, f"{method}_call")
            percent = call.get("selection_percent")
            row["selection"] = f"{percent:.1f}%" if percent else "-"
            for peer in peers:
                factor = call.get("speedups", {}).get(peer)
                row[f"faster than {_name(peer, result)}"] = f"**{factor:.2f}x**" if factor else "-"
            rows.append(row)
    return markdown(pd.DataFrame(rows))


def block(results: Sequence[Result]) -> str:
    """The block ``PREFILL-SPEED``: one layer, then a whole model; empty without results."""
    return "\n".join([*_layers(results), *_models(results)])


def _layers(results: Sequence[Result]) -> list[str]:
    parts = []
    for result in _results(results, "prefill"):
        cases = _timed(result)
        if not cases:
            continue
        o, e = result["options"], result["environment"]
        methods = " and ".join(f"`{method}`" for method in o["method"])
        also = ", the same for FlexAttention" if any("flex" in case["sides"] for case in cases) else ""
        text = (
            f"`python -m benchmarks prefill` on {machine(e)} (torch {e['torch']}): one layer, one prompt, {o['heads']} "
            f"heads, D={o['head_dim']}, {o['dtype']}, {o['block_q']} queries and {o['block_k']} keys a block; medians "
            f"with cold caches, all sides of a row in the same rounds, outputs checked. Given lists are random{also}"
        )
        if any(case["lists"]["percent_of_dense_per_block"] for case in cases):
            text += "; beside their time is the speed per listed block as a share of our dense kernel's"
        if any(_flashinfer_cell(case) != "-" for case in cases):
            version = str(result["peers"]["flashinfer"]).partition(":")[0]
            text += (
                f". FlashInfer {version} (`VariableBlockSparseAttentionWrapper`, the faster of its backends) takes a "
                "list for each KV head, and ours is timed over such lists beside it; its planning is not timed, the "
                "copies of queries and outputs that its calls make are"
            )
        text += (
            f". The whole call is `unique_prefill` with {methods}, {_settings_of(cases)} chosen for the density on "
            "these inputs; selection by itself is given as a share of the attention over what it selected. "
            f"Inputs: {result['inputs']}."
        )
        for method, size in result["bytes_per_token_and_head"].items():
            text += f" A call with `{method}` takes {size:.0f} bytes per token and query head beside its outputs."
        parts.append(f"{text}\n\n{speed_table(result, cases)}")
    if figures(results):
        parts.append(plots.image("Times faster than dense attention, by density and length", FIGURE))
    return parts


def _settings_of(cases: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(
        SETTINGS[name] for case in cases for call in case["calls"].values() for name in call.get("setting", {})
    )
    return " or ".join(names) or "a setting"


# ---- A model. ----


def _models(results: Sequence[Result]) -> list[str]:
    """Of GPUs."""
    parts = []
    for result in _results(results, "ttft"):
        cases = [case for case in result["cases"] if case.get("sides")]
        if result["environment"]["device"] == "cpu" or not cases:
            continue
        e, o = result["environment"], cases[0]["options"]
        sides = list(dict.fromkeys(name for case in cases for name in case["sides"]))
        rows = []
        for case in cases:
            shape = case["options"]
            model = f"{shape['layers']} layers, D={shape['head_dim']}, hidden {shape['hidden']}, MLP {shape['mlp']}"
            row = {"model": model, "tokens": tokens(shape["context"])}
            row |= {_side_title(name): _first_token_cell(case, name) for name in sides}
            rows.append(row)
        parts.append(
            f"`python -m benchmarks ttft` on {machine(e)} (torch {e['torch']}, transformers "
            f"{result['peers']['transformers']}): from a prompt of random tokens on the device to its first token on "
            f"the host, one call, transformers' Llama with random weights, {o['heads']} heads, {o['dtype']}; `sdpa` is "
            "its stock attention, `dense` the same after `enable()`. Random weights attend evenly, so the density is "
            f"fixed by top-p (`{cases[0]['method']}`); what came out is in brackets. Medians, and times faster than "
            f"stock attention.\n\n{markdown(pd.DataFrame(rows))}"
        )
    return parts


def _side_title(name: str) -> str:
    return f"sparse, {name.partition('_')[2]}%" if name.startswith("sparse_") else f"`{name}`"


def _first_token_cell(case: Mapping[str, Any], name: str) -> str:
    side = case["sides"].get(name, {})
    if "median_ms" not in side:
        return "-"
    cell = ms(side["median_ms"]) if side["median_ms"] < 1000 else f"{side['median_ms'] / 1e3:.2f} s"
    if "density" not in side:
        return cell
    factor = case["speedups"].get(name, {}).get("sdpa")
    return f"{cell} ({100 * side['density']:.1f}%)" + (f", **{factor:.2f}x**" if factor else "")


# ---- The picture. ----


def figures(results: Sequence[Result]) -> dict[str, dict[int, float]]:
    """Lines of the picture: by density, how many times faster the whole call is than the fastest dense attention at
    each length; of the first GPU with several lengths."""
    for result in _results(results, "prefill"):
        cases = _timed(result)
        if result["environment"]["device"] == "cpu" or len({case["tokens"] for case in cases}) < 2:
            continue
        lines: dict[str, dict[int, float]] = {}
        for case in cases:
            call = next(iter(case["calls"].values()))
            factors = [factor for factor in call.get("speedups", {}).values() if factor]
            if factors:
                lines.setdefault(f"{case['density']:g}% of the blocks", {})[case["tokens"]] = min(factors)
        return {name: dict(sorted(line.items())) for name, line in lines.items()}
    return {}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw the picture if there is a result for it.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    lines = figures(results)
    if not lines:
        return []
    result = next(r for r in _results(results, "prefill") if figures([r]))
    o = result["options"]
    shape = f"{o['heads']} heads, D={o['head_dim']}, {o['dtype']}, {o['method'][0]}"
    subtitle = f"{machine(result['environment'])}; {shape}"
    title = "Sparse prefill of one layer, selection included"
    return [plots.plot_speedups(lines, folder / FIGURE, title=title, subtitle=subtitle)]
