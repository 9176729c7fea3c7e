"""Which blocks a sparse prefill should keep: estimates of shares and their aggregates, judged on real models.

A model reads each text once for every way and setting, all layers of full attention on the blocks that the way selects,
through ``block_sparse_attention``; the next tokens of the last tokens are compared with those of dense attention. Ways
are compared at equal densities: without ``--thresholds``, those with which each way keeps so many blocks of the texts
are found first, on the queries and keys of dense attention. Needles as in ``prefill_quality``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import texts as texts_of
from benchmarks.measure.block_choice import (
    PAPER,
    SHIPPED,
    Survey,
    Way,
    kept_mass,
    read,
    setting_for,
    sparse,
    survey,
    ways_of,
)
from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.block_shares import ESTIMATES, words
from benchmarks.measure.equal_density import At, Rung, at_density, standard_error
from benchmarks.measure.failures import token_kl
from benchmarks.measure.gemma import GEMMA
from benchmarks.measure.next_tokens import Needle, find, make_needles
from benchmarks.measure.real_models import add_model_flags, load, name_of, settle
from benchmarks.measure.text_table import text_table
from examples.support.models import SMOLLM2
from examples.support.results import DTYPES, environment

LENGTHS = {SMOLLM2: [8192], GEMMA: [16384]}
DENSITIES = [0.2, 0.3, 0.4]
EVERY = ["directional", replace(SHIPPED, selection="top_p").label, PAPER.label]  # the ways, in the order of the runs
EVERY += [name for name in ESTIMATES if name not in EVERY]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, LENGTHS, "the texts")
    parser.add_argument("--text", nargs="+", default=list(texts_of.TEXTS), help="files, or names of texts")
    parser.add_argument(
        "--estimators",
        nargs="+",
        default=EVERY,
        help="NAME for all of its aggregates, or NAME:AGGREGATE, or NAME:AGGREGATE:top_p",
    )
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES, help="at which ways are compared")
    parser.add_argument("--aim", type=float, nargs="+", help="densities that are tried; --density if nothing is said")
    parser.add_argument("--thresholds", type=float, nargs="+", help="the same for all ways, in place of --aim")
    parser.add_argument("--tail", type=int, default=256, help="last tokens whose next tokens are compared")
    parser.add_argument("--trials", type=int, default=12, help="needles at each length, at several depths")
    parser.add_argument("--minutes", type=float, help="begin no other way after so long, at each length")


# ---- One length. ----


def settings_of(way: Way, surveys: Sequence[Survey], blocks: Blocks, options: argparse.Namespace) -> list[float]:
    """Thresholds, or values of top-p, of one way."""
    if options.thresholds and way.selection == "threshold":
        return sorted(set(options.thresholds), reverse=True)
    found = [setting_for(way, surveys, blocks, density) for density in sorted(set(options.aim or options.density))]
    return list(dict.fromkeys(value for value in found if value is not None))


def measure_setting(
    model: Any, ids: Sequence[Tensor], surveys: Sequence[Survey], way: Way, value: float
) -> tuple[dict[str, Any], Rung]:
    """A row of the JSON, and the tokens by themselves."""
    kl, same, densities = [], [], []
    for each, dense in zip(ids, surveys):
        logits, density = read(model, each, len(dense.logits), way, value)
        kl.append(token_kl(dense.logits[None], logits[None])[0].cpu())
        same.append((dense.logits.argmax(-1) == logits.argmax(-1)).float().cpu())
        densities.append(density)
    rung = Rung(sum(densities) / len(densities), torch.cat(kl), torch.cat(same))
    row = {
        way.selection: round(value, 7),
        "density": round(rung.density, 4),
        "kl": round(float(rung.kl.mean()), 6),
        "kl_se": round(standard_error(rung.kl), 6),
        "top1": round(float(rung.same.mean()), 5),
        "mass": round(kept_mass(way, surveys, Blocks(ids[0].shape[1]), value), 5),
        "density_texts": [round(x, 4) for x in densities],
        "kl_texts": [round(float(x.mean()), 6) for x in kl],
    }
    return row, rung


def measure_needles(model: Any, needles: Sequence[Needle], way: Way, value: float) -> dict[str, Any]:
    """Nats per token of the answers, and how many are right."""
    nats, right, densities = [], 0, []
    for each in needles:
        with sparse(model, way, value) as found:
            nll, good = find(model, each)
        nats.append(nll)
        right += good
        densities += found
    return {
        "nats": round(sum(nats) / len(nats), 4),
        "right": right,
        "trials": len(nats),
        "density": round(sum(densities) / len(densities), 4),
    }


def compared(
    rungs: Mapping[Way, Sequence[Rung]], densities: Sequence[float]
) -> dict[Way, list[dict[str, float | int]]]:
    """What each way has at the densities that it reaches, and by how much its KL exceeds that of the shipped way."""
    found: dict[Way, list[dict[str, float | int]]] = {way: [] for way in rungs}
    for density in sorted(set(densities)):
        at: dict[Way, At] = {}
        for way, each in rungs.items():
            interpolated = at_density(each, density)
            if interpolated is not None:
                at[way] = interpolated
        for way, x in at.items():
            row = {"density": density, "kl": x.kl, "kl_se": standard_error(x.pull), "top1": x.top1}
            if SHIPPED in at:
                base = at[SHIPPED]
                row |= {"kl_more": x.kl - base.kl, "kl_more_se": standard_error(x.pull - base.pull)}
            found[way].append({name: round(value, 6) for name, value in row.items()})
    return found


def measure_length(
    model: Any,
    tokenizer: Any,
    tokens: Mapping[str, Sequence[int]],
    length: int,
    ways: Sequence[Way],
    options: argparse.Namespace,
) -> dict[str, Any]:
    clock = time.perf_counter()
    names = [name for name in tokens if len(tokens[name]) >= length]
    ids = [torch.tensor([list(tokens[name][:length])], device=model.device) for name in names]
    surveys = [survey(model, each, options.tail, ways) for each in tqdm(ids, desc=f"{length} tokens, dense")]
    blocks = Blocks(length)
    ladder = {way: settings_of(way, surveys, blocks, options) for way in ways}
    needles = make_needles(tokenizer, tokens, length, options.trials) if options.trials else []
    rows, rungs = [], {}
    for way in tqdm(ways, desc=f"{length} tokens", unit="way"):
        if options.minutes and time.perf_counter() - clock > 60 * options.minutes:
            tqdm.write(f"  {way.label} and the ways after it: left out", file=sys.stderr)
            break
        found = [measure_setting(model, ids, surveys, way, value) for value in ladder[way]]
        for (row, _), value in zip(found, ladder[way]):
            if needles:
                row["needles"] = measure_needles(model, needles, way, value)
        rungs[way] = [rung for _, rung in found]
        rows.append(
            {
                "estimate": way.estimate,
                "aggregate": way.aggregate,
                "selection": way.selection,
                "settings": [row for row, _ in found],
            }
        )
        said = ", ".join(f"{row['kl']:.4f} @ {row['density']:.3f}" for row, _ in found)
        tqdm.write(f"  {way.label}: {said} ({time.perf_counter() - clock:.0f} s)", file=sys.stderr)
    for row, at in zip(rows, compared(rungs, options.density).values()):
        row["at"] = at
    case: dict[str, Any] = {"length": length, "texts": names, "ways": rows}
    if needles:
        dense = [find(model, each) for each in needles]
        case["needles"] = {
            "nats": round(sum(nll for nll, _ in dense) / len(dense), 4),
            "right": sum(good for _, good in dense),
            "trials": len(dense),
        }
    return {**case, "seconds": round(time.perf_counter() - clock, 1)}


# ---- The run. ----


def check(options: argparse.Namespace) -> list[Way]:
    try:
        ways = ways_of(options.estimators)
    except ValueError as error:
        raise SystemExit(f"error: --estimators: {error}") from None
    for name, least in (("tail", 2), ("trials", 0)):
        if getattr(options, name) < least:
            raise SystemExit(f"error: --{name}: expected at least {least}, got {getattr(options, name)}")
    if min(options.length) <= options.tail:
        raise SystemExit(
            f"error: --length: expected more than the {options.tail} tokens of --tail, got {min(options.length)}"
        )
    for name in ("density", "aim", "thresholds"):
        wrong = [x for x in getattr(options, name) or [] if not 0 <= x <= 1]
        if wrong:
            raise SystemExit(f"error: --{name}: expected 0 to 1, got {wrong[0]:g}")
    return ways


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    settle(options, LENGTHS)
    ways = check(options)
    texts = texts_of.read(options.text)
    model, tokenizer = load(options.model, device, DTYPES[options.dtype])
    tokens = {name: tokenizer(text).input_ids for name, text in texts.items()}
    longest = max(map(len, tokens.values()))
    lengths = sorted({n for n in options.length if n <= longest})
    if not lengths:
        raise SystemExit(f"error: --text: expected one as long as --length, got {longest} tokens at most")
    cases = []
    for length in lengths:
        cases.append(measure_length(model, tokenizer, tokens, length, ways, options))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "bench": "prefill_ablation",
        "model": name_of(options),
        "options": {
            "dtype": options.dtype,
            "tail": options.tail,
            "densities": sorted(set(options.density)),
            "block_q": Blocks.block_q,
            "block_k": Blocks.block_k,
        },
        "environment": environment(device),
        "texts": {name: {**texts_of.facts(text), "tokens": len(tokens[name])} for name, text in texts.items()},
        "cases": cases,
    }


# ---- The report. ----


def report(result: dict[str, Any]) -> str:
    o = result["options"]
    lines = [f"{result['model']}, {o['dtype']}, {result['environment']['device']}; the last {o['tail']} tokens"]
    for case in result["cases"]:
        title = f"{case['length']} tokens, {', '.join(case['texts'])}"
        rows = []
        for way in case["ways"]:
            row = {title: words(way)}
            for at in way["at"]:
                row[f"KL @ {at['density']:g}"] = f"{at['kl']:.4f}"
                row[f"more @ {at['density']:g}"] = (
                    f"{at['kl_more']:+.4f} ± {at['kl_more_se']:.4f}" if at.get("kl_more") else ""
                )
                row[f"top-1 @ {at['density']:g}"] = f"{100 * at['top1']:.1f} %"
            rows.append(row)
        lines += ["", *text_table(rows, left=[title])]
    return "\n".join(lines)
