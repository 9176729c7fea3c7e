"""Markdown tables from results over shapes. :func:`blocks` names the places where they go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.report.charts import figures
from benchmarks.report.plots import image
from examples.support.results import markdown

Result = Mapping[str, Any]
Case = Mapping[str, Any]
Cell = Callable[[Case], str]

PEERS = {"flashinfer": "FlashInfer", "sdpa": "SDPA", "torch": "`torch.topk`"}
LABELS = {"head_dim": "D", "page_size": "S", "tokens": "query tokens", "index_format": "index"}
PREFIXES = {"page_size": "S=", "tokens": "T=", "head_dim": "D="}


def cases_of(result: Result) -> list[dict[str, Any]]:
    """The shapes of a result, each with the result's machine; a result of one shape has its fields at the top."""
    shared = {name: result[name] for name in ("bench", "environment", "ceiling")}
    return [{**shared, **case} for case in result["cases"]] if "cases" in result else [dict(result)]


def tokens(n: int) -> str:
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else str(n)


def ms(value: float) -> str:
    """Three significant digits, microseconds below a millisecond."""
    return f"{value:.3g} ms" if value >= 1 else f"{1e3 * value:.3g} µs"


def share(side: Mapping[str, Any]) -> str:
    return f"{ms(side['median_ms'])}, {side['percent_of_ceiling']:.0f}%"


# ---- Pivots. ----


def frame_of(cases: Sequence[Case]) -> pd.DataFrame:
    """A row for each shape: its options, and itself as ``case``."""
    usual = {"rule": "", "index_format": "exact"}
    return pd.DataFrame([{**usual, **case["options"], "case": case} for case in cases], dtype=object)


def pivot(frame: pd.DataFrame, rows: Sequence[str], column: str, cell: Cell) -> str:
    """A table with a line for each combination of the options ``rows``, and of rule and storage of the index where they
    are not the same or the usual one, and a column for each value of ``column``; in the order of ``frame``, numbers of
    columns ascending."""
    rows = _with_variants(frame, rows, column)
    values = list(frame[column].unique())
    if all(isinstance(value, int) for value in values):
        values.sort()
    texts = frame[rows].map(_text).assign(column=frame[column], cell=frame["case"].map(cell))
    wide = texts.drop_duplicates([*rows, "column"], keep="last").pivot(index=rows, columns="column", values="cell")
    wide = wide.reindex(index=texts.set_index(rows).index.unique(), columns=values).fillna("-")
    heads = {
        value: value if isinstance(value, str) else f"{PREFIXES.get(column, '')}{tokens(value)}" for value in values
    }
    return markdown(wide.reset_index().rename(columns={**LABELS, **heads}))


def _with_variants(frame: pd.DataFrame, rows: Sequence[str], column: str) -> list[str]:
    variants = {"rule": frame["rule"].nunique() > 1, "index_format": set(frame["index_format"]) != {"exact"}}
    return [*(name for name, shown in variants.items() if shown and name not in (*rows, column)), *rows]


def _text(value: Any) -> str:
    return tokens(value) if isinstance(value, int) else str(value)


def measured(results: Sequence[Result], bench: str, side: str) -> list[tuple[Result, list[dict[str, Any]]]]:
    """Results of a benchmark on a GPU, each with its shapes that were timed."""
    found = []
    for result in results:
        if result["bench"] == bench and result["environment"]["device"] != "cpu":
            cases = [case for case in cases_of(result) if "median_ms" in case.get(side, {})]
            if cases:
                found.append((result, cases))
    return found


def machine(result: Result) -> str:
    e = result["environment"]
    return f"{e['device']} (driver {e['driver']}, torch {e['torch']})"


def _ceiling(result: Result) -> str:
    return f"{result['ceiling']['gb_per_s'] / 1e3:.2f} TB/s"


# ---- One block each. ----


def _decode_cell(case: Case) -> str:
    text = share(case["unique_decode"])
    return f"{text}, **{case['speedup']:.1f}x**" if case.get("speedup") else text


def _decode_results(results: Sequence[Result]) -> dict[str, list[tuple[Result, list[dict[str, Any]]]]]:
    """Results of ``decode`` by GPU."""
    found: dict[str, list[tuple[Result, list[dict[str, Any]]]]] = {}
    for result, cases in measured(results, "decode", "unique_decode"):
        found.setdefault(result["environment"]["device"], []).append((result, cases))
    return found


