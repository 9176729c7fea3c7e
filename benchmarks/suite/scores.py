"""Scores of all pages of a batch: page_scores against the bytes of the index."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.measure import checks
from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.harness import Side, compare, outcome, sets_needed
from benchmarks.measure.inputs import Shaped, entry_bytes, scoring
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
from unique_attn import ops

FIELDS = ("batch", "context", "tokens", "heads", "head_dim", "page_size", "block_size", "rule", "index_format", "dtype")
LENGTHS = [8192, 16384, 32768, 65536, 131072]
PRESETS: Mapping[str, Sequence[Grid]] = {
    "context": [{"batch": [80, 32, 8, 1], "context": LENGTHS, "head_dim": [128], "page_size": [8]}],
    "shapes": [{"batch": [80, 8], "context": [32768], "head_dim": [64, 128], "page_size": [4, 8, 16, 32]}],
    "rules": [{"batch": [32], "context": [32768], "rule": list(ops.RULES)}],
    "tokens": [{"batch": [32], "context": [32768], "tokens": [1, 2, 4, 8, 16]}],
}
PRESETS = {**PRESETS, "table": [grid for grids in PRESETS.values() for grid in grids]}
COMMITTED = {"cuda": [["--preset", "table"]]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_flags(parser, FIELDS, PRESETS)


class Scoring:
    """Input sets of one shape: an index of its own for each."""

    def __init__(self, o: Shape, device: torch.device) -> None:
        self.o = o
        self.shaped = shaped = Shaped(o, device)
        blocks = o.context // o.block_size
        self.bytes = index_bytes(o)
        count = sets_needed(self.bytes, device)
        self.indexes = [shaped.random_index(o.batch * blocks) for _ in range(count)]
        self.queries = [shaped.random.normal(o.batch, o.tokens, shaped.q_heads, o.head_dim) for _ in range(count)]
        self.table = shaped.random.table(o.batch, blocks)
        self.lens = shaped.lens(o.context)
        self.scoring = scoring(o)

    def run(self, i: int) -> torch.Tensor:
        return ops.page_scores(self.queries[i], self.indexes[i], self.table, self.lens, **self.scoring)

    def check(self, i: int, found: torch.Tensor) -> None:
        checks.scores(found, self.queries[i], self.indexes[i], self.table, self.lens, self.scoring)

    def side(self) -> Side:
        return Side([partial(self.run, i) for i in range(len(self.indexes))], self.bytes, self.check)


def index_bytes(o: Shape) -> int:
    """The entries of every page, read once."""
    return pages(o) * entry_bytes(o)


def pages(o: Shape) -> int:
    """Pages times KV heads of the batch."""
    return int(o.batch * heads(o.heads)[1] * (o.context // o.page_size))


def needed(o: Shape, device: torch.device) -> int:
    """Indexes and scores of all sets, and room to draw an index."""
    written = 4 * pages(o) * o.tokens
    return sets_needed(index_bytes(o), device) * (index_bytes(o) + written) + written


def measure_shape(o: Shape, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    scoring = Scoring(o, ceilings.device)
    found = compare({"ours": scoring.side()}, ceilings.device, rounds=options.repeats, seconds=options.seconds)
    return {
        "sets": len(scoring.indexes),
        "written_bytes": pages(o) * o.tokens * (4 if o.dtype == "fp32" else 2),
        "ours": outcome(found, "ours", scoring.bytes, ceilings.sequential),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    return run_sweep("scores", options, FIELDS, PRESETS, partial(needed, device=device), measure_shape)


def report(result: dict[str, Any]) -> str:
    shape = ("batch", "context", "head_dim", "page_size", "tokens", "rule")
    rows = [{**shape_cells(case["options"], *shape), **side_cells(case, moved="index")} for case in result["cases"]]
    return "\n".join([*report_head(result), *text_table(rows, left=["rule"])])
