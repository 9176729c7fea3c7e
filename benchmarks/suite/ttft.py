"""Time to first token of a whole Hugging Face model: stock attention, dense prefill and sparse prefill.

One prompt of random tokens, transformers' Llama with random weights, made on the device. A side reads the prompt in one
call with a new cache and takes the likeliest token (``ttft``), then decodes one more (``next``: the step in which pages
and their index are made).

Random weights attend evenly, so no threshold of a real model means anything here. The density of sparse prefill is
fixed instead: by top-p selection, whose share is adjusted until the measured density, mean over layers and heads, is
near the wanted one. Both are in the result.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.measure.ceiling import Ceilings
from benchmarks.measure.harness import Timing, ratio, reason
from benchmarks.measure.machine import gib
from benchmarks.measure.sweep import Grid, Shape, add_shape_flags, heads, report_head, run_sweep
from benchmarks.measure.text_table import NOTE, text_table
from benchmarks.suite.model import TOLERANCE
from examples.support.results import DTYPES

if TYPE_CHECKING:
    from unique_attn import UniqueConfig

FIELDS = ("context", "layers", "heads", "head_dim", "hidden", "mlp", "vocab", "dtype")
LENGTHS = [32768, 65536, 131072]
MODELS: dict[str, Grid] = {  # of the sizes of Llama 3.2 1B and Llama 3.1 8B
    "16 layers": {"layers": [16], "head_dim": [64], "hidden": [2048], "mlp": [8192]},
    "32 layers": {"layers": [32], "head_dim": [128], "hidden": [4096], "mlp": [14336]},
}
PRESETS: dict[str, Sequence[Grid]] = {
    name.replace(" ", "_"): [{**grid, "context": LENGTHS}] for name, grid in MODELS.items()
}
PRESETS["table"] = [grid for grids in list(PRESETS.values()) for grid in grids]
COMMITTED = {"cuda": [["--preset", "table"]]}
STOCK, DENSE = "sdpa", "dense"
CLOSE = 0.05  # of the wanted density
PASSES = 4  # at most, to adjust top-p; the last ones warm up, too
CHECKED = 1024  # tokens whose logits are compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_flags(parser, FIELDS, PRESETS)
    parser.set_defaults(head_dim=[64], repeats=3)
    parser.add_argument("--density", type=float, nargs="+", default=[25, 12.5], help="percent of the visible blocks")
    parser.add_argument("--method", default="directional", choices=["directional", "unisparse"])


# ---- Sides. ----


@dataclass
class PromptSide:
    """How prompts attend: the settings, None for stock attention."""

    config: UniqueConfig | None

    def use(self, model: Any) -> None:
        import unique_attn

        if self.config is None:
            unique_attn.disable(model)
            model.set_attn_implementation("sdpa")
        else:
            unique_attn.enable(model, self.config)


def sparse_config(method: str, top_p: float) -> UniqueConfig:
    import unique_attn

    return unique_attn.UniqueConfig(prefill=method, top_p=top_p, prefill_above=0)


def sides_of(method: str, settings: Mapping[float, float]) -> dict[str, PromptSide]:
    """Stock attention, our dense prefill, and sparse prefill by density with these top-p."""
    import unique_attn

    sparse = {sparse_name(density): PromptSide(sparse_config(method, p)) for density, p in settings.items()}
    return {STOCK: PromptSide(None), DENSE: PromptSide(unique_attn.UniqueConfig()), **sparse}


def sparse_name(density: float) -> str:
    return f"sparse_{density:g}"


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.inference_mode()
def first_token(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Reads ``ids`` ``[1, n]`` into ``cache``; the next token ``[1, 1]``."""
    from unique_attn.hf.compat import cache_argument

    given = {cache_argument(model) or "past_key_values": cache}
    logits: Tensor = model(ids, use_cache=True, logits_to_keep=1, **given).logits
    return logits[:, -1:].argmax(-1)


def density_of(model: Any, side: PromptSide, ids: Tensor) -> float:
    """Share of the visible blocks that were kept in a prefill of ``ids``, mean over layers and heads."""
    import unique_attn

    side.use(model)
    with unique_attn.record_prefill(model) as records:
        first_token(model, ids, new_cache(model))
    if not records:
        raise ValueError("no layer was sparse")
    return float(torch.stack([each.density.mean() for each in records]).mean())


def find_top_p(wanted: float, density: Callable[[float], float]) -> tuple[float, float]:
    """Top-p whose ``density`` is ``CLOSE`` to the wanted one, or what came closest in ``PASSES``, and its density.

    Even attention makes both nearly equal, so that a step in proportion is a good one.
    """
    tried: dict[float, float] = {}
    p = wanted
    for _ in range(PASSES):
        tried[p] = density(p)
        if abs(tried[p] - wanted) <= CLOSE * wanted:
            break
        p = min(1.0, max(1e-6, p * wanted / max(tried[p], 1e-6)))
        if p in tried:
            break
    best = min(tried, key=lambda each: abs(tried[each] - wanted))
    return best, tried[best]


# ---- A shape. ----


def needed(o: Shape) -> int:
    """Weights, keys and values, and the activations of one layer."""
    from benchmarks.measure.model_sides import weights_bytes

    size = DTYPES[o.dtype].itemsize
    q_heads, kv_heads = heads(o.heads)
    kv = 2 * o.layers * kv_heads * o.head_dim * size * o.context
    activations = (3 * o.mlp + 4 * o.hidden + 4 * q_heads * o.head_dim) * size * o.context
    return int(weights_bytes(o) + kv + activations + (1 << 28))


