"""Decode steps of a whole Hugging Face model in a CUDA graph: page-sparse against dense attention."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from benchmarks.measure import peers
from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.harness import ColdCache, Timing, ratio, reason, row, time_cpu, time_cuda
from benchmarks.measure.machine import free_bytes, gib
from benchmarks.measure.sweep import FORMATS, Grid, Shape, add_shape_flags, heads, percentiles, report_head, run_sweep
from benchmarks.measure.text_table import NOTE, text_table
from examples.support.results import DTYPES

if TYPE_CHECKING:
    from benchmarks.measure.model_sides import DecodeSide, Storage
    from unique_attn.hf.step import GraphedStep

FIELDS = (
    "batch", "context", "layers", "heads", "head_dim", "hidden", "mlp", "vocab", "page_size", "block_size", "budget",
    "rule", "dtype",
)  # fmt: skip
LENGTHS = [8192, 16384, 32768]
PRESETS: dict[str, Sequence[Grid]] = {
    "batch80": [{"batch": [80], "context": LENGTHS}],
    "batch32": [{"batch": [32], "context": [32768]}],
    "latency": [{"batch": [1], "context": [32768, 131072]}],
}
PRESETS["table"] = [grid for name in ("batch80", "batch32", "latency") for grid in PRESETS[name]]
COMMITTED = {"cuda": [["--preset", "table"]]}
SIDES = ("unique", "flashinfer", "sdpa")
ROOM = peers.NHD_BLOCK  # tokens that a row grows by until its length is set back; within a block of every layout
WARMUP = 3
FEWEST = 20  # timed steps on CUDA, however long they take
CHECKED_ROWS = 4
CHECKED_STEPS = 3
# Norm of the difference of the logits to the reference's, by the norm of those. Rounding adds up over the layers: 16 of
# the preset give 0.03 in bf16; to attend to 7 of 8 pages gives 0.9.
TOLERANCE = {"bf16": 0.1, "fp16": 0.02, "fp32": 1e-4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_flags(parser, FIELDS, PRESETS)
    parser.set_defaults(head_dim=[64], seconds=1.0)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument(
        "--index-format", nargs="+", dest="index_formats", default=FORMATS, choices=FORMATS, help="storage of the index"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model's norms, rotation and MLPs, for all sides"
    )


# ---- Steps. ----


def graphed(side: DecodeSide, model: Any, storage: Storage, length: int) -> GraphedStep:
    """A captured step of ``model`` with the attention of ``side``, after ``length`` tokens."""
    from unique_attn.hf.step import GraphedStep

    step = GraphedStep(model, side.cache(model, storage, length), side.o.batch)
    generator = torch.Generator(step.device).manual_seed(2)
    step.tokens.random_(side.o.vocab, generator=generator)
    step.capture()
    return step


def time_step(step: GraphedStep, rounds: int, seconds: float) -> Timing:
    """Time ``rounds`` steps, or what takes ``seconds`` but at least ``FEWEST``; rows grow, ``ROOM`` tokens at a time.

    Raises:
        AssertionError: what the steps left is not finite.
    """
    from unique_attn.hf.step import restore

    cuda = step.device.type == "cuda"
    timed = time_cuda if cuda else time_cpu
    cold = ColdCache(step.device)  # reading it keeps the device busy until the graph is in its queue
    counters = step.cache.counters()
    start = [each.clone() for each in counters]
    taken: list[float] = []
    while len(taken) < WARMUP + rounds:
        if len(taken) % ROOM == 0:
            restore(counters, start)
        if len(taken) == WARMUP:
            if cuda:
                rounds = min(rounds, max(FEWEST, int(seconds / taken[-1])))
            _logits(step).fill_(torch.nan)
        cold.flush()
        taken.append(timed(step.run))
    assert bool(_logits(step).isfinite().all()), "logits are not finite"
    return Timing.of(taken[WARMUP:])


def _logits(step: GraphedStep) -> torch.Tensor:
    assert step.logits is not None
    return step.logits


# ---- Whether a side is right. ----


class Reference:
    """Logits of transformers' own SDPA and StaticCache, run eagerly, where the budget covers every token.

    There page-sparse attention reads everything, so all sides must agree.
    """

    def __init__(self, o: Shape, model: Any, device: torch.device) -> None:
        from benchmarks.measure.model_sides import Sdpa, Storage

        context = max(o.block_size, o.budget // o.block_size * o.block_size)
        self.o = argparse.Namespace(**{**vars(o), "context": context, "budget": max(o.budget, context)})
        self.o.batch = min(o.batch, CHECKED_ROWS)
        self.model = model
        self.storage = Storage(self.o, device)
        generator = torch.Generator(device).manual_seed(3)
        shape = (CHECKED_STEPS, self.o.batch, 1)
        self.tokens = torch.randint(o.vocab, shape, generator=generator, device=device)
        self.logits = self._run(Sdpa(self.o, stock=True), eager=True)

    @torch.no_grad()
    def _run(self, side: DecodeSide, eager: bool = False) -> list[torch.Tensor]:
        """Logits ``[B, vocabulary]`` of some steps, each into memory full of NaN."""
        from unique_attn.hf.step import GraphedStep

        self.storage.fill(side.layout)
        step = GraphedStep(self.model, side.cache(self.model, self.storage, self.o.context - ROOM), self.o.batch)
        if not eager:
            step.capture()
        found = []
        for tokens in self.tokens:
            if step.logits is not None:
                step.logits.fill_(torch.nan)
            step.tokens.copy_(tokens)
            step.run()
            found.append(_logits(step).float())
        return found

    def error(self, side: DecodeSide) -> float:
        """Largest relative error of the steps with ``side``, one of ``self.o``'s shape.

        Raises:
            AssertionError: it is larger than ``TOLERANCE``.
        """
        errors = [float((ours - wanted).norm() / wanted.norm()) for ours, wanted in zip(self._run(side), self.logits)]
        worst = max(errors, key=lambda e: e if e == e else torch.inf)
        limit = TOLERANCE[self.o.dtype]
        assert worst <= limit, f"logits differ by {worst:.2e} of the reference's, more than {limit}"
        return worst


# ---- A shape. ----


def kv_bytes(o: Shape) -> int:
    """Keys and values of all layers."""
    return int(2 * o.layers * o.batch * heads(o.heads)[1] * o.context * o.head_dim * DTYPES[o.dtype].itemsize)


def needed(o: Shape) -> int:
    """What all sides share: weights, keys and values; and logits. Sides look themselves whether their own part fits."""
    from benchmarks.measure.model_sides import weights_bytes

    logits = 8 * o.batch * o.vocab * 4
    return weights_bytes(o) + kv_bytes(o) + logits + (1 << 26)


def measure_shape(o: Shape, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.measure import model_sides

    device = ceilings.device
    if o.context < o.block_size + ROOM:
        raise ValueError(f"context: expected more than a block, {o.block_size + ROOM} tokens, got {o.context}")
    model = model_sides.new_model(o, device)
    with compiled(model) if options.compile else contextlib.nullcontext():
        return {"compiled": options.compile, **_measure_model(o, model, ceilings, options)}


def _measure_model(o: Shape, model: Any, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.measure import model_sides

    device = ceilings.device
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    reference = Reference(o, model, device)
    sides = model_sides.new_sides(o, options.sides, options.index_formats, device)
    checked = model_sides.new_sides(reference.o, options.sides, options.index_formats, device)
    errors: dict[str, float] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, side in checked.items():
        try:
            errors[name] = reference.error(side)
        except Exception as error:  # peers raise what they like
            found[name] = {"failed": reason(error)}
    del reference
    storage = model_sides.Storage(o, device)
    shared = {"weights_bytes": weights, "kv_bytes": storage.bytes}
    for name, side in sides.items():
        if name in errors:
            found[name] = _measure_side(side, model, storage, ceilings, options, sum(shared.values()))
        if "median_ms" in found[name]:
            found[name]["logits_error"] = errors[name]
            tqdm.write(f"  {name} {found[name]['median_ms']:.3f} ms", file=sys.stderr)
        else:
            tqdm.write(f"  {name}: {found[name].get('skipped') or found[name]['failed']}", file=sys.stderr)
    ordered = {name: found[name] for name in sides}
    return {**shared, "sides": ordered, **_compared(ordered, sides)}


@contextlib.contextmanager
def compiled(model: Any) -> Iterator[None]:
    """``torch.compile`` of what any engine fuses beside attention: norms, MLPs and the rotation of queries and keys."""
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "MLP")):
            module.compile(dynamic=False)
    modeling: Any = sys.modules[type(model).__module__]
    eager = modeling.apply_rotary_pos_emb
    modeling.apply_rotary_pos_emb = torch.compile(eager, dynamic=False)
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = eager


def _measure_side(
    side: DecodeSide, model: Any, storage: Storage, ceilings: Ceilings, options: argparse.Namespace, shared: int
) -> dict[str, Any]:
    """A side's time, bytes and memory; or why there are none."""
    device, o = ceilings.device, side.o
    own, free = side.own_bytes(), free_bytes(device)  # the side before is gone
    if options.memory:
        free = min(free, int(options.memory * 2**30) - shared)
    if own > free:
        return {"skipped": f"needs {own} bytes ({gib(own)}) beside weights, keys and values; {gib(free)} are free"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step = graphed(side, model, storage, o.context - ROOM)
        timing = time_step(step, options.repeats, options.seconds)
    except torch.OutOfMemoryError as error:
        return {"skipped": f"out of memory: {str(error)[:120]}"}
    except Exception as error:  # peers raise what they like
        return {"failed": reason(error)}
    finally:
        step = None  # type: ignore[assignment]
        gc.collect()
    attention = side.attention_bytes()
    weights = shared - storage.bytes
    return {
        **row(timing, attention + weights, ceilings.sequential),
        "attention_bytes": attention,
        "own_bytes": own,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "tokens_per_s": round(o.batch / timing.median, 1),
    }


def _compared(found: Mapping[str, Mapping[str, Any]], sides: Mapping[str, DecodeSide]) -> dict[str, Any]:
    """The fastest way of each group, and how many times faster every unique side is than each peer."""
    best: dict[str, str] = {}
    for name, side in sides.items():
        if "median_ms" in found[name]:
            now = best.get(side.group)
            if now is None or found[name]["median_ms"] < found[now]["median_ms"]:
                best[side.group] = name
    dense = [group for group in best if not group.startswith("unique")]
    speedups = {
        group: {peer: ratio(found[best[peer]], found[name]) for peer in dense}
        for group, name in best.items()
        if group not in dense
    }
    peer = min(dense, key=lambda group: found[best[group]]["median_ms"], default=None)
    return {"best": best, "peer": peer, "speedups": speedups}


# ---- The result. ----


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    from unique_attn.hf import compat  # noqa: F401  says what to do where transformers is missing

    result = run_sweep("model", options, FIELDS, PRESETS, needed, measure_shape)
    result["peers"] = {**peers.versions(device), "transformers": importlib.metadata.version("transformers")}
    return result


def report(result: dict[str, Any]) -> str:
    lines = report_head(result)
    for case in result["cases"]:
        o = case["options"]
        shape = f"{o['layers']} layers, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}"
        lines.append(f"batch {o['batch']}, {o['context']} tokens, {shape}, budget {o['budget']}, S={o['page_size']}")
        if "skipped" in case:
            lines += [f"  skipped: {case['skipped']}", ""]
            continue
        lines += text_table([_side_cells(name, side) for name, side in case["sides"].items()], left=["side"])
        for group, ratios in case["speedups"].items():
            said = ", ".join(f"{ratio:.2f}x {peers.DENSE_PEERS[peer]}" for peer, ratio in ratios.items())
            lines += [f"{group}: {said}"] if said else []
        lines.append("")
    return "\n".join([*lines, *peers.notes(result["peers"])])


def _side_cells(name: str, side: Mapping[str, Any]) -> dict[str, str]:
    if "median_ms" not in side:
        return {"side": name, NOTE: side.get("skipped") or side["failed"]}
    return {
        "side": name,
        "ms per step": f"{side['median_ms']:.3f}",
        **percentiles(side),
        "tokens/s": f"{side['tokens_per_s']:.1f}",
        "must read": gib(side["bytes"]),
        "of ceiling": f"{side['percent_of_ceiling']:.1f} %",
        "peak": gib(side["peak_bytes"]) if side["peak_bytes"] is not None else "",
    }
