"""Markdown tables of the README from results over shapes. :func:`blocks` names the places where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from unique_attn.bench._charts import figures

Result = Mapping[str, Any]
Case = Mapping[str, Any]
Cell = Callable[[Case], str]

PEERS = {"flashinfer": "FlashInfer", "sdpa": "SDPA", "torch": "`torch.topk`"}
LABELS = {
    "batch": "batch",
    "context": "context",
    "head_dim": "D",
    "page_size": "S",
    "tokens": "query tokens",
    "index_format": "index",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


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


def pivot(cases: Sequence[Case], rows: Sequence[str], column: str, cell: Cell) -> str:
    """A table with a line for each combination of the options ``rows``, and of rule and storage of the index where they
    are not the same or the usual one, and a column for each value of ``column``."""
    rows = _with_variants(cases, rows, column)
    columns = list(dict.fromkeys(case["options"][column] for case in cases))
    if all(isinstance(value, int) for value in columns):
        columns.sort()
    lines: dict[tuple[Any, ...], dict[Any, str]] = {}
    for case in cases:
        key = tuple(case["options"][name] for name in rows)
        lines.setdefault(key, {})[case["options"][column]] = cell(case)
    head = [LABELS.get(name, name) for name in rows]
    head += [value if isinstance(value, str) else f"{_prefix(column)}{tokens(value)}" for value in columns]
    return table(head, [[_text(v) for v in key] + [line.get(c, "-") for c in columns] for key, line in lines.items()])


def _with_variants(cases: Sequence[Case], rows: Sequence[str], column: str) -> Sequence[str]:
    rules = {case["options"].get("rule") for case in cases}
    formats = {case["options"].get("index_format", "exact") for case in cases}
    variants = {"rule": len(rules) > 1, "index_format": formats != {"exact"}}
    return (*(name for name, shown in variants.items() if shown and name not in (*rows, column)), *rows)


def _prefix(column: str) -> str:
    return {"page_size": "S=", "tokens": "T=", "head_dim": "D="}.get(column, "")


def _text(value: Any) -> str:
    return tokens(value) if isinstance(value, int) else str(value)


def where(cases: Sequence[Case], **fixed: Any) -> list[Case]:
    return [case for case in cases if all(case["options"].get(name) == value for name, value in fixed.items())]


def measured(results: Sequence[Result], bench: str, side: str) -> list[tuple[Result, list[dict[str, Any]]]]:
    """Results of a benchmark on a GPU, each with its shapes that were timed."""
    found = []
    for result in results:
        if result["bench"] == bench and result["environment"]["device"] != "cpu":
            cases = [case for case in cases_of(result) if "median_ms" in case.get(side, {})]
            if cases:
                found.append((result, cases))
    return found


def _machine(result: Result) -> str:
    e = result["environment"]
    return f"{e['device']} (driver {e['driver']}, torch {e['torch']})"


def _ceiling(result: Result) -> str:
    return f"{result['ceiling']['gb_per_s'] / 1e3:.2f} TB/s"


# ---- One block each. ----


def _decode_cell(case: Case) -> str:
    text = share(case["unique_decode"])
    return f"{text}, **{case['speedup']:.1f}x**" if case.get("speedup") else text


def _decode_results(results: Sequence[Result]) -> dict[str, list[tuple[Result, list[dict[str, Any]]]]]:
    """Results of ``bench decode`` by GPU."""
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
    """The first result of ``bench decode`` of a GPU: time, share of the ceiling, ratio to the best dense peer."""
    parts = []
    for (result, cases), *_ in _decode_results(results).values():
        o = cases[0]["options"]
        rules = {case["options"]["rule"] for case in cases}
        rule = f"`{o['rule']}`, " if len(rules) == 1 else ""
        parts.append(
            f"One decode step of one layer on {_machine(result)}, {o['heads']} heads, {o['dtype']}, {rule}"
            f"{o['budget']} tokens of the context: time of `unique_decode`, share of the measured read bandwidth "
            f"({_ceiling(result)}) that the bytes of index and selected keys and values take, and how many times "
            f"faster than dense attention, the fastest way of {_dense_peers(result, cases)}, in the same run. CUDA "
            f"graphs, cold caches, medians.\n\n"
            + pivot(cases, ("head_dim", "page_size", "batch"), "context", _decode_cell)
        )
    return "\n".join([*parts, *_images(results, ("decode_speed", "batch1_latency", "roofline"))])


def decode_shapes(results: Sequence[Result]) -> str:
    """The other results of ``bench decode`` of a GPU, in one table: what a cell compares is of one run."""
    parts = []
    for device, (_, *others) in _decode_results(results).items():
        cases = [case for _, found in others for case in found]
        if cases:
            cases.sort(key=lambda case: [case["options"][name] for name in ("head_dim", "page_size", "batch")])
            rows = ("head_dim", "page_size", "batch")
            parts.append(
                f"`unique_decode` at other shapes on {device}: what a cell says is as in the first table of it.\n\n"
                + pivot(cases, rows, "context", _decode_cell)
            )
    return "\n".join(parts)


def scores(results: Sequence[Result]) -> str:
    """``bench scores``."""
    parts = []
    for result, cases in measured(results, "scores", "ours"):
        base = {"head_dim": 128, "page_size": 8, "rule": "directional", "tokens": 1}
        views: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
            (base, ("batch",), "context"),
            ({"context": 32768, "rule": "directional", "tokens": 1}, ("batch", "head_dim"), "page_size"),
            ({**base, "context": 32768, "rule": None}, ("batch",), "rule"),
            ({**base, "context": 32768, "tokens": None}, ("batch",), "tokens"),
        ]
        tables = []
        for fixed, rows, column in views:
            chosen = where(cases, **{name: value for name, value in fixed.items() if value is not None})
            chosen = _with_several(chosen, rows, column)
            if chosen:
                tables.append(pivot(chosen, rows, column, lambda case: share(case["ours"])))
        parts.append(
            f"`page_scores` on {_machine(result)}, {cases[0]['options']['heads']} heads, {cases[0]['options']['dtype']}"
            f"; D=128, S=8, `directional`, 32K, 1 query token where nothing else is said: time, and share of the read "
            f"bandwidth ({_ceiling(result)}) that the bytes of the index take.\n\n" + "\n".join(tables)
        )
    return "\n".join(parts)


def _with_several(cases: Sequence[Case], rows: Sequence[str], column: str) -> list[Case]:
    """Cases whose line of a pivot has more than one column."""
    values: dict[tuple[Any, ...], set[Any]] = {}
    rows = _with_variants(cases, rows, column)

    def key(case: Case) -> tuple[Any, ...]:
        return tuple(case["options"][name] for name in rows)

    for case in cases:
        values.setdefault(key(case), set()).add(case["options"][column])
    return [case for case in cases if len(values[key(case)]) > 1]


def attention(results: Sequence[Result]) -> str:
    """``bench attention``."""
    parts = []
    for result, cases in measured(results, "attention", "ours"):
        o = cases[0]["options"]
        chunks = ", ".join(f"{size} B {c['gb_per_s'] / 1e3:.2f}" for size, c in result["chunk_ceilings"].items())
        parts.append(
            f"`sparse_decode` on {_machine(result)}, {o['heads']} heads, {o['dtype']}, {o['budget']} tokens in pages "
            f"at random places of {tokens(o['context'])}: time, and share of the bandwidth of randomly placed "
            f"chunks of a page's keys, measured in the same run (TB/s: {chunks}).\n\n"
            + pivot(cases, ("batch", "head_dim", "tokens"), "page_size", lambda case: share(case["ours"]))
        )
    return "\n".join(parts)


def index(results: Sequence[Result]) -> str:
    """``bench index``."""
    parts = []
    for result, cases in measured(results, "index", "ours"):
        shown = [{**c, "options": {**c["options"], "new": c["options"]["new"] or "all"}} for c in cases]
        o = cases[0]["options"]
        rows = ("batch", "context", "new", "rule")
        parts.append(
            f"`page_index` on {_machine(result)}, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}: time, and share "
            f"of the read bandwidth ({_ceiling(result)}) that keys read and entries written take.\n\n"
            + pivot(shown, rows, "page_size", lambda case: share(case["ours"]))
        )
    return "\n".join(parts)


def topk(results: Sequence[Result]) -> str:
    """``bench topk``: in a graph and launched, against the best way of each peer."""
    parts = []
    for result, cases in measured(results, "topk", "ours"):
        names = [
            name for name in ("flashinfer", "torch") if any("median_ms" in c["peers"].get(name, {}) for c in cases)
        ]
        rows = []
        for case in cases:
            o, ours = case["options"], case["ours"]
            launched = ours.get("launched")
            line = [f"{o['rows']} x {tokens(o['pages'])}", o["values"], ms(ours["median_ms"])]
            line += [_times(case["peers"].get(name, {}), "ratio") for name in names]
            line += [ms(launched["median_ms"]) if launched else "-"]
            line += [_times(case["peers"].get(name, {}), "launched_ratio") for name in names]
            rows.append(line)
        peers = [PEERS[name] for name in names]
        head = ["rows x pages", "scores", "`topk_pages`", *peers, "launched", *(f"{peer}, launched" for peer in peers)]
        o = cases[0]["options"]
        parts.append(
            f"`topk_pages` on {_machine(result)}, k={o['k']}, {o['dtype']}: time in a CUDA graph and of a single "
            "launched call, and how many times as long the fastest way of each peer takes; selections checked in the "
            "same run.\n\n" + table(head, rows)
        )
    return "\n".join(parts)


def model(results: Sequence[Result]) -> str:
    """``bench model``: time of a step, tokens/s and memory of every side, and ratios to the fastest dense one."""
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
            [tokens(case["options"]["batch"]), tokens(case["options"]["context"])]
            + [_model_cell(case, group) for group in groups]
            for case in cases
        ]
        fused = "; norms, rotation and MLPs fused by `torch.compile`" if all(c["compiled"] for c in cases) else ""
        parts.append(
            f"One decode step of a whole model on {_machine(result)}: transformers' Llama with {o['layers']} layers, "
            f"{o['heads']} heads, D={o['head_dim']}, hidden {o['hidden']}, MLP {o['mlp']}, vocabulary {o['vocab']}, "
            f"{o['dtype']}, random weights{fused}, captured in a CUDA graph with append, logits and greedy sampling; "
            f"`{o['rule']}`, {o['budget']} tokens in pages of {o['page_size']}. Median time, tokens/s, peak memory and "
            "how many times faster than the fastest dense side, in the same run, with the same weights and the same "
            "code outside attention.\n\n" + table(["batch", "context", *names], rows)
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
    return [
        f"![{drawn[file].title}, {drawn[file].device}](docs/{file})\n" for file in drawn if drawn[file].name in names
    ]


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
    """The text between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->`` of the README; empty without results."""
    return {name: render(results) for name, render in BLOCKS.items()}
