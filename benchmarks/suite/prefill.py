"""Sparse prefill of one long prompt: attention over given lists, and the whole call, against dense attention.

Two things are timed at every length and density, beside dense attention (ours, and PyTorch's backends) in the same
rounds. ``lists``: ``block_sparse_attention`` over random lists of that density, and FlexAttention over the same; where
FlashInfer can be imported, also over lists that the query heads of a group share, beside FlashInfer over the same.
``call``: ``unique_prefill``, selection included, with the setting (threshold or top-p) that gives the density on these
queries and keys; its parts, selection and attention, also by themselves.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import block_lists, prefill_flashinfer, prefill_peers
from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.harness import Compared, Side, compare, ratio, reason
from benchmarks.measure.machine import free_bytes, gib
from benchmarks.measure.prefill_sides import SELECTIONS, Sparse, dense_sides, extra_bytes
from benchmarks.measure.prompts import STRUCTURE, Prompt
from benchmarks.measure.sweep import heads
from benchmarks.measure.text_table import NOTE, text_table
from benchmarks.suite.soft_mask import slope
from examples.support.results import DTYPES, environment

# By kind of device; a CPU gets the layer of a small model, which is what anyone runs there.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "tokens": [32768, 65536, 131072], "density": [50, 25, 12.5, 6],
        "heads": "32/8", "head_dim": 128, "dtype": "bf16",
    },
    "cpu": {"tokens": [8192], "density": [40], "heads": "9/3", "head_dim": 64, "dtype": "fp32"},
}  # fmt: skip
QUICK: dict[str, dict[str, list[Any]]] = {
    "cuda": {"tokens": [32768], "density": [25, 12.5]},
    "cpu": {"tokens": [2048], "density": [40]},
}
COMMITTED: dict[str, list[list[str]]] = {"cuda": [[]], "cpu": [[]]}
PEERS = ("sdpa_flash_attention", "sdpa_cudnn")
# What was asked for: times faster than a peer by density in percent, and percent. Sparse attention per listed block
# against our dense kernel, at least; selection against the attention over what it selected, at most.
TARGETS: dict[str, dict[str, Any]] = {
    "cuda": {
        "speedups": {"25": dict(zip(PEERS, (5.0, 2.5))), "12.5": dict(zip(PEERS, (9.0, 4.5)))},
        "percent_of_dense_per_block": 85,
        "selection_percent": 12,
    },
    "cpu": {"speedups": {"40": {PEERS[0]: 1.5}}},
}
BYTES_PER_FLAG = 24  # memory of a query head, query block and key block: lists, shares, FlexAttention's numbers, a sort


def add_arguments(parser: argparse.ArgumentParser) -> None:
    by_device: dict[str, Any] = {"default": argparse.SUPPRESS}  # of DEFAULTS
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="lengths of the prompt: 32K, 64K, 128K; 8K on the CPU", **by_device
    )
    parser.add_argument(
        "--density", type=float, nargs="+", help="percent of visible blocks: 50 25 12.5 6; 40 on the CPU", **by_device
    )
    parser.add_argument("--heads", help="query heads / KV heads: 32/8; 9/3 on the CPU", **by_device)
    parser.add_argument("--head-dim", type=int, help="128; 64 on the CPU", **by_device)
    parser.add_argument("--dtype", choices=list(DTYPES), help="bf16; fp32 on the CPU", **by_device)
    parser.add_argument("--method", nargs="+", default=["directional"], choices=list(SELECTIONS))
    parser.add_argument("--pool-q", type=int, default=8, help="queries that are pooled")
    parser.add_argument("--pool-k", type=int, default=8, help="keys that are pooled")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention and its compilation out")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timed rounds on CUDA, at least 5")
    parser.add_argument("--quick", action="store_true", help="one length, two densities, without FlexAttention")


# ---- A length and a density. ----


def measure_density(sparse: Sparse, dense: Mapping[str, Side], rounds: int, seconds: float) -> dict[str, Any]:
    blocks, device = sparse.prompt.blocks, sparse.prompt.device
    listed = block_lists.density(blocks, sparse.mask)
    sides = {**dense, "lists": sparse.lists_side()}
    flex = sparse.flex_side()
    if flex is not None:
        sides["flex"] = flex
    shared, unplanned = sparse.shared_sides()
    sides |= shared
    settings: dict[str, tuple[dict[str, float], float]] = {}
    failed: dict[str, str] = {}
    for method in sparse.o.method:
        try:
            settings[method] = sparse.find(method)
            sides |= sparse.call_sides(method, settings[method][0])
        except Exception as error:  # the others are worth their time
            failed[method] = reason(error)
    found = compare(sides, device, rounds=rounds, seconds=seconds)
    rows = {name: _row(found, name) for name in sides}
    if sparse.flex is not None and flex is None:
        rows["flex"] = {"failed": sparse.flex.broken}
    rows |= {name: {"failed": why} for name, why in unplanned.items()}
    work = 2.0 * blocks.tokens**2 * sparse.prompt.head_dim * sparse.prompt.q_heads
    for name in dense:
        if "median_ms" in rows[name]:
            rows[name]["tflops"] = round(work / rows[name]["median_ms"] / 1e9, 1)
    calls: dict[str, dict[str, Any]] = {}
    for method in sparse.o.method:
        if method in failed:
            calls[method] = {"failed": failed[method]}
            continue
        setting, density = settings[method]
        calls[method] = {
            "setting": setting,
            "density": round(density, 5),
            "kept": round(float(sparse.select(0, method, setting)[1][: blocks.queries].mean()), 5),
            "selection_percent": _percent(rows[f"{method}_selection"], rows[f"{method}_attention"]),
            "speedups": {peer: ratio(rows[peer], rows[f"{method}_call"]) for peer in dense},
            "extra_bytes": extra_bytes(partial(sparse.call, 0, method, setting), device),
        }
    return {
        "sets": len(sparse.prompt.sets),
        "sides": rows,
        "lists": {
            "density": round(listed, 5),
            "percent_of_dense_per_block": _percent(rows.get("dense", {}), rows["lists"], listed),
            "speedups": {peer: ratio(rows[peer], rows["lists"]) for peer in [*dense, "flex"] if peer in rows},
        },
        "shared_lists": _shared(sparse, rows),
        "calls": calls,
    }


def _shared(sparse: Sparse, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How ours over lists per KV head compares with FlashInfer; empty where that is not measured."""
    if sparse.shared_mask is None:
        return {}
    peers = [name for name in rows if name.startswith("flashinfer_")]
    return {
        "density": round(block_lists.density(sparse.prompt.blocks, sparse.shared_mask), 5),
        "speedups": {peer: ratio(rows[peer], rows["shared_lists"]) for peer in peers},
        "plan_ms": sparse.plan_ms,
    }