def _dense_peers(result: Result, cases: Sequence[Case]) -> str:
    """What was timed beside ``unique_decode``, and which of several was the fastest everywhere."""
    names = [name for name in ("flashinfer", "sdpa") if any("median_ms" in case.get(name, {}) for case in cases)]
    labels = {**PEERS, "flashinfer": f"{PEERS['flashinfer']} {result.get('peers', {}).get('flashinfer', '')}".strip()}
    best = {case.get("peer") for case in cases}
    here = f" (here {labels[names[0] if names[0] in best else names[1]]})" if len(names) == 2 and len(best) == 1 else ""
    return (" and ".join(labels[name] for name in names) or "nothing") + here


def decode(results: Sequence[Result]) -> str:
    """The first result of ``decode`` of a GPU: time, share of the ceiling, ratio to the best dense peer."""
    parts = []
    for (result, cases), *_ in _decode_results(results).values():
        o = cases[0]["options"]
        rules = {case["options"]["rule"] for case in cases}
        rule = f"`{o['rule']}`, " if len(rules) == 1 else ""
        parts.append(
            f"One decode step of one layer on {machine(result)}, {o['heads']} heads, {o['dtype']}, {rule}"
            f"{o['budget']} tokens of the context: time of `unique_decode`, share of the measured read bandwidth "
            f"({_ceiling(result)}) that the bytes of index and selected keys and values take, and how many times "
            f"faster than dense attention, the fastest way of {_dense_peers(result, cases)}, in the same run. CUDA "
            f"graphs, cold caches, medians.\n\n"
            + pivot(frame_of(cases), ["head_dim", "page_size", "batch"], "context", _decode_cell)
        )
    return "\n".join([*parts, *_images(results, ("decode_speed", "batch1_latency", "roofline"))])


def decode_shapes(results: Sequence[Result]) -> str:
    """The other results of ``decode`` of a GPU, in one table: what a cell compares is of one run."""
    parts = []
    for device, (_, *others) in _decode_results(results).items():
        cases = [case for _, found in others for case in found]
        if cases:
            rows = ["head_dim", "page_size", "batch"]
            frame = frame_of(cases).sort_values(rows, kind="stable")
            parts.append(
                f"`unique_decode` at other shapes on {device}: what a cell says is as in the first table of it.\n\n"
                + pivot(frame, rows, "context", _decode_cell)
            )
    return "\n".join(parts)


def scores(results: Sequence[Result]) -> str:
    """``scores``."""
    parts = []
    for result, cases in measured(results, "scores", "ours"):
        base = {"head_dim": 128, "page_size": 8, "rule": "directional", "tokens": 1}
        views: list[tuple[dict[str, Any], list[str], str]] = [
            (base, ["batch"], "context"),
            ({"context": 32768, "rule": "directional", "tokens": 1}, ["batch", "head_dim"], "page_size"),
            ({"context": 32768, "head_dim": 128, "page_size": 8, "tokens": 1}, ["batch"], "rule"),
            ({"context": 32768, "head_dim": 128, "page_size": 8, "rule": "directional"}, ["batch"], "tokens"),
        ]
        tables = []
        frame = frame_of(cases)
        for fixed, rows, column in views:
            chosen = frame[(frame[list(fixed)] == list(fixed.values())).all(axis=1)]
            lines = chosen.groupby(_with_variants(chosen, rows, column))
            chosen = chosen[lines[column].transform("nunique") > 1]  # a line of one number says nothing
            if len(chosen):
                tables.append(pivot(chosen, rows, column, lambda case: share(case["ours"])))
        parts.append(
            f"`page_scores` on {machine(result)}, {cases[0]['options']['heads']} heads, {cases[0]['options']['dtype']}"
            f"; D=128, S=8, `directional`, 32K, 1 query token where nothing else is said: time, and share of the read "
            f"bandwidth ({_ceiling(result)}) that the bytes of the index take.\n\n" + "\n".join(tables)
        )
    return "\n".join(parts)


def attention(results: Sequence[Result]) -> str:
    """``attention``."""
    parts = []
    for result, cases in measured(results, "attention", "ours"):
        o = cases[0]["options"]
        chunks = ", ".join(f"{size} B {c['gb_per_s'] / 1e3:.2f}" for size, c in result["chunk_ceilings"].items())
        parts.append(
            f"`sparse_decode` on {machine(result)}, {o['heads']} heads, {o['dtype']}, {o['budget']} tokens in pages "
            f"at random places of {tokens(o['context'])}: time, and share of the bandwidth of randomly placed "
            f"chunks of a page's keys, measured in the same run (TB/s: {chunks}).\n\n"
            + pivot(frame_of(cases), ["batch", "head_dim", "tokens"], "page_size", lambda case: share(case["ours"]))
        )
    return "\n".join(parts)