@torch.inference_mode()
def logits_error(model: Any, side: PromptSide, ids: Tensor) -> float:
    """Norm of the difference of the logits to stock attention's, by the norm of those.

    Raises:
        AssertionError: it is larger than for the decode steps of ``benchmarks model``, or not a number.
    """
    found = []
    for each in (PromptSide(None), side):
        each.use(model)
        found.append(model(ids, use_cache=False).logits.float())
    error = float((found[1] - found[0]).norm() / found[0].norm())
    limit = TOLERANCE[next(name for name, dtype in DTYPES.items() if dtype == model.dtype)]
    assert error <= limit, f"logits differ by {error:.2e} of stock attention's, more than {limit}"
    return error


def measure_shape(o: Shape, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.measure import model_sides

    device = ceilings.device
    model = model_sides.new_model(argparse.Namespace(**vars(o)), device)
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(o.vocab, (1, o.context), generator=generator, device=device)
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    # Sparse prefill that keeps everything is dense attention by the sparse path.
    whole = {DENSE: sides_of(options.method, {})[DENSE], "sparse": PromptSide(sparse_config(options.method, 1.0))}
    for name, side in whole.items():
        try:
            errors[name] = logits_error(model, side, ids[:, : min(CHECKED, o.context)])
        except Exception as error:  # the others are worth their time
            failed[name] = reason(error)
    settings: dict[float, float] = {}
    densities: dict[str, float] = {}
    for density in options.density:
        name = sparse_name(density)
        if "sparse" in failed:
            failed[name] = failed["sparse"]
            continue
        try:
            settings[density], densities[name] = find_top_p(
                density / 100, lambda p: density_of(model, PromptSide(sparse_config(options.method, p)), ids)
            )
        except Exception as error:
            failed[name] = reason(error)
    sides = {name: side for name, side in sides_of(options.method, settings).items() if name not in failed}
    timed, wrong = time_sides(model, sides, ids, options.repeats)
    failed = {name: why for name, why in {**failed, **wrong}.items() if name != "sparse"}
    for name, row in timed.items():
        if name in densities:
            density = next(each for each in settings if sparse_name(each) == name)
            row |= {"density": round(densities[name], 5), "top_p": settings[density]}
        if name != STOCK:
            row["logits_error"] = errors[DENSE if name == DENSE else "sparse"]
    order = [STOCK, DENSE, *map(sparse_name, options.density)]
    return {
        "method": options.method,
        "weights_bytes": sum(p.numel() * p.itemsize for p in model.parameters()),
        "sides": {name: timed[name] if name in timed else {"failed": failed[name]} for name in order},
        "speedups": {
            name: {peer: ratio(timed[peer], timed[name]) for peer in (STOCK, DENSE) if peer in timed}
            for name in timed
            if name in densities
        },
    }


def time_sides(
    model: Any, sides: Mapping[str, PromptSide], ids: Tensor, rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Time every side in turn, once to warm up and then ``rounds`` times; what it found, and why some have failed."""
    device = ids.device
    first: dict[str, list[float]] = {name: [] for name in sides}
    second: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for i in range(1 + rounds):
        for name, side in sides.items():
            if name in failed:
                continue
            side.use(model)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            try:
                taken = _time_prompt(model, ids)
            except Exception as error:  # a long prompt may not fit beside what is there
                failed[name] = reason(error)
                continue
            peaks[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            if i:
                first[name].append(taken[0])
                second[name].append(taken[1])
    found = {
        name: {
            **Timing.of(first[name]).to_json(),
            "next_ms": round(1e3 * Timing.of(second[name]).median, 5),
            "peak_bytes": peaks[name],
        }
        for name in sides
        if name not in failed
    }
    return found, failed


def _time_prompt(model: Any, ids: Tensor) -> tuple[float, float]:
    """Seconds to the first token, and from there to the second; both on the host."""
    cache = new_cache(model)
    times = [_now(ids.device)]
    token = first_token(model, ids, cache)
    times.append(_now(ids.device))
    second = first_token(model, token, cache)
    times.append(_now(ids.device))
    vocabulary = model.config.vocab_size
    assert 0 <= int(token) < vocabulary, "no token"
    assert 0 <= int(second) < vocabulary, "no token"
    return times[1] - times[0], times[2] - times[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- The result. ----


def run(options: argparse.Namespace) -> dict[str, Any]:
    from unique_attn.hf import compat  # noqa: F401  says what to do where transformers is missing

    for density in options.density:
        if not 0 < density <= 100:
            raise SystemExit(f"error: --density: expected more than 0 and at most 100 percent, got {density:g}")
    result = run_sweep("ttft", options, FIELDS, PRESETS, needed, measure_shape)
    result["peers"] = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    return result


def report(result: dict[str, Any]) -> str:
    lines = report_head(result)
    for case in result["cases"]:
        o = case["options"]
        lines.append(
            f"{o['context']} tokens, {o['layers']} layers, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}"
        )
        if "skipped" in case:
            lines += [f"  skipped: {case['skipped']}", ""]
            continue
        rows = [_cells(name, side, case["speedups"].get(name, {})) for name, side in case["sides"].items()]
        lines += [*text_table(rows, left=["side"]), ""]
    return "\n".join(lines)


def _cells(name: str, side: Mapping[str, Any], speedups: Mapping[str, float]) -> dict[str, str]:
    if "median_ms" not in side:
        return {"side": name, NOTE: side["failed"]}
    return {
        "side": name,
        "first token": f"{side['median_ms']:.1f} ms",
        "p10 .. p90": f"{side['p10_ms']:.1f} .. {side['p90_ms']:.1f}",
        "next": f"{side['next_ms']:.1f} ms",
        "density": f"{100 * side['density']:.1f} %" if "density" in side else "",
        **{f"x {peer}": f"{factor:.2f}x" for peer, factor in speedups.items()},
        "peak": gib(side["peak_bytes"]) if side["peak_bytes"] is not None else "",
    }
