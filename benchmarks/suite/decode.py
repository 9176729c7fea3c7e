"""One decode step of one attention layer: unique_decode against dense attention (FlashInfer, SDPA)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.measure import checks, peers
from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.harness import Side, best_of, compare, outcome, ratio, sets_needed
from benchmarks.measure.inputs import Shaped, entry_bytes, scoring
from benchmarks.measure.machine import free_bytes, gib
from benchmarks.measure.sweep import (
    Grid,
    Shape,
    add_shape_flags,
    heads,
    index_name,
    ms,
    report_head,
    run_sweep,
    shape_cells,
    side_cells,
)
from benchmarks.measure.text_table import text_table
from examples.support.results import DTYPES
from unique_attn import ops

FIELDS = (
    "batch", "context", "table", "heads", "head_dim", "page_size", "block_size", "budget", "rule", "index_format",
    "dtype",
)  # fmt: skip
LENGTHS = [8192, 16384, 32768, 65536, 131072]
BATCHES = [80, 32, 8, 1]
PRESETS: dict[str, Sequence[Grid]] = {
    "context": [{"batch": BATCHES, "context": LENGTHS, "head_dim": [128], "page_size": [8]}],
    "head64": [{"batch": BATCHES, "context": LENGTHS, "head_dim": [64], "page_size": [8]}],
    "page_sizes": [{"batch": [80, 1], "context": [32768], "head_dim": [128, 64], "page_size": [4, 16, 32]}],
    "batch80": [{"batch": [80], "context": LENGTHS[:3], "head_dim": [128], "page_size": [8]}],
    # What captured steps of an engine pay for a table that has room for its longest context.
    "wide": [{"batch": [1, 8, 32], "context": [8192, 32768], "table": [0, 131072], "head_dim": [64], "page_size": [8]}],
    "latency": [{"batch": [1], "context": LENGTHS, "head_dim": [128, 64], "page_size": [8]}],
}
PRESETS["table"] = [grid for name in ("context", "head64", "page_sizes") for grid in PRESETS[name]]
COMMITTED = {"cpu": [["--dtype", "bf16"], ["--dtype", "fp32"]], "cuda": [["--preset", "table"]]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_flags(parser, FIELDS, PRESETS)
    parser.add_argument("--peers", nargs="*", default=list(peers.DENSE_PEERS), choices=list(peers.DENSE_PEERS))


class Step:
    """Input sets of one decode step: paged caches in shuffled blocks, an index, the new token's q, k and v."""

    def __init__(self, o: Shape, device: torch.device) -> None:
        self.o = o
        self.shaped = shaped = Shaped(o, device)
        random, blocks = shaped.random, o.context // o.block_size
        self.moved = bytes_moved(o)
        self.count = sets_needed(self.moved["unique"], device)
        self.table = random.table(o.batch, blocks)
        self.wide = F.pad(self.table, (0, max(0, o.table - o.context) // o.block_size), value=-1)  # ours reads this one
        self.lens = shaped.lens(o.context)
        self.caches = [shaped.caches(o.batch * blocks) for _ in range(self.count)]
        self.indexes = [shaped.index(k_cache, self.table, o.context) for k_cache, _ in self.caches]
        self.queries = [random.normal(o.batch, 1, shaped.q_heads, o.head_dim) for _ in range(self.count)]
        self.keys, self.values = (
            [random.normal(o.batch, 1, shaped.kv_heads, o.head_dim) for _ in range(self.count)] for _ in range(2)
        )
        self.scoring = scoring(o)
        self.k = o.budget // o.page_size
        for i in range(self.count):
            self.unique(i)  # writes the new token, so that every side has the same keys

    # ---- What is timed. ----

    def unique(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k_cache, v_cache = self.caches[i]
        return ops.unique_decode(
            self.queries[i], self.keys[i], self.values[i], k_cache, v_cache, self.indexes[i], self.wide, self.lens,
            self.k, **self.scoring,
        )  # fmt: skip

    def parts(self) -> dict[str, Side]:
        """The ops that unique_decode consists of, one by one, on the inputs that they have in it."""
        o, table, lens, starts = self.o, self.wide, self.lens, self.lens - 1

        def page_scores(i: int) -> torch.Tensor:
            return ops.page_scores(self.queries[i], self.indexes[i], table, lens, **self.scoring)

        scores = [page_scores(i) for i in range(self.count)]

        def topk_pages(i: int) -> torch.Tensor:
            return ops.topk_pages(scores[i], lens, self.k, page_size=o.page_size)

        pages = [topk_pages(i) for i in range(self.count)]

        def page_index(i: int) -> None:
            index, k_cache = self.indexes[i], self.caches[i][0]
            ops.page_index(k_cache, index, table, starts, lens, max_new_tokens=1, **self.scoring)

        def sparse_decode(i: int) -> Any:
            return ops.sparse_decode(self.queries[i], *self.caches[i], pages[i], table, lens, page_size=o.page_size)

        runs: list[Callable[[int], Any]] = [page_index, page_scores, topk_pages, sparse_decode]
        # The step's bytes: sets rotate for a part where they do for the step.
        return {run.__name__: Side([partial(run, i) for i in range(self.count)], self.moved["unique"]) for run in runs}

    def dense(self, wanted: Sequence[str]) -> dict[str, dict[str, peers.Dense]]:
        """Every way of every peer that is here and whose copies of the caches fit into memory."""
        device = self.shaped.device
        kv = self.count * self.moved["dense"]
        reserve = checked_bytes(self.o) + (1 << 30)
        flat = [q.flatten(0, 1) for q in self.queries]
        found: dict[str, dict[str, peers.Dense]] = {}
        if "flashinfer" in wanted:
            room = kv + reserve < free_bytes(device)
            if not room and peers.flashinfer(device) is not None:
                tqdm.write("FlashInfer: only in our layout, copies in its own do not fit", file=sys.stderr)
            found["flashinfer"] = peers.flashinfer_dense(flat, self.caches, self.table, second_layout=room)
        if "sdpa" in wanted:
            copies = (1 if device.type == "cuda" else 1 + self.shaped.group) * kv
            if 1.5 * copies + reserve < free_bytes(device):
                rows = [(self._in_a_row(k), self._in_a_row(v)) for k, v in self.caches]
                found["sdpa"] = peers.sdpa_dense(flat, rows)
            else:
                tqdm.write(f"SDPA left out: copies of the caches take {gib(copies)}", file=sys.stderr)
        return {name: ways for name, ways in found.items() if ways}

    def _in_a_row(self, cache: torch.Tensor) -> torch.Tensor:
        """``[B, H, context, D]`` contiguous."""
        rows = cache[self.table.long()].transpose(1, 2)  # [B, H, blocks, block_size, D]
        return rows.reshape(self.o.batch, self.shaped.kv_heads, self.o.context, self.o.head_dim).contiguous()

    # ---- Whether it is right. ----

    def check(self, i: int, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
        """The pages are the best ones, and attention to them is right. Returns its largest error."""
        out, lse, pages = found
        q, (k_cache, v_cache) = self.queries[i], self.caches[i]
        checks.selection(pages, q, self.indexes[i], self.table, self.lens, self.scoring)
        return checks.attention(
            (out, lse), q, k_cache, v_cache, pages, self.table, self.lens, page_size=self.o.page_size
        )

    def check_dense(self, i: int, out: torch.Tensor) -> None:
        q = self.queries[i]
        checks.dense(out.reshape(q.shape), q, *self.caches[i], self.table, self.lens)


def bytes_moved(o: Shape) -> dict[str, int]:
    """What a step must read: the index and the selected keys and values once; densely, all keys and values."""
    dtype = DTYPES[o.dtype]
    rows, pages = o.batch * heads(o.heads)[1], o.context // o.page_size
    token = 2 * o.head_dim * dtype.itemsize  # key and value
    index = rows * pages * entry_bytes(o)
    selected = rows * min(o.budget, o.context) * token
    return {"index": index, "selected_kv": selected, "unique": index + selected, "dense": rows * o.context * token}


def needed(o: Shape, device: torch.device) -> int:
    """Caches and index of all sets, and what checking one sequence takes; peers look themselves whether they fit."""
    moved = bytes_moved(o)
    return sets_needed(moved["unique"], device) * (moved["dense"] + moved["index"]) + checked_bytes(o) + (1 << 26)


def checked_bytes(o: Shape) -> int:
    """Keys and values of one sequence, twice, in the reference's precision."""
    return int(4 * o.context * heads(o.heads)[1] * o.head_dim * (8 if o.dtype == "fp32" else 4))


def measure_shape(o: Shape, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    device, sequential = ceilings.device, ceilings.sequential
    step = Step(o, device)
    moved = step.moved
    dense = step.dense(options.peers)
    sides = {"unique": Side([partial(step.unique, i) for i in range(step.count)], moved["unique"], step.check)}
    for ways in dense.values():
        for name, way in ways.items():
            sides[name] = Side([partial(way, i) for i in range(step.count)], moved["dense"], step.check_dense)
    found = compare(sides, device, rounds=options.repeats, seconds=options.seconds)
    ours = outcome(found, "unique", moved["unique"], sequential)
    case: dict[str, Any] = {"sets": step.count, "unique_decode": ours}
    best = {name: best_of(found, list(ways), moved["dense"], sequential) for name, ways in dense.items()}
    for name, side in best.items():
        case[f"{name}_ways"] = side.pop("ways")
        case[name] = side
    timed = [name for name, side in best.items() if "median_ms" in side]
    case["peer"] = min(timed, key=lambda name: best[name]["median_ms"], default=None)
    case["speedups"] = {name: ratio(best[name], ours) for name in timed}
    parts = compare(step.parts(), device, rounds=options.repeats, seconds=options.seconds)
    return {
        **case,
        "parts": {name: timing.to_json() for name, timing in parts.timings.items()},
        "bytes": moved,
        "bytes_ratio": round(moved["dense"] / moved["unique"], 2),
        "speedup": case["speedups"].get(case["peer"]),
        "max_error_against_fp32": step.check(0, step.unique(0)) if "median_ms" in ours else None,
    }


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    result = run_sweep("decode", options, FIELDS, PRESETS, partial(needed, device=device), measure_shape)
    result["peers"] = peers.versions(device)
    if options.preset or len(result["cases"]) > 1:
        return result
    only = result.pop("cases")[0]  # a single shape: its fields stand beside the machine's
    return {**result, **only}


def cases(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A result's shapes, also of one that has a single one."""
    return list(result["cases"]) if "cases" in result else [dict(result)]


def report(result: dict[str, Any]) -> str:
    if "cases" not in result:
        return _report_one(result)
    shape = ("batch", "context", "head_dim", "page_size", "budget", "rule")
    rows = []
    for case in result["cases"]:
        row = {**shape_cells(case["options"], *shape), **side_cells(case, "unique_decode", moved="must read")}
        if case.get("speedup"):
            peer = case["peer"]
            row |= {"dense peer": ms(case[peer]["median_ms"]), "faster": f"{case['speedup']:.2f}x", "than": peer}
        rows.append(row)
    lines = [*report_head(result), *text_table(rows, left=["rule", "than"])]
    return "\n".join([*lines, "", *peers.notes(result["peers"])])


def _report_one(result: dict[str, Any]) -> str:
    o = result["options"]
    lines = [
        *report_head({"chunk_ceilings": {}, **result})[:-1],
        f"one decode step, {o['batch']} x {o['context']} tokens, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}",
        f"rule {index_name(o)}, budget {o['budget']} in pages of {o['page_size']}",
        "",
    ]
    if "skipped" in result:
        return "\n".join([*lines, f"skipped: {result['skipped']}"])
    rows = [{"side": "unique_decode", **side_cells(result, "unique_decode")}]
    for name, title in peers.DENSE_PEERS.items():
        if name in result:
            way = f" ({result[name]['way']})" if "way" in result[name] else ""
            rows.append({"side": title + way, **side_cells(result, name)})
    rows += [{"side": f"part: {name}", "time": ms(part["median_ms"])} for name, part in result["parts"].items()]
    lines += [*text_table(rows, left=["side"]), ""]
    for name, title in peers.DENSE_PEERS.items():
        ways = result.get(f"{name}_ways", {})
        if ways:
            timed = [f"{way} {w['median_ms']:.3f} ms" for way, w in ways.items() if "median_ms" in w]
            lines.append(f"{title}, every way: {', '.join(timed)}")
            lines += [f"  {way} failed: {w['failed']}" for way, w in ways.items() if "failed" in w]
    if result["max_error_against_fp32"] is not None:
        lines.append(f"largest error {result['max_error_against_fp32']:.1e}")
    if result["speedup"]:
        lines.append(f"{result['speedup']:.1f}x faster, {result['bytes_ratio']:.1f}x fewer bytes")
    return "\n".join([*lines, *peers.notes(result["peers"])])
