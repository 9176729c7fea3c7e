"""Selection of the best pages: topk_pages against FlashInfer's top-k kernels and torch.topk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.measure import peers
from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.harness import Compared, Side, best_of, compare, outcome, ratio, sets_needed
from benchmarks.measure.inputs import Random
from benchmarks.measure.sweep import Grid, Shape, add_shape_flags, ms, report_head, run_sweep, shape_cells
from benchmarks.measure.text_table import NOTE, text_table
from examples.support.results import DTYPES
from unique_attn import ops

FIELDS = ("rows", "pages", "k", "values", "sink_pages", "recent_pages", "dtype")
ALL_PAGES = [1 << n for n in range(10, 18)]
PRESETS: dict[str, Sequence[Grid]] = {
    "pages": [
        {"rows": [256], "pages": ALL_PAGES},
        {"rows": [640], "pages": [4096]},
        {"rows": [8], "pages": [16384, 131072]},
    ],
    "adversarial": [{"rows": [256], "pages": [4096, 32768], "values": ["equal", "two", "sorted", "infinite"]}],
}
PRESETS["table"] = [grid for grids in list(PRESETS.values()) for grid in grids]
COMMITTED = {"cuda": [["--preset", "table"]]}
PAGE_SIZE = 8  # only makes lengths of page counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    many: dict[str, Any] = {"type": int, "nargs": "+"}
    parser.add_argument("--rows", **many, default=[8], help="selections: sequences times KV heads")
    parser.add_argument("--pages", **many, default=[4096], help="scores of a row")
    parser.add_argument("--k", **many, default=[64], help="pages to select")
    parser.add_argument("--values", nargs="+", default=["random"], choices=list(VALUES), help="what the scores are")
    parser.add_argument("--sink-pages", **many, default=[1], help="first pages that ours always takes, as in decoding")
    parser.add_argument("--recent-pages", **many, default=[1], help="last pages that ours always takes")
    add_shape_flags(parser, ["dtype"], PRESETS)


# ---- Inputs. ----


def _random(random: Random, rows: int, pages: int, k: int) -> torch.Tensor:
    return random.normal(rows, pages)


def _equal(random: Random, rows: int, pages: int, k: int) -> torch.Tensor:
    return torch.full((rows, pages), 0.625, dtype=random.dtype, device=random.device)


def _two(random: Random, rows: int, pages: int, k: int) -> torch.Tensor:
    return torch.where(random.normal(rows, pages) > 0, 2.25, -1.5).to(random.dtype)


def _sorted(random: Random, rows: int, pages: int, k: int) -> torch.Tensor:
    return random.normal(rows, pages).sort(-1).values


def _infinite(random: Random, rows: int, pages: int, k: int) -> torch.Tensor:
    """-inf but for k scores."""
    finite = random.pages((rows,), pages, min(k, pages)).long()
    scores = torch.full((rows, pages), -torch.inf, dtype=random.dtype, device=random.device)
    return scores.scatter_(1, finite, random.normal(*finite.shape))


VALUES = {"random": _random, "equal": _equal, "two": _two, "sorted": _sorted, "infinite": _infinite}


class Selecting:
    """Input sets of one shape: scores of their own, as ``[rows, 1, 1, pages]`` for ours and ``[rows, pages]`` for
    peers."""

    def __init__(self, o: Shape, device: torch.device) -> None:
        self.o = o
        random = Random(device, DTYPES[o.dtype])
        self.bytes = scores_bytes(o)
        self.scores = [
            VALUES[o.values](random, o.rows, o.pages, o.k).contiguous() for _ in range(sets_needed(self.bytes, device))
        ]
        self.lens = torch.full((o.rows,), o.pages * PAGE_SIZE, dtype=torch.int32, device=device)

    def run(self, i: int) -> torch.Tensor:
        o = self.o
        return ops.topk_pages(
            self.scores[i].view(o.rows, 1, 1, o.pages), self.lens, o.k,
            page_size=PAGE_SIZE, sink_pages=o.sink_pages, recent_pages=o.recent_pages,
        )  # fmt: skip

    def check(self, i: int, found: torch.Tensor) -> None:
        """Exactly what a stable sort selects, ties to the lowest page, with the pages that are always taken."""
        o = self.o
        scores = self.scores[i].float()
        forced = torch.zeros(o.pages, dtype=torch.bool, device=scores.device)
        forced[: o.sink_pages] = True
        forced[o.pages - o.recent_pages :] = True
        order = scores.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        expected = order[:, : o.k].sort(-1).values.to(torch.int32)
        wrong = int((found.view(o.rows, -1) != expected).any(-1).sum())
        assert wrong == 0, f"{wrong} of {o.rows} rows differ from the stable sort"

    def check_peer(self, i: int, indices: torch.Tensor) -> None:
        """Distinct pages with the k largest scores; which of several equal ones is left to the peer."""
        scores, indices = self.scores[i].float(), indices.view(self.o.rows, -1).long()
        assert indices.shape[1] == self.o.k, f"expected {self.o.k} pages, got {indices.shape[1]}"
        assert ((indices >= 0) & (indices < self.o.pages)).all(), "pages out of range, or not written"
        ascending = indices.sort(-1).values
        assert (ascending[:, 1:] != ascending[:, :-1]).all(), "a page was selected twice"
        expected = scores.topk(self.o.k, dim=-1).values
        found = scores.gather(1, indices).sort(-1, descending=True).values
        wrong = int((found != expected).any(-1).sum())
        assert wrong == 0, f"{wrong} of {self.o.rows} rows have other scores than torch.topk"

    def sides(self) -> dict[str, Side]:
        """Ours, and every way of every peer that is here."""
        ways: dict[str, tuple[peers.TopK, Any]] = {"ours": (lambda i: self.run(i), self.check)}
        for name, way in peers.topk_ways(self.scores, self.o.k).items():
            ways[name] = (way, self.check_peer)
        return {
            name: Side([partial(run, i) for i in range(len(self.scores))], self.bytes, check)
            for name, (run, check) in ways.items()
        }


def scores_bytes(o: Shape) -> int:
    return int(o.rows * o.pages * DTYPES[o.dtype].itemsize)


def needed(o: Shape, device: torch.device) -> int:
    """All sets, and what checking a set takes (a sort of float32 with int64 positions)."""
    return sets_needed(scores_bytes(o), device) * scores_bytes(o) + 40 * o.rows * o.pages + (1 << 26)


def measure_shape(o: Shape, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    if not o.sink_pages + o.recent_pages <= o.k <= o.pages:
        raise SystemExit(f"error: --k: expected the pages always taken up to the {o.pages} pages of a row, got {o.k}")
    selecting = Selecting(o, ceilings.device)
    sides = selecting.sides()
    found = compare(sides, ceilings.device, rounds=options.repeats, seconds=options.seconds, launches=True)
    ours = outcome(found, "ours", selecting.bytes, ceilings.sequential)
    timed: dict[str, Any] = {}
    for peer in peers.TOPK_PEERS:
        names = [name for name in sides if name.startswith(peer)]
        if names:
            best = best_of(found, names, selecting.bytes, ceilings.sequential)
            timed[peer] = {**best, **_best_launched(found, names), "ratio": ratio(best, ours)}
            if "launched" in timed[peer] and "launched" in ours:
                timed[peer]["launched_ratio"] = ratio(timed[peer]["launched"], ours["launched"])
    return {"sets": len(selecting.scores), "ours": ours, "peers": timed}


def _best_launched(found: Compared, names: Sequence[str]) -> dict[str, Any]:
    """The way with the fastest single launched call."""
    timed = [name for name in names if name in found.launched]
    if not timed:
        return {}
    best = min(timed, key=lambda name: found.launched[name].median)
    return {"launched": {"way": best, **found.launched[best].to_json()}}


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    result = run_sweep("topk", options, FIELDS, PRESETS, partial(needed, device=device), measure_shape)
    return {**result, "peers": peers.versions(device)}


def report(result: dict[str, Any]) -> str:
    rows = [_cells(case) for case in result["cases"]]
    lines = [*report_head(result), *text_table(rows, left=["values"])]
    failures = sorted(_failures(result["cases"]))
    return "\n".join([*lines, "", *[f"left out: {each}" for each in failures], *peers.notes(result["peers"])])


def _cells(case: dict[str, Any]) -> dict[str, str]:
    """A row of the table; times of single launched calls are there on CUDA alone."""
    row, ours = shape_cells(case["options"], "rows", "pages", "k", "values"), case.get("ours", {})
    if "median_ms" not in ours:
        return {**row, NOTE: str(case.get("skipped") or ours.get("failed"))}
    row["ours"] = ms(ours["median_ms"])
    row["launched"] = ms(ours["launched"]["median_ms"]) if "launched" in ours else ""
    row["of ceiling"] = f"{ours['percent_of_ceiling']:.1f} %"
    for name in peers.TOPK_PEERS:
        peer = case["peers"].get(name, {})
        timed = "median_ms" in peer
        row[name] = ms(peer["median_ms"]) if timed else ""
        row[f"{name} ratio"] = f"{peer['ratio'] or 0:.2f}" if timed else ""
        row[f"{name} launched"] = f"{peer['launched_ratio']:.2f}" if "launched_ratio" in peer else ""
    return row


def _failures(cases: Sequence[dict[str, Any]]) -> set[str]:
    return {
        f"{name} ({case['options']['values']}, {case['options']['pages']} pages): {way['failed']}"
        for case in cases
        for peer in case.get("peers", {}).values()
        for name, way in peer["ways"].items()
        if "failed" in way
    }