def _row(found: Compared, name: str) -> dict[str, Any]:
    return {**found.timings[name].to_json()} if name in found.timings else {"failed": found.failed[name]}


def _percent(of: Mapping[str, Any], to: Mapping[str, Any], factor: float = 1.0) -> float | None:
    """Median ``of`` as percent of median ``to``, times ``factor``; None if one is missing."""
    if "median_ms" not in of or "median_ms" not in to:
        return None
    return round(100 * factor * of["median_ms"] / to["median_ms"], 1)


def needed(options: argparse.Namespace, tokens: int) -> int:
    """Inputs in two layouts, outputs of all sides, and what has a number for every block."""
    q_heads, kv_heads = heads(options.heads)
    token = options.head_dim * DTYPES[options.dtype].itemsize
    blocks = Blocks(tokens)
    outputs = (4 + 2 * len(options.method)) * tokens * q_heads * token
    inputs = 2 * tokens * (q_heads + 2 * kv_heads) * token
    return inputs + outputs + BYTES_PER_FLAG * blocks.slots * blocks.keys * q_heads + (1 << 28)


# ---- The run. ----


def measure_length(options: argparse.Namespace, tokens: int, flex: prefill_peers.Flex | None) -> list[dict[str, Any]]:
    """A case for each density."""
    device = torch.device(options.device)
    size, free = needed(options, tokens), free_bytes(device)
    if not prefill_flashinfer.unusable(device, DTYPES[options.dtype]):
        most = max(options.density) / 100
        size += prefill_flashinfer.needed(Blocks(tokens), heads(options.heads), options.head_dim, most, device)
    shapes = [{"tokens": tokens, "density": density} for density in options.density]
    if size > free:
        return [{**shape, "skipped": f"needs {gib(size)}, {gib(free)} are free"} for shape in shapes]
    cases = []
    prompt = Prompt(Blocks(tokens), heads(options.heads), options.head_dim, DTYPES[options.dtype], device)
    dense = dense_sides(prompt, ours=device.type == "cuda")
    for shape in shapes:
        try:
            sparse = Sparse(options, prompt, shape["density"], flex)
            found = measure_density(sparse, dense, options.repeats, options.seconds)
        except torch.OutOfMemoryError as error:
            found = {"skipped": f"out of memory: {str(error)[:120]}"}
        sparse = None  # type: ignore[assignment]
        gc.collect()
        cases.append({**shape, **found})
        tqdm.write(_progress(cases[-1]), file=sys.stderr)
    return cases


