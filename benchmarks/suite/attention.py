"""Attention to pages that are already selected: sparse_decode against the bytes of their keys and values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.measure import checks
from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.harness import Side, compare, outcome, sets_needed
from benchmarks.measure.inputs import Shaped
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
from unique_attn import ops

FIELDS = ("batch", "context", "tokens", "heads", "head_dim", "page_size", "block_size", "budget", "dtype")
SIZES = {"head_dim": [128, 64], "page_size": [4, 8, 16, 32]}
PRESETS: dict[str, Sequence[Grid]] = {
    "shapes": [{"batch": [80], "context": [32768], "tokens": [1, 4], **SIZES}],
    "batches": [{"batch": [32, 8, 1], "context": [32768], "tokens": [1], **SIZES}],
}
PRESETS["table"] = [grid for grids in list(PRESETS.values()) for grid in grids]
COMMITTED = {"cuda": [["--preset", "table"]]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_flags(parser, FIELDS, PRESETS)


class Attending:
    """Input sets of one shape: selections of their own, over as many caches as it takes to be larger than the L2."""

    def __init__(self, o: Shape, device: torch.device) -> None:
        self.o = o
        self.shaped = shaped = Shaped(o, device)
        random, blocks = shaped.random, o.context // o.block_size
        caches, count = layout(o, device)
        self.caches = [shaped.caches(o.batch * blocks) for _ in range(caches)]
        self.table = random.table(o.batch, blocks)
        self.lens = shaped.lens(o.context)
        visible = (o.context - o.tokens) // o.page_size + 1  # what the first query token sees
        k = min(o.budget // o.page_size, visible)
        rows = (o.batch, o.tokens, shaped.kv_heads)
        self.pages = [random.pages(rows, visible, k) for _ in range(count)]
        self.queries = [random.normal(o.batch, o.tokens, shaped.q_heads, o.head_dim) for _ in range(count)]
        self.bytes = self._bytes()

    def _bytes(self) -> int:
        """Keys and values of the pages that any of a sequence's query tokens selected, each once."""
        pages = self.pages[0].transpose(1, 2).flatten(2).sort(-1).values  # [B, H, T * k]
        distinct = pages[..., :1].numel() + int((pages[..., 1:] != pages[..., :-1]).sum())
        return distinct * self.o.page_size * token_bytes(self.o)

    def run(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        k_cache, v_cache = self.caches[i % len(self.caches)]
        return ops.sparse_decode(
            self.queries[i], k_cache, v_cache, self.pages[i], self.table, self.lens, page_size=self.o.page_size
        )

    def check(self, i: int, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        k_cache, v_cache = self.caches[i % len(self.caches)]
        checks.attention(
            found, self.queries[i], k_cache, v_cache, self.pages[i], self.table, self.lens, page_size=self.o.page_size
        )

    def side(self) -> Side:
        return Side([partial(self.run, i) for i in range(len(self.pages))], self.bytes, self.check)


def token_bytes(o: Shape) -> int:
    """Key and value of one token and one KV head."""
    return int(2 * o.head_dim * DTYPES[o.dtype].itemsize)


def layout(o: Shape, device: torch.device) -> tuple[int, int]:
    """Caches and selections that rotate."""
    cache = o.batch * heads(o.heads)[1] * o.context * token_bytes(o)
    selected = o.batch * heads(o.heads)[1] * min(o.budget, o.context) * token_bytes(o)
    return sets_needed(cache, device), sets_needed(selected, device)


def needed(o: Shape, device: torch.device) -> int:
    """Caches, selections, and room to draw and to check them."""
    caches, count = layout(o, device)
    rows = o.batch * heads(o.heads)[1]
    selections = count * rows * o.tokens * (4 * o.budget // o.page_size)
    checked = 2 * 8 * o.context * heads(o.heads)[1] * o.head_dim
    return caches * rows * o.context * token_bytes(o) + selections + checked + (1 << 28)


def measure_shape(o: Shape, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    attending = Attending(o, ceilings.device)
    chunk = o.page_size * token_bytes(o) // 2
    ceiling = ceilings.chunks(chunk)
    found = compare({"ours": attending.side()}, ceilings.device, rounds=options.repeats, seconds=options.seconds)
    return {
        "sets": len(attending.pages),
        "caches": len(attending.caches),
        "chunk_bytes": chunk,
        "ours": outcome(found, "ours", attending.bytes, ceiling),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    return run_sweep("attention", options, FIELDS, PRESETS, partial(needed, device=device), measure_shape)


def report(result: dict[str, Any]) -> str:
    shape = ("batch", "context", "head_dim", "page_size", "tokens", "budget")
    rows = [{**shape_cells(case["options"], *shape), **side_cells(case, moved="K and V")} for case in result["cases"]]
    below = "% of the bandwidth of randomly placed chunks of one page's keys"
    return "\n".join([*report_head(result), *text_table(rows), "", below])
