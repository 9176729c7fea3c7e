"""Shapes from flags and presets, and the loop over them.

A flag that takes several values makes a sweep: the product of all of them. A preset is a list of grids that fix some of
the flags; the others keep what the command line says. A benchmark's module has ``FIELDS`` (the flags that make a shape)
and ``PRESETS``, and gives :func:`run_sweep` functions from a shape to bytes and to results.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.machine import free_bytes, gib
from benchmarks.measure.text_table import NOTE
from examples.support.results import DTYPES, environment
from unique_attn import ops

Grid = Mapping[str, Sequence[Any]]
Shape = argparse.Namespace
FORMATS = list(getattr(ops, "INDEX_FORMATS", ["exact"]))
TITLES = {"head_dim": "D", "page_size": "S", "tokens": "T"}  # of columns
MAY_BE_ZERO = ("new", "table", "sink_pages", "recent_pages")


# ---- Flags. ----


def add_shape_flags(
    parser: argparse.ArgumentParser, names: Sequence[str], presets: Mapping[str, Sequence[Grid]]
) -> None:
    """The flags in ``names``; each takes several values."""
    known: dict[str, dict[str, Any]] = {
        "batch": {"type": int, "default": [1], "help": "sequences"},
        "context": {"type": int, "default": [32768], "help": "tokens in the cache, the new ones included"},
        "tokens": {"type": int, "default": [1], "help": "query tokens of each sequence, 1 to 16"},
        "heads": {"default": ["32/8"], "help": "query heads / KV heads"},
        "head_dim": {"type": int, "default": [128]},
        "layers": {"type": int, "default": [16], "help": "of the model"},
        "hidden": {"type": int, "default": [2048], "help": "hidden size of the model"},
        "mlp": {"type": int, "default": [8192], "help": "intermediate size of the model's MLPs"},
        "vocab": {"type": int, "default": [128256], "help": "tokens that the model knows"},
        "page_size": {"type": int, "default": [8], "help": "tokens per page"},
        "block_size": {"type": int, "default": [64], "help": "tokens per physical block"},
        "table": {"type": int, "default": [0], "help": "tokens that a row of the block table has room for, if more"},
        "budget": {"type": int, "default": [512], "help": "tokens that a KV head reads"},
        "rule": {"default": ["directional"], "choices": list(ops.RULES)},
        "index_format": {"default": ["exact"], "choices": FORMATS, "help": "storage of the index"},
        "dtype": {"default": ["bf16"], "choices": list(DTYPES)},
    }
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", **known[name])
    parser.add_argument("--seconds", type=float, default=0.3, help="of a shape's timed rounds on CUDA, at least 5")
    parser.add_argument("--memory", type=float, help="GiB that a shape may take, if that is less than what is free")
    parser.add_argument("--preset", choices=list(presets), help="shapes of a table; other flags fill in what it leaves")


def shapes(options: argparse.Namespace, names: Sequence[str], presets: Mapping[str, Sequence[Grid]]) -> list[Shape]:
    """Every shape that the options ask for, once each, in their order."""
    found: list[Shape] = []
    for grid in presets[options.preset] if options.preset else [{}]:
        values = [_several(grid.get(name, getattr(options, name))) for name in names]
        for combination in itertools.product(*values):
            shape = argparse.Namespace(**dict(zip(names, combination)))
            if shape not in found:
                found.append(shape)
    for shape in found:
        check(shape)
    return found


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def heads(text: str) -> tuple[int, int]:
    """``32/8`` as numbers."""
    try:
        q_heads, kv_heads = (int(n) for n in text.split("/"))
    except ValueError:
        raise SystemExit(f"error: --heads: expected QUERY/KV such as 32/8, got {text!r}") from None
    return q_heads, kv_heads


def check(shape: Shape) -> None:
    """Exit with what is wrong with a shape."""
    given = vars(shape)
    for name, value in given.items():
        least = int(name not in MAY_BE_ZERO)
        if isinstance(value, int) and value < least:
            raise SystemExit(f"error: --{name.replace('_', '-')}: expected at least {least}, got {value}")
    if "heads" in given:
        heads(shape.heads)
    steps = (("context", "block_size", "block"), ("table", "block_size", "block"), ("budget", "page_size", "page"))
    for name, step, what in steps:
        if name in given and step in given and given[name] % given[step]:
            raise SystemExit(
                f"error: --{name}: expected a multiple of the {what} size {given[step]}, got {given[name]}"
            )


# ---- The loop. ----


def label(shape: Shape) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(shape).items())


def run_sweep(
    name: str,
    options: argparse.Namespace,
    names: Sequence[str],
    presets: Mapping[str, Sequence[Grid]],
    needed: Callable[[Shape], int],
    measure_shape: Callable[[Shape, Ceilings, argparse.Namespace], dict[str, Any]],
) -> dict[str, Any]:
    """Measure every shape that fits into memory; the others are in the result with the reason. So are those that were
    not reached before Ctrl-C or a time limit's SIGTERM.

    Args:
        name: of the benchmark.
        options: from the command line.
        names, presets: of the benchmark's shapes.
        needed: bytes that a shape takes.
        measure_shape: what a shape's result is; its ``options`` are added here.

    Returns:
        The JSON result, with a list ``cases``.
    """
    device = torch.device(options.device)
    ceilings = Ceilings(device)
    wanted = shapes(options, names, presets)
    sequential = ceilings.sequential  # while memory is empty
    cases: list[dict[str, Any]] = []
    bar = tqdm(wanted, desc=name, unit="shape")
    stopped = False
    for shape in bar:
        if stopped:
            cases.append({"options": vars(shape), "skipped": "the run was stopped"})
            continue
        bar.set_postfix_str(label(shape))
        free = free_bytes(device)
        if options.memory:
            free = min(free, int(options.memory * 2**30))
        try:
            size = needed(shape)
            if size <= free:
                with _sigterm_as_ctrl_c():
                    found = measure_shape(shape, ceilings, options)
            else:
                found = {"skipped": f"needs {gib(size)}, {gib(free)} are free"}
        except torch.OutOfMemoryError as error:
            found = {"skipped": f"out of memory: {str(error)[:120]}"}
        except ValueError as error:  # an op has no such shape
            found = {"skipped": str(error)[:200]}
        except KeyboardInterrupt:
            if all("skipped" in case for case in cases):
                raise  # nothing to keep
            found, stopped = {"skipped": "the run was stopped"}, True
        if "skipped" in found:
            tqdm.write(f"skipped {label(shape)}: {found['skipped']}", file=sys.stderr)
        cases.append({"options": vars(shape), **found})
    return {
        "bench": name,
        "preset": options.preset,
        "environment": environment(device),
        "ceiling": sequential,
        "chunk_ceilings": ceilings.measured_chunks(),
        "cases": cases,
    }


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # the only one that signals reach
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def index_name(o: Mapping[str, Any]) -> str:
    """The rule of a shape's index and, if it is not the keys' own numbers, how it is stored."""
    return str(o["rule"]) if o["index_format"] == "exact" else f"{o['rule']}, {o['index_format']}"


def report_head(result: Mapping[str, Any]) -> list[str]:
    """Lines above a benchmark's table: where, and against what."""
    e = result["environment"]
    where = f"{e['cpu']}, {e['threads']} threads" if e["device"] == "cpu" else f"{e['device']}, driver {e['driver']}"
    ceiling = result["ceiling"]
    chunks = ", ".join(f"{size} B {found['gb_per_s']:.0f}" for size, found in result["chunk_ceilings"].items())
    return [
        f"{where}, torch {e['torch']}; caches cold, medians",
        f"bandwidth ceiling {ceiling['gb_per_s']} GB/s ({ceiling['way']})"
        + (f"; random chunks, GB/s: {chunks}" if chunks else ""),
        "",
    ]


def side_cells(case: Mapping[str, Any], name: str = "ours", *, moved: str = "moved") -> dict[str, str]:
    """Time, percentiles, bytes (titled ``moved``), floor and percent of the ceiling of one side of a case, or why there
    are none."""
    side = case.get(name, {})
    if "median_ms" not in side:
        return {NOTE: str(case.get("skipped") or side.get("failed") or "not measured")}
    return {
        "time": ms(side["median_ms"]),
        **percentiles(side),
        moved: f"{side['bytes'] / 2**20:.2f} MiB",
        "floor": ms(side["floor_ms"]),
        "of ceiling": f"{side['percent_of_ceiling']:.1f} %",
    }


def ms(value: float) -> str:
    return f"{value:.4f} ms"


def percentiles(side: Mapping[str, Any]) -> dict[str, str]:
    return {"p10 .. p90": f"{side['p10_ms']:.4f} .. {side['p90_ms']:.4f}"}


def shape_cells(o: Mapping[str, Any], *names: str) -> dict[str, str]:
    """Settings of a shape, under their titles."""
    return {TITLES.get(name, name): index_name(o) if name == "rule" else str(o[name]) for name in names}