def index(results: Sequence[Result]) -> str:
    """``index``."""
    parts = []
    for result, cases in measured(results, "index", "ours"):
        o, frame = cases[0]["options"], frame_of(cases)
        frame["new"] = frame["new"].replace(0, "all")
        parts.append(
            f"`page_index` on {machine(result)}, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}: time, and share "
            f"of the read bandwidth ({_ceiling(result)}) that keys read and entries written take.\n\n"
            + pivot(frame, ["batch", "context", "new", "rule"], "page_size", lambda case: share(case["ours"]))
        )
    return "\n".join(parts)


def topk(results: Sequence[Result]) -> str:
    """``topk``: in a graph and launched, against the best way of each peer."""
    parts = []
    for result, cases in measured(results, "topk", "ours"):
        names = [
            name for name in ("flashinfer", "torch") if any("median_ms" in c["peers"].get(name, {}) for c in cases)
        ]
        rows = []
        for case in cases:
            o, ours = case["options"], case["ours"]
            launched = ours.get("launched")
            rows.append(
                {
                    "rows x pages": f"{o['rows']} x {tokens(o['pages'])}",
                    "scores": o["values"],
                    "`topk_pages`": ms(ours["median_ms"]),
                    **{PEERS[name]: _times(case["peers"].get(name, {}), "ratio") for name in names},
                    "launched": ms(launched["median_ms"]) if launched else "-",
                    **{
                        f"{PEERS[name]}, launched": _times(case["peers"].get(name, {}), "launched_ratio")
                        for name in names
                    },
                }
            )
        o = cases[0]["options"]
        parts.append(
            f"`topk_pages` on {machine(result)}, k={o['k']}, {o['dtype']}: time in a CUDA graph and of a single "
            "launched call, and how many times as long the fastest way of each peer takes; selections checked in the "
            "same run.\n\n" + markdown(pd.DataFrame(rows))
        )
    return "\n".join(parts)


def model(results: Sequence[Result]) -> str:
    """``model``: time of a step, tokens/s and memory of every side, and ratios to the fastest dense one."""
    parts = []
    for result in results:
        if result["bench"] != "model" or result["environment"]["device"] == "cpu":
            continue
        cases = [case for case in result["cases"] if case.get("best")]
        groups = list(dict.fromkeys(group for case in cases for group in case["best"]))
        if not groups:
            continue
        o = cases[0]["options"]
        names = [PEERS.get(group, f"{group.partition('_')[2]} index") for group in groups]
        rows = [
            {
                "batch": tokens(case["options"]["batch"]),
                "context": tokens(case["options"]["context"]),
                **{name: _model_cell(case, group) for name, group in zip(names, groups)},
            }
            for case in cases
        ]
        fused = "; norms, rotation and MLPs fused by `torch.compile`" if all(c["compiled"] for c in cases) else ""
        parts.append(
            f"One decode step of a whole model on {machine(result)}: transformers' Llama with {o['layers']} layers, "
            f"{o['heads']} heads, D={o['head_dim']}, hidden {o['hidden']}, MLP {o['mlp']}, vocabulary {o['vocab']}, "
            f"{o['dtype']}, random weights{fused}, captured in a CUDA graph with append, logits and greedy sampling; "
            f"`{o['rule']}`, {o['budget']} tokens in pages of {o['page_size']}. Median time, tokens/s, peak memory and "
            "how many times faster than the fastest dense side, in the same run, with the same weights and the same "
            "code outside attention.\n\n" + markdown(pd.DataFrame(rows))
        )
    return "\n".join(parts)


def _model_cell(case: Case, group: str) -> str:
    if group not in case["best"]:
        return "-"
    side = case["sides"][case["best"][group]]
    cell = f"{ms(side['median_ms'])}, {side['tokens_per_s']:.0f}/s"
    if side["peak_bytes"] is not None:
        cell += f", {side['peak_bytes'] / 2**30:.1f} GiB"
    ratio = case["speedups"].get(group, {}).get(case["peer"])
    return f"{cell}, **{ratio:.2f}x**" if ratio else cell


def _times(peer: Mapping[str, Any], name: str) -> str:
    return f"**{peer[name]:.2f}x**" if peer.get(name) else "-"


def _images(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    drawn = figures(results)
    return [image(f"{each.title}, {each.device}", file) for file, each in drawn.items() if each.name in names]


BLOCKS: dict[str, Callable[[Sequence[Result]], str]] = {
    "decode results gpu": decode,
    "decode shapes gpu": decode_shapes,
    "model results": model,
    "index results": index,
    "scores results": scores,
    "topk results": topk,
    "attention results": attention,
}


def blocks(results: Sequence[Result]) -> dict[str, str]:
    """The text between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a page; empty without results."""
    return {name: render(results) for name, render in BLOCKS.items()}
