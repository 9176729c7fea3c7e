"""What a user gets from plain ``model.generate()``: milliseconds per new token of a whole Hugging Face model.

transformers' Llama with random weights, made on the device, reads random prompts and decodes greedily. Sides are stock
attention as it comes (``sdpa``), with ``--static`` also the fastest way that transformers has (a static cache, compiled
by itself), and the same calls after ``unique_attn.enable(model)``. ``off`` has ``graphs="off"``: no captured steps.
``step`` is the floor: the captured step of ``benchmarks model`` for the same shape, without transformers' loop.

A stopping criterion notes when each token is there. The time of a token is the mean over the last ``LAST`` of a
call, so memory that grows and steps that are captured on the way count if they happen there; the slowest token behind
the first ``FIRST`` says what they cost at worst. A whole call comes before the timed ones: in the first one of a
process, some attention of PyTorch makes a plan for every length of the cache, which is in ``cold_ms``, the time of a
token in that call. ``peak_bytes`` is what the device had in use, the allocator's reserve included; ``held_bytes`` is
what is in use after the last token without that reserve.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.harness import ratio, reason
from benchmarks.measure.machine import gib
from benchmarks.measure.sweep import FORMATS, Grid, Shape, add_shape_flags, heads, report_head, run_sweep
from benchmarks.measure.text_table import NOTE, text_table
from benchmarks.suite.ttft import MODELS
from examples.support.results import DTYPES

if TYPE_CHECKING:
    from unique_attn import UniqueConfig

FIELDS = (
    "batch", "context", "layers", "heads", "head_dim", "hidden", "mlp", "vocab", "page_size", "block_size", "budget",
    "rule", "dtype",
)  # fmt: skip
PRESETS: dict[str, Sequence[Grid]] = {
    "16_layers": [
        {**MODELS["16 layers"], "batch": [1], "context": [512, 2048, 8192, 32768, 131072]},
        {**MODELS["16 layers"], "batch": [8], "context": [16384]},
        {**MODELS["16 layers"], "batch": [32], "context": [2048, 16384]},
    ],
    "32_layers": [
        {**MODELS["32 layers"], "batch": [1], "context": [32768]},
        {**MODELS["32 layers"], "batch": [8], "context": [16384]},
    ],
    "static": [
        {**MODELS["16 layers"], "batch": [1], "context": [32768]},
        {**MODELS["16 layers"], "batch": [8], "context": [16384]},
    ],
    "quick": [
        {**MODELS["16 layers"], "batch": [1], "context": [4096, 32768]},
        {**MODELS["16 layers"], "batch": [8], "context": [16384]},
    ],
}
PRESETS["table"] = [*PRESETS["16_layers"], *PRESETS["32_layers"]]
COMMITTED = {"cuda": [["--preset", "16_layers"], ["--preset", "32_layers"], ["--preset", "static", "--static"]]}
STOCK, STATIC, OFF, UNIQUE, COMPILED, STEP = "sdpa", "static", "off", "unique", "unique-static", "step"
FIRST = 8  # tokens of a call that are not looked at for the slowest: pages are entered there
LAST = 64  # tokens at the end of a call whose mean is its time per token
WARM = 12  # tokens of a process's first call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_flags(parser, FIELDS, PRESETS)
    parser.set_defaults(head_dim=[64], repeats=3)
    parser.add_argument("--new-tokens", type=int, default=96, help=f"of a timed call, more than {FIRST + LAST}")
    parser.add_argument("--static", action="store_true", help="time a static cache with transformers' compilation, too")
    parser.add_argument(
        "--index-format", nargs="+", dest="index_formats", default=FORMATS, choices=FORMATS, help="storage of the index"
    )


# ---- Calls. ----


class Arrivals:
    """A stopping criterion that notes when it is asked, once a token, and now and then how much memory is in use.

    transformers waits for the device right behind it. So it waits itself for the first token alone, and the time from
    one token to a later one is right.
    """

    def __init__(self, ids: Tensor, tokens: int) -> None:
        self.times: list[float] = []
        self.most_bytes = self.held_bytes = 0
        self._tokens = tokens
        self._goes_on = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        device = input_ids.device
        if not self.times and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.times.append(time.perf_counter())
        if len(self.times) in (FIRST, self._tokens):  # memory only grows
            self.most_bytes = max(self.most_bytes, _in_use(device))
        if len(self.times) == self._tokens:
            _clean(device)
            self.held_bytes = _in_use(device)
        return self._goes_on


def settings_of(o: Shape, index_format: str, graphs: str) -> UniqueConfig:
    import unique_attn

    return unique_attn.UniqueConfig(
        rule=o.rule,
        page_size=o.page_size,
        budget=o.budget,
        block_size=o.block_size,
        index_format=index_format,
        graphs=graphs,
    )


class Side(NamedTuple):
    """A call of ``generate()``: the settings of an enabled model, None for stock attention, and the kind of cache."""

    config: UniqueConfig | None
    cache: str = "dynamic"


def sides_of(o: Shape, formats: Sequence[str], static: bool) -> dict[str, Side]:
    """Every side that is a call of ``generate()``."""
    sides = {STOCK: Side(None), f"{OFF}_{formats[0]}": Side(settings_of(o, formats[0], "off"))}
    for each in formats:
        sides[f"{UNIQUE}_{each}"] = Side(settings_of(o, each, "auto"))
    if static:  # at the end: what was compiled stays in memory
        sides[STATIC] = Side(None, "static")
        for each in formats:
            sides[f"{COMPILED}_{each}"] = Side(settings_of(o, each, "auto"), "static")
    return sides


def use(model: Any, side: Side) -> dict[str, Any]:
    """Have ``model`` attend as a side does; what ``generate()`` is given for it."""
    import unique_attn

    if side.config is not None:
        unique_attn.enable(model, side.config)
    else:
        unique_attn.disable(model)
        model.set_attn_implementation("sdpa")
    return {} if side.cache == "dynamic" else {"cache_implementation": side.cache}


def generate(model: Any, ids: Tensor, tokens: int, more: Mapping[str, Any]) -> tuple[Tensor, float, Arrivals]:
    """One call: what it returned, when it began, and its tokens' arrivals."""
    from transformers import StoppingCriteriaList

    arrivals = Arrivals(ids, tokens)
    mask = torch.ones_like(ids)
    begin = time.perf_counter()
    out: Tensor = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([arrivals]),
        **more,
    )
    return out, begin, arrivals


