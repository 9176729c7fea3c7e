"""What sparse prefill drops: next tokens, needles and density of real models, by method and setting.

A model reads each text without a cache, all layers of full attention sparsely, through ``UniqueConfig(prefill=...)``
and the shipped ops; its next-token distributions after the last tokens are compared with those of stock attention.
Needles are a six-digit code somewhere in a text and a question about it at the end. On CUDA the attention of those
layers is also timed, on the model's own queries, keys and values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import unique_attn
from benchmarks.measure import next_tokens, prefill_peers
from benchmarks.measure import texts as texts_of
from benchmarks.measure.gemma import GEMMA
from benchmarks.measure.harness import measure, reason
from benchmarks.measure.real_models import add_model_flags, load, name_of, settle
from benchmarks.measure.text_table import text_table
from examples.support.models import SMOLLM2
from examples.support.results import DTYPES, environment
from unique_attn import ops

Setting = dict[str, Any]  # method, and threshold or top_p
LENGTHS = {SMOLLM2: [2048, 4096, 8192], GEMMA: [2048, 4096, 8192, 16384, 32768]}
THRESHOLDS = [0.1, 0.05, 0.03, 0.017, 0.01, 0.005, 0.0]  # 0 keeps everything: what rounding alone does
TOP_P = [0.8, 0.9, 0.95, 0.98]
NATIVE = {"directional": "threshold", "unisparse": "top_p"}  # how each method selects where nothing is said
DENSE = "sdpa"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, LENGTHS, "the prompts")
    parser.add_argument(
        "--text", nargs="+", default=list(texts_of.TEXTS), help=f"files, or of {', '.join(texts_of.TEXTS)}"
    )
    parser.add_argument("--method", nargs="+", default=list(NATIVE), choices=list(NATIVE))
    parser.add_argument("--threshold", type=float, nargs="*", default=THRESHOLDS)
    parser.add_argument("--top-p", type=float, nargs="*", default=TOP_P)
    parser.add_argument("--both", action="store_true", help="thresholds and top-p with every method")
    parser.add_argument("--tail", type=int, default=1024, help="last tokens whose next tokens are compared")
    parser.add_argument("--trials", type=int, default=12, help="needles at each length, at several depths")
    parser.set_defaults(repeats=5)


def settings(options: argparse.Namespace) -> list[Setting]:
    """Every method with its own ladder, or with both, from the densest on."""
    ladders = {"threshold": sorted(options.threshold), "top_p": sorted(options.top_p, reverse=True)}
    return [
        {"method": method, name: value}
        for method in options.method
        for name, values in ladders.items()
        if options.both or NATIVE[method] == name
        for value in values
    ]


def label(setting: Mapping[str, Any]) -> str:
    name = "threshold" if "threshold" in setting else "top_p"
    return f"{setting['method']}, {name.replace('_', '-')} {setting[name]:g}"


# ---- A model's attention. ----


@contextmanager
def prefilling(model: Any, setting: Setting | None) -> Iterator[list[Any]]:
    """Have ``model`` read prompts with this setting, None for stock attention; yields the records of prefill."""
    if setting is None:
        unique_attn.disable(model)
        model.set_attn_implementation("sdpa")
        yield []
        return
    chosen = {name: value for name, value in setting.items() if name != "method"}
    unique_attn.enable(model, unique_attn.UniqueConfig(prefill=setting["method"], prefill_above=0, **chosen))
    with unique_attn.record_prefill(model) as records:
        yield records
    unique_attn.disable(model)


def kept(records: Sequence[Any]) -> dict[str, Any]:
    """Density and kept share of the estimated attention, mean over layers and heads, and the density by layer.

    Raises:
        ValueError: no layer was sparse.
    """
    if not records:
        raise ValueError("no layer was sparse")
    layers = {each.layer_idx: round(float(each.density.mean()), 4) for each in records}
    mass = [float(each.mass.mean()) for each in records]
    return {
        "density": round(sum(layers.values()) / len(layers), 4),
        "mass": round(sum(mass) / len(mass), 4),
        "layers": layers,
    }


# ---- One text at one length. ----


def measure_text(model: Any, ids: Tensor, ladder: Sequence[Setting], tail: int) -> dict[str, Any]:
    """Distances from dense attention of every setting."""
    targets = ids[0, -tail:][1:]
    with prefilling(model, None):
        dense = next_tokens.tail_logits(model, ids, tail)
    found = []
    for setting in ladder:
        with prefilling(model, setting) as records:
            logits = next_tokens.tail_logits(model, ids, tail)
        row = {name: round(value, 6) for name, value in asdict(next_tokens.distance(dense, logits, targets)).items()}
        found.append({**setting, **kept(records), **row})
    return {"nll": round(next_tokens.distance(dense, dense, targets).nll, 6), "settings": found}


def time_attention(
    model: Any, ids: Tensor, ladder: Sequence[Setting], rounds: int
) -> tuple[dict[str, Any], list[float | None]]:
    """Milliseconds of the attention of all layers of full attention: of dense ways by name, and of every setting."""
    layers = next_tokens.full_layers(model, ids)
    device = ids.device
    tokens = ids.shape[1]
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    rows = {id(each): [x.transpose(0, 1)[None].contiguous() for x in (each.q, each.k, each.v)] for each in layers}

    def peer(layer: next_tokens.Layer, name: str) -> Tensor:
        q, k, v = rows[id(layer)]
        return prefill_peers.sdpa(q, k, v, prefill_peers.BACKENDS[name], scale=layer.scale)

    def ours(layer: next_tokens.Layer) -> Any:
        return ops.soft_mask_attention(layer.q, layer.k, layer.v, bounds, tokens, scale=layer.scale)

    def sparse(layer: next_tokens.Layer, setting: Setting) -> Any:
        return ops.unique_prefill(
            layer.q, layer.k, layer.v, bounds, bounds, tokens, tokens, scale=layer.scale, **setting
        )

    runs: dict[str, Any] = {"dense": next_tokens.over_layers(layers, ours)}
    for name in prefill_peers.BACKENDS:
        runs[f"sdpa_{name}"] = next_tokens.over_layers(layers, partial(peer, name=name))
    for setting in ladder:
        runs[label(setting)] = next_tokens.over_layers(layers, partial(sparse, setting=setting))
    working, failed = {}, {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # a backend may not know the head size
            failed[name] = {"failed": reason(error)}
        else:
            working[name] = run
    timings = measure(working, device, rounds=rounds)
    found: dict[str, Any] = {**{name: timing.to_json() for name, timing in timings.items()}, **failed}
    dense = {name: found[name] for name in runs if name == "dense" or name.startswith("sdpa_")}
    return dense, [found[label(setting)].get("median_ms") for setting in ladder]


# ---- Needles. ----


def measure_needles(
    model: Any, needles: Sequence[next_tokens.Needle], ladder: Sequence[Setting]
) -> dict[str, dict[str, Any]]:
    """Nats per token of the answers and how many are right, by setting; "dense" is stock attention."""
    found = {}
    for setting in (None, *ladder):
        nats, right, densities = [], 0, []
        for each in needles:
            with prefilling(model, setting) as records:
                nll, good = next_tokens.find(model, each)
            nats.append(nll)
            right += good
            if setting is not None:
                densities.append(kept(records)["density"])
        row: dict[str, Any] = {"nats": round(sum(nats) / len(nats), 4), "right": right, "trials": len(nats)}
        if setting is not None:
            row |= {**setting, "density": round(sum(densities) / len(densities), 4)}
        found["dense" if setting is None else label(setting)] = row
    return found


# ---- The run. ----


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    settle(options, LENGTHS)
    if min(options.length) <= options.tail:
        raise SystemExit(
            f"error: --length: expected more than the {options.tail} tokens of --tail, got {min(options.length)}"
        )
    if options.trials < 0:
        raise SystemExit(f"error: --trials: expected at least 0, got {options.trials}")
    ladder = settings(options)
    if not ladder:
        raise SystemExit("error: --threshold, --top-p: expected a value for one of the methods, got none")
    texts = texts_of.read(options.text)
    model, tokenizer = load(options.model, device, DTYPES[options.dtype])
    tokens = {name: tokenizer(text).input_ids for name, text in texts.items()}
    wanted = [(n, name) for n in sorted(set(options.length)) for name in texts if len(tokens[name]) >= n]
    cases, needles = [], []
    for n, name in tqdm(wanted, desc="prefill_quality", unit="text"):
        ids = torch.tensor([tokens[name][:n]], device=device)
        case = {"length": n, "text": name, **measure_text(model, ids, ladder, options.tail)}
        if device.type == "cuda":
            try:
                case["attention"], taken = time_attention(model, ids, ladder, options.repeats)
                for row, ms in zip(case["settings"], taken):
                    row["attention_ms"] = ms
            except Exception as error:  # the quality is worth its time
                case["attention"] = {"failed": reason(error)}
            torch.cuda.empty_cache()
        cases.append(case)
        worst = max(case["settings"], key=lambda row: row["kl"])
        tqdm.write(f"  {name}, {n} tokens: KL up to {worst['kl']:.4f} at {worst['density']:.3f}", file=sys.stderr)
    for n in tqdm(sorted(set(options.length)), desc="needles", unit="length"):
        made = next_tokens.make_needles(tokenizer, tokens, n, options.trials)
        if made:
            needles.append({"length": n, "results": measure_needles(model, made, ladder)})
    return {
        "bench": "prefill_quality",
        "model": name_of(options),
        "options": {"dtype": options.dtype, "tail": options.tail, "trials": options.trials, "repeats": options.repeats},
        "layers": sorted(int(layer) for layer in cases[0]["settings"][0]["layers"]) if cases else [],
        "environment": environment(device),
        "texts": {name: {**texts_of.facts(text), "tokens": len(tokens[name])} for name, text in texts.items()},
        "cases": cases,
        "needles": needles,
    }


# ---- The report. ----


def report(result: dict[str, Any]) -> str:
    o = result["options"]
    lines = [
        f"{result['model']}, {o['dtype']}, {result['environment']['device']}; {len(result['layers'])} layers sparse; "
        f"KL from dense attention and agreement over the last {o['tail']} tokens",
        "",
    ]
    for case in result["cases"]:
        dense = case.get("attention", {})
        times = [side["median_ms"] for side in dense.values() if isinstance(side, dict) and "median_ms" in side]
        rows = [
            {
                f"{case['text']}, {case['length']} tokens": label(row),
                "density": f"{row['density']:.3f}",
                "KL": f"{row['kl']:.4f}",
                "top-1": f"{100 * row['top1']:.1f} %",
                "nll": f"{row['nll'] - case['nll']:+.4f}",
                "x dense": f"{min(times) / row['attention_ms']:.2f}x" if times and row.get("attention_ms") else "",
            }
            for row in case["settings"]
        ]
        lines += [*text_table(rows, left=[f"{case['text']}, {case['length']} tokens"]), ""]
    for each in result["needles"]:
        title = f"needles, {each['length']} tokens"
        rows = [
            {
                title: name,
                "density": f"{row['density']:.3f}" if "density" in row else "",
                "nats a token": f"{row['nats']:.3f}",
                "right": f"{row['right']} / {row['trials']}",
            }
            for name, row in each["results"].items()
        ]
        lines += [*text_table(rows, left=[title]), ""]
    return "\n".join(lines)