def _progress(case: Mapping[str, Any]) -> str:
    said = case.get("skipped") or ", ".join(
        f"{name} {side['median_ms']:.3f} ms" if "median_ms" in side else f"{name}: {side['failed']}"
        for name, side in case["sides"].items()
    )
    return f"  {case['tokens']} tokens, {case['density']:g} %: {said}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    given = {**DEFAULTS[device.type], **(QUICK[device.type] if options.quick else {})}
    for name, value in given.items():
        if not hasattr(options, name):
            setattr(options, name, value)
    heads(options.heads)
    if min(options.tokens) < 1:
        raise SystemExit(f"error: --tokens: expected at least 1, got {min(options.tokens)}")
    for density in options.density:
        if not 0 < density <= 100:
            raise SystemExit(f"error: --density: expected more than 0 and at most 100 percent, got {density:g}")
    wanted = device.type == "cuda" and not options.no_flex and not options.quick
    flex = prefill_peers.Flex() if wanted else None
    cases: list[dict[str, Any]] = []
    for tokens in tqdm(sorted(set(options.tokens)), desc="prefill", unit="length"):
        cases += measure_length(options, tokens, flex)
    fields = ("tokens", "density", "heads", "head_dim", "dtype", "method", "pool_q", "pool_k")
    return {
        "bench": "prefill",
        "options": {**{name: getattr(options, name) for name in fields}, "block_q": 128, "block_k": 64},
        "inputs": STRUCTURE,
        "environment": environment(device),
        "peers": {
            "torch": torch.__version__,
            "flashinfer": prefill_flashinfer.described(device, DTYPES[options.dtype]),
            "flex": flex.described() if flex else "not measured",
        },
        "targets": TARGETS[device.type],
        "cases": cases,
        "bytes_per_token_and_head": bytes_per_token_and_head(cases, heads(options.heads)[0]),
    }


def bytes_per_token_and_head(cases: Sequence[Mapping[str, Any]], q_heads: int) -> dict[str, float]:
    """By method, the least-squares slope over the lengths of the memory that a call takes beside inputs and outputs, at
    the density that takes most; empty without several lengths."""
    most: dict[str, dict[int, int]] = {}
    for case in cases:
        for method, call in case.get("calls", {}).items():
            if call.get("extra_bytes") is not None:
                of_length = most.setdefault(method, {})
                of_length[case["tokens"]] = max(call["extra_bytes"], of_length.get(case["tokens"], 0))
    return {
        method: round(slope(list(found), list(found.values())) / q_heads, 2)
        for method, found in most.items()
        if len(found) > 1
    }


# ---- The report. ----


def report(result: dict[str, Any]) -> str:
    o, e = result["options"], result["environment"]
    lines = [
        f"{e['device']}, torch {e['torch']}; {o['heads']} heads, D={o['head_dim']}, {o['dtype']}, blocks of "
        f"{o['block_q']} x {o['block_k']}; caches cold, medians",
        "",
        *text_table([row for case in result["cases"] for row in _rows(case, result["targets"])], left=["what"]),
    ]
    for method, size in result["bytes_per_token_and_head"].items():
        lines.append(f"{method}: {size:g} bytes per token and query head beside inputs and outputs")
    return "\n".join([*lines, *(f"{name}: {said}" for name, said in result["peers"].items() if name != "torch")])


def _rows(case: Mapping[str, Any], targets: Mapping[str, Any]) -> list[dict[str, str]]:
    shape = {"tokens": str(case["tokens"]), "density": f"{case['density']:g} %"}
    if "skipped" in case:
        return [{**shape, NOTE: case["skipped"]}]
    rows = []
    for name, side in case["sides"].items():
        row = {**shape, "what": name}
        if "median_ms" not in side:
            rows.append({**row, NOTE: side["failed"]})
            continue
        row["time"] = f"{side['median_ms']:.3f} ms"
        row["p10 .. p90"] = f"{side['p10_ms']:.3f} .. {side['p90_ms']:.3f}"
        method, _, part = name.rpartition("_")
        call = case["calls"].get(method, {})
        given = case.get(name, {}) if name in ("lists", "shared_lists") else {}
        ours: Mapping[str, Any] = call if part == "call" else given
        if ours:
            row["listed"] = f"{100 * ours['density']:.1f} %"
            row |= _speedups(ours["speedups"], targets["speedups"].get(f"{case['density']:g}", {}) if call else {})
        if name == "lists" and ours["percent_of_dense_per_block"]:
            row["dense per block"] = f"{ours['percent_of_dense_per_block']:.0f} %"
        if part == "selection" and call["selection_percent"]:
            row["of attention"] = f"{call['selection_percent']:.1f} %"
        rows.append(row)
    rows += [
        {**shape, "what": method, NOTE: call["failed"]} for method, call in case["calls"].items() if "failed" in call
    ]
    return rows


def _speedups(found: Mapping[str, float | None], targets: Mapping[str, float]) -> dict[str, str]:
    """Times faster than each peer, with what was asked for in brackets."""
    cells = {}
    for peer, factor in found.items():
        if factor:
            asked = f" ({targets[peer]:g}x)" if peer in targets else ""
            cells[f"x {peer.removeprefix('sdpa_').removesuffix('_attention')}"] = f"{factor:.2f}x{asked}"
    return cells