def time_calls(model: Any, ids: Tensor, tokens: int, repeats: int, side: Side) -> dict[str, Any]:
    """Medians over ``repeats`` calls of ``tokens`` new tokens, after one that warms up."""
    more = use(model, side)
    device = ids.device
    _clean(device)
    before = _in_use(device)
    cold = generate(model, ids, tokens, more)[2].times
    per_token, first, slowest, most, held = [], [], [], 0, 0
    for _ in range(repeats):
        out, begin, arrivals = generate(model, ids, tokens, more)
        times = arrivals.times
        assert len(times) == tokens, f"{len(times)} tokens came, not {tokens}"
        assert out.shape == (len(ids), ids.shape[1] + tokens), "not all tokens came"
        per_token.append((times[-1] - times[-1 - LAST]) / LAST)
        first.append(times[0] - begin)
        taken = [b - a for a, b in pairwise(times)]
        slowest.append(max(taken[FIRST:]))
        assert 0 <= int(out.min()) <= int(out.max()) < model.config.vocab_size, "no tokens"
        most, held = max(most, arrivals.most_bytes), max(held, arrivals.held_bytes)
    token = statistics.median(per_token)
    return {
        "median_ms": round(1e3 * token, 5),
        "spread_ms": [round(1e3 * each, 5) for each in (min(per_token), max(per_token))],
        "cold_ms": round(1e3 * (cold[-1] - cold[-1 - LAST]) / LAST, 5),
        "first_ms": round(1e3 * statistics.median(first), 3),
        "slowest_ms": round(1e3 * max(slowest), 3),
        "tokens_per_s": round(len(ids) / token, 1),
        "peak_bytes": most - before if device.type == "cuda" else None,
        "held_bytes": held - before if device.type == "cuda" else None,
        "tokens": out[:, ids.shape[1] :],
    }


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _in_use(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# ---- A shape. ----


def needed(o: Shape) -> int:
    """Weights, keys, values and an index, those of a layer twice (it turns to pages), and a prompt's activations."""
    from benchmarks.measure.model_sides import weights_bytes

    size = DTYPES[o.dtype].itemsize
    q_heads, kv_heads = heads(o.heads)
    tokens = o.batch * o.context
    kv = 2 * o.layers * kv_heads * o.head_dim * size * tokens
    activations = (3 * o.mlp + 4 * o.hidden + 4 * q_heads * o.head_dim) * size * tokens
    return int(weights_bytes(o) + kv * 9 // 8 + kv // o.layers + activations + (1 << 28))


def measure_shape(o: Shape, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.measure import model_sides

    device, tokens = ceilings.device, options.new_tokens
    if o.context <= tokens:
        raise ValueError(f"context: expected more than the {tokens} new tokens, got {o.context}")
    model = model_sides.new_model(o, device)
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(1, o.vocab, (o.batch, o.context - tokens), generator=generator, device=device)
    generate(model, ids[:, :WARM], 2, use(model, Side(None)))  # what libraries set up in their first calls
    found: dict[str, dict[str, Any]] = {}
    for name, side in sides_of(o, options.index_formats, options.static).items():
        try:
            found[name] = time_calls(model, ids, tokens, options.repeats, side)
        except Exception as error:  # the others are worth their time
            found[name] = {"failed": reason(error)}
        said = found[name].get("failed") or f"{found[name]['median_ms']:.3f} ms"
        tqdm.write(f"  {name} {said}", file=sys.stderr)
    _check(found, options.index_formats[0])
    use(model, Side(None))
    _clean(device)
    steps = {f"{STEP}_{each}": _floor(o, model, each, device, options) for each in options.index_formats}
    return {"new_tokens": tokens, "sides": {**found, **steps}, **_compared(found, steps)}


def _check(found: dict[str, dict[str, Any]], index_format: str) -> None:
    """Captured steps must give the very tokens of those that are not. Takes the tokens out of the rows."""
    tokens = {name: row.pop("tokens") for name, row in found.items() if "tokens" in row}
    off, auto = (tokens.get(f"{name}_{index_format}") for name in (OFF, UNIQUE))
    if off is not None and auto is not None and not torch.equal(off, auto):
        found[f"{UNIQUE}_{index_format}"] = {"failed": "captured steps give other tokens"}


def _floor(
    o: Shape, model: Any, index_format: str, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """The captured step of ``benchmarks model``."""
    from benchmarks.measure.model_sides import Storage, Unique
    from benchmarks.suite.model import ROOM, graphed, time_step

    storage = step = None
    try:
        storage = Storage(o, device)
        step = graphed(Unique(o, index_format), model, storage, o.context - ROOM)
        timing = time_step(step, max(10 * options.repeats, 20), 1.0)
    except Exception as error:
        return {"failed": reason(error)}
    finally:
        storage = step = None
        _clean(device)
    return timing.to_json()


def _compared(found: Mapping[str, Mapping[str, Any]], steps: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many times faster every side is than stock, and its time by that of the step alone."""
    timed = {name: row for name, row in found.items() if "median_ms" in row}
    ours = [name for name in timed if name not in (STOCK, STATIC)]
    speedups = {
        name: {peer: ratio(timed[peer], timed[name]) for peer in (STOCK, STATIC) if peer in timed} for name in ours
    }
    over = {}
    for name in ours:
        step = steps.get(f"{STEP}_{name.partition('_')[2]}", {})
        if name.startswith(f"{UNIQUE}_") and "median_ms" in step:
            over[name] = round(timed[name]["median_ms"] / step["median_ms"], 4)
    return {"speedups": speedups, "over_step": over}


# ---- The result. ----


def run(options: argparse.Namespace) -> dict[str, Any]:
    from unique_attn.hf import compat  # noqa: F401  says what to do where transformers is missing

    if options.new_tokens <= FIRST + LAST:
        raise SystemExit(f"error: --new-tokens: expected more than {FIRST + LAST}, got {options.new_tokens}")
    result = run_sweep("generate", options, FIELDS, PRESETS, needed, measure_shape)
    result["peers"] = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    return result


def report(result: dict[str, Any]) -> str:
    lines = report_head(result)
    for case in result["cases"]:
        o = case["options"]
        shape = f"{o['layers']} layers, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}, budget {o['budget']}"
        lines.append(f"batch {o['batch']}, {o['context']} tokens, {shape}")
        if "skipped" in case:
            lines += [f"  skipped: {case['skipped']}", ""]
            continue
        rows = [_cells(name, side, case) for name, side in case["sides"].items()]
        lines += [*text_table(rows, left=["side"]), ""]
    return "\n".join(lines)


def _cells(name: str, side: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, str]:
    if "median_ms" not in side:
        return {"side": name, NOTE: side["failed"]}
    over = case["over_step"].get(name)
    return {
        "side": name,
        "ms per token": f"{side['median_ms']:.3f}",
        "slowest": f"{side['slowest_ms']:.2f}" if "slowest_ms" in side else "",
        "first token": f"{side['first_ms']:.1f} ms" if "first_ms" in side else "",
        **{f"x {peer}": f"{factor:.2f}x" for peer, factor in case["speedups"].get(name, {}).items()},
        "of the step": f"{over:.2f}" if over else "",
        "cold": f"{side['cold_ms']:.1f}" if "cold_ms" in side else "",
        **{
            name: gib(side[f"{name}_bytes"]) if side.get(f"{name}_bytes") is not None else ""
            for name in ("peak", "held")
        },
    }
