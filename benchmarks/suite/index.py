"""Entries of the page index: page_index of appended tokens and of whole prompts, against bytes read and written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.measure import checks
from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.harness import Side, compare, outcome, sets_needed
from benchmarks.measure.inputs import Shaped, entry_bytes, scoring, storage
from benchmarks.measure.sweep import (
    Grid,
    Shape,
    add_shape_flags,
    heads,
    report_head,
    run_sweep,
    shape_cells,
    side_cells,
)
from benchmarks.measure.text_table import text_table
from examples.support.results import DTYPES
from unique_attn import ops, reference

FIELDS = ("batch", "context", "new", "heads", "head_dim", "page_size", "block_size", "rule", "index_format", "dtype")
PRESETS: dict[str, Sequence[Grid]] = {
    "append": [{"batch": [80, 1], "context": [8192], "new": [1, 4, 16], "page_size": [8]}],
    "prefill": [{"batch": [1], "context": [8192, 32768, 131072], "new": [0], "page_size": [4, 8, 16, 32]}],
    "rules": [{"batch": [1], "context": [131072], "new": [0], "rule": list(ops.RULES)}],
}
PRESETS["table"] = [grid for grids in list(PRESETS.values()) for grid in grids]
COMMITTED = {"cuda": [["--preset", "table"]]}
CHECKED_PAGES = 16  # at the end of a sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--new", type=int, nargs="+", default=[0], help="tokens appended last, 0 for all of them")
    add_shape_flags(parser, FIELDS[:2] + FIELDS[3:], PRESETS)


class Indexing:
    """Input sets of one shape: keys and an index of their own. Only the blocks that are touched exist; the others of a
    sequence are the first one of them again, never read."""

    def __init__(self, o: Shape, device: torch.device) -> None:
        self.o = o
        self.shaped = shaped = Shaped(o, device)
        self.bytes, blocks = bytes_moved(o), blocks_touched(o)
        count = sets_needed(self.bytes, device)
        self.keys = [
            shaped.random.normal(o.batch * blocks, shaped.kv_heads, o.block_size, o.head_dim) for _ in range(count)
        ]
        self.scoring = scoring(o)
        self.indexes = [ops.new_index(keys, **self.scoring) for keys in self.keys]
        touched = shaped.random.table(o.batch, blocks)
        before = touched[:, :1].expand(-1, o.context // o.block_size - blocks)
        self.table = torch.cat([before, touched], 1).contiguous()
        self.ends = shaped.lens(o.context)
        self.starts = self.ends - new_tokens(o)

    def run(self, i: int) -> torch.Tensor:
        ops.page_index(
            self.keys[i], self.indexes[i], self.table, self.starts, self.ends,
            max_new_tokens=new_tokens(self.o), **self.scoring,
        )  # fmt: skip
        return self.indexes[i]

    def parts(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        o = self.o
        how = {**storage(o), "head_dim": o.head_dim} if storage(o) else {}
        return ops.decode_index(index, rule=o.rule, dtype=self.shaped.dtype, **how)

    def check(self, i: int, index: torch.Tensor) -> None:
        """The last pages of some sequences against the reference, and no touched entry left as it was poisoned."""
        o = self.o
        parts = self.parts(index)
        first = (o.context - new_tokens(o)) // o.page_size
        per_block = o.block_size // o.page_size
        pages = torch.arange(first, o.context // o.page_size, device=index.device)
        for part in parts:
            entries = part[self.table[:, pages // per_block].long(), :, pages % per_block]
            assert not entries.isnan().any(), "index: NaN, or entries were not written"
        some = max(first * o.page_size, o.context - CHECKED_PAGES * o.page_size)
        last = pages[pages >= some // o.page_size]
        for b in checks.some(o.batch):
            expected = ops.new_index(self.keys[i], **self.scoring)
            reference.page_index(
                self.keys[i], expected, self.table[b : b + 1], torch.full_like(self.ends[:1], some), self.ends[:1],
                max_new_tokens=o.context, **self.scoring, compute_dtype=torch.float32,
            )  # fmt: skip
            where = (self.table[b, last // per_block].long(), slice(None), last % per_block)
            for part, wanted in zip(parts, self.parts(expected)):
                checks.close("index", part[where], wanted[where], checks.TOLERANCE[self.shaped.dtype])

    def side(self) -> Side:
        # Poison, so that the check sees what the call wrote and not what an earlier one did.
        for index in self.indexes:
            index.fill_(255)
        return Side([partial(self.run, i) for i in range(len(self.keys))], self.bytes, self.check)


def new_tokens(o: Shape) -> int:
    return int(o.new or o.context)


def pages_touched(o: Shape) -> int:
    return int(o.context // o.page_size - (o.context - new_tokens(o)) // o.page_size)


def blocks_touched(o: Shape) -> int:
    return int(o.context // o.block_size - (o.context - new_tokens(o)) // o.block_size)


def bytes_moved(o: Shape) -> int:
    """Keys of the touched pages read, their entries written."""
    keys = o.page_size * o.head_dim * DTYPES[o.dtype].itemsize
    return int(o.batch * heads(o.heads)[1] * pages_touched(o) * (keys + entry_bytes(o)))


def needed(o: Shape, device: torch.device) -> int:
    """Keys and index of all sets, and one index more to check them."""
    block = o.block_size * o.head_dim * DTYPES[o.dtype].itemsize
    entries = o.block_size // o.page_size * entry_bytes(o)
    each = o.batch * heads(o.heads)[1] * blocks_touched(o) * (block + entries)
    return int((sets_needed(bytes_moved(o), device) + 1) * each)


def measure_shape(o: Shape, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    if new_tokens(o) > o.context:
        raise SystemExit(f"error: --new: expected at most the context {o.context}, got {o.new}")
    indexing = Indexing(o, ceilings.device)
    found = compare({"ours": indexing.side()}, ceilings.device, rounds=options.repeats, seconds=options.seconds)
    return {"sets": len(indexing.keys), "ours": outcome(found, "ours", indexing.bytes, ceilings.sequential)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    return run_sweep("index", options, FIELDS, PRESETS, partial(needed, device=device), measure_shape)


def report(result: dict[str, Any]) -> str:
    shape = ("batch", "context", "new", "head_dim", "page_size", "rule")
    rows = []
    for case in result["cases"]:
        o = {**case["options"], "new": case["options"]["new"] or "all"}
        rows.append({**shape_cells(o, *shape), **side_cells(case)})
    return "\n".join([*report_head(result), *text_table(rows, left=["rule"])])
