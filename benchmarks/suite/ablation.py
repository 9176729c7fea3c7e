"""Which pages to read: rules and other scores, page sizes and index formats, judged on real models' next tokens.

Texts are read densely up to a tail, whose tokens are then decoded on pages that each score chooses, through
``sparse_decode``: attention kept, KL and agreement of next tokens with dense attention, and six-digit codes that are
hidden in texts and asked for. Then where it fails: which heads and tokens lose most and what helps there, and what the
terms of the scores say about pages in every head. ``--per-layer`` measures another thing: whether a budget for each
layer, chosen on one text, saves bytes on the others.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import texts as texts_of
from benchmarks.measure.failures import failures, token_kl
from benchmarks.measure.gemma import GEMMA
from benchmarks.measure.layer_budgets import PROBE, forwards, layer_budgets
from benchmarks.measure.next_tokens import Needle, distance, make_needles
from benchmarks.measure.page_choice import BLOCK, SCORES, Setting, label
from benchmarks.measure.real_models import add_model_flags, load, name_of, settle
from benchmarks.measure.spread_terms import spread_terms
from benchmarks.measure.tail_decode import TailBatch
from benchmarks.measure.text_table import text_table
from examples.support.models import SMOLLM2
from examples.support.results import DTYPES, environment
from unique_attn import ops
from unique_attn.rules import PAGE_SIZES as PAGES_TAKEN

LENGTHS = {SMOLLM2: [4096, 8192], GEMMA: [4096, 16384]}
BUDGETS = [128, 256, 512, 1024, 2048]
PAGE_SIZES = [4, 8, 16, 32]
BASE = Setting("directional", 2.0)
OTHER_SIZES = [BASE, Setting("unique", 0.5), Setting("oracle")]  # at page sizes that are not the base's
COMPRESSED = [  # with compressed entries, at the base's page size; the base at all page sizes
    Setting("mean"), Setting("unique", 0.5), BASE, Setting("second order"), Setting("directional, normalized"),
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, LENGTHS, "the texts")
    parser.add_argument("--text", nargs="+", default=list(texts_of.TEXTS), help="files, or names of texts")
    parser.add_argument("--budget", type=int, nargs="+", default=BUDGETS, help="tokens that a query reads")
    parser.add_argument("--page-size", type=int, nargs="+", default=PAGE_SIZES, help="8 and others")
    parser.add_argument("--tail", type=int, default=64, help="last tokens of each text that are decoded")
    parser.add_argument("--trials", type=int, default=12, help="needles at each length, at several depths")
    parser.add_argument("--failure-budget", type=int, default=256, help="tokens at which failures are looked for")
    parser.add_argument("--per-layer", action="store_true", help="measure budgets for each layer, and nothing else")


def settings(budgets: Sequence[int], page_sizes: Sequence[int]) -> list[Setting]:
    """Every score and weight at the base's page size; some at other page sizes; some with compressed entries."""
    every = [replace(BASE, score=name, weight=weight) for name, score in SCORES.items() for weight in score.weights]
    for size in page_sizes:
        at_size = [replace(each, page_size=size) for each in OTHER_SIZES]
        every += at_size if size != BASE.page_size else []
        tried = COMPRESSED if size == BASE.page_size else [BASE]
        every += [replace(each, page_size=size, index_format="compressed") for each in tried]
    sized = [replace(each, budget=budget) for each in every for budget in sorted(set(budgets))]
    return list(dict.fromkeys(each for each in sized if each.budget // each.page_size >= 2))


def entry_bits(setting: Setting, head_dim: int, dtype: torch.dtype) -> float:
    """Bits of the index per key channel and token; 0 for a score without an index."""
    rule = SCORES[setting.score].index_rule
    if rule is None:
        return 0.0
    size = ops.index_entry_bytes(rule, head_dim, dtype, setting.index_format)
    return round(8 * size / head_dim / setting.page_size, 3)


# ---- One length. ----


def measure_texts(batch: TailBatch, ladder: Iterable[Setting]) -> list[dict[str, Any]]:
    """Distances from dense attention of every setting, and the attention that it keeps."""
    targets = [ids[1 - batch.tail :] for ids in batch.ids]
    base: dict[int, Tensor] = {}
    rows = []
    for setting in ladder:
        found = batch.decode(setting, mass=True)
        each = [distance(*group) for group in zip(batch.dense, found.logits, targets)]
        kl = token_kl(batch.dense, found.logits)
        mass = torch.stack([kept.float().mean((1, 2)) for kept in found.mass.values()]).mean(0)
        if replace(setting, budget=BASE.budget) == BASE:
            base[setting.budget] = kl
        rows.append(
            {
                **described(setting),
                "mass": round(float(mass.mean()), 5),
                "mass_texts": [round(x, 5) for x in mass.tolist()],
                "kl": round(float(kl.mean()), 6),
                "kl_se": round(standard_error(kl), 6),
                "kl_texts": [round(x, 6) for x in kl.mean(1).tolist()],
                "top1": round(sum(one.top1 for one in each) / len(each), 5),
                "nll": round(sum(one.nll for one in each) / len(each), 6),
                "_kl": kl,
            }
        )
    for row in rows:
        difference = row.pop("_kl") - base[row["budget"]]
        row["kl_more"], row["kl_more_se"] = round(float(difference.mean()), 6), round(standard_error(difference), 6)
    return rows


def standard_error(values: Tensor) -> float:
    """Of the mean, as if tokens were independent."""
    return float(values.double().std() / math.sqrt(values.numel()))


def described(setting: Setting) -> dict[str, Any]:
    return {
        "score": setting.score,
        "weight": setting.weight,
        "page_size": setting.page_size,
        "index_format": setting.index_format,
        "budget": setting.budget,
    }


def of_needles(logits: Tensor, needles: Sequence[Needle]) -> dict[str, Any]:
    """Nats per token of the answers and how many are right, by logits ``[needles, keep, vocabulary]``."""
    nats, right = [], 0
    for rows, each in zip(logits, needles):
        answer = each.ids[0, -each.answer :].to(rows.device)
        found = rows[-each.answer - 1 : -1].float()
        nats.append(-found.log_softmax(-1).gather(-1, answer[:, None]).mean())
        right += bool((found.argmax(-1) == answer).all())
    return {"nats": round(float(torch.stack(nats).mean()), 4), "right": right, "trials": len(needles)}


def measure_needles(
    model: Any, needles: Sequence[Needle], ladder: Iterable[Setting]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of dense attention, and of every setting; question and answer are decoded."""
    ids = torch.cat([each.ids for each in needles])
    tail = max(each.question + each.answer for each in needles)
    batch = TailBatch(model, ids, tail, keep=1 + max(each.answer for each in needles))
    return of_needles(batch.dense, needles), [of_needles(batch.decode(one).logits, needles) for one in ladder]


def measure_length(
    model: Any, tokenizer: Any, tokens: Mapping[str, Sequence[int]], length: int, options: argparse.Namespace
) -> dict[str, Any]:
    names = [name for name in tokens if len(tokens[name]) >= length]
    ladder = [each for each in settings(options.budget, options.page_size) if each.budget < length]
    spent: dict[str, float] = {}
    clock = time.perf_counter()

    def passed(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        spent[name], clock = round(now - clock, 1), now

    def shown(part: str) -> Any:
        return tqdm(ladder, desc=f"{length} tokens, {part}", unit="setting")

    batch = TailBatch(model, torch.tensor([list(tokens[name][:length]) for name in names]), options.tail)
    passed("reading")
    again = token_kl(batch.dense, batch.decode(None).logits)
    case: dict[str, Any] = {
        "length": length,
        "texts": names,
        "nll": round(
            sum(distance(x, x, ids[1 - batch.tail :]).nll for x, ids in zip(batch.dense, batch.ids)) / len(names), 6
        ),
        "rounding": round(float(again.mean()), 7),  # KL of dense attention computed another way
        "rows": measure_texts(batch, shown("texts")),
    }
    passed("texts")
    case["failures"] = failures(batch, names, tokenizer, replace(BASE, budget=options.failure_budget))
    passed("failures")
    if length == min(options.length):  # it hardly depends on the length
        case["spread"] = spread_terms(batch)
        passed("spread")
    del batch
    needles = make_needles(tokenizer, tokens, length, options.trials)
    if needles:
        case["needles"], found = measure_needles(model, needles, shown("needles"))
        for row, each in zip(case["rows"], found):
            row["needles"] = each
    passed("needles")
    return {**case, "seconds": spent}


def measure_layers(
    model: Any, tokens: Mapping[str, Sequence[int]], length: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Budgets for each layer at one length."""
    clock = time.perf_counter()
    names = [name for name in tokens if len(tokens[name]) >= length]
    batch = TailBatch(model, torch.tensor([list(tokens[name][:length]) for name in names]), options.tail)
    rounding = float(token_kl(batch.dense, batch.decode(None).logits).mean())
    most = forwards(len(batch.full_layers), len(names))
    with tqdm(total=most, desc=f"{length} tokens, budgets of layers", unit="forward") as bar:
        found = layer_budgets(batch, names, BASE, passed=bar.update)
    return {**found, "rounding": round(rounding, 7), "seconds": round(time.perf_counter() - clock, 1)}


# ---- The run. ----


def check(options: argparse.Namespace) -> None:
    for name, least in (("tail", 2), ("trials", 0)):
        if getattr(options, name) < least:
            raise SystemExit(f"error: --{name}: expected at least {least}, got {getattr(options, name)}")
    wrong = [size for size in options.page_size if size not in PAGES_TAKEN or BLOCK % size]
    if wrong:
        raise SystemExit(f"error: --page-size: expected of {', '.join(map(str, PAGES_TAKEN))}, got {wrong[0]}")
    budgets = {"--budget": min(options.budget), "--failure-budget": options.failure_budget}
    for flag, budget in budgets.items():
        if budget < 2 * BASE.page_size:
            raise SystemExit(f"error: {flag}: expected at least {2 * BASE.page_size} tokens, got {budget}")
    if options.per_layer:
        if min(options.length) <= max(options.tail, 4 * PROBE):
            raise SystemExit(
                f"error: --length: expected more than --tail and {4 * PROBE} tokens for --per-layer, "
                f"got {min(options.length)}"
            )
    elif min(options.length) <= max(options.tail, 4 * options.failure_budget):
        raise SystemExit(
            f"error: --length: expected more than --tail and four times --failure-budget, "
            f"{max(options.tail, 4 * options.failure_budget)} tokens, got {min(options.length)}"
        )


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    settle(options, LENGTHS)
    check(options)
    if options.per_layer:
        options.preset = f"layers-{options.preset}"
    texts = texts_of.read(options.text)
    dtype = DTYPES[options.dtype]
    model, tokenizer = load(options.model, device, dtype)
    tokens = {name: tokenizer(text).input_ids for name, text in texts.items()}
    longest = max(map(len, tokens.values()))
    options.length = lengths = sorted({n for n in options.length if n <= longest})
    if not lengths:
        raise SystemExit(f"error: --text: expected one as long as --length, got {longest} tokens at most")
    shared = {
        "bench": "ablation",
        "model": name_of(options),
        "environment": environment(device),
        "texts": {name: {**texts_of.facts(text), "tokens": len(tokens[name])} for name, text in texts.items()},
    }
    if options.per_layer:
        alone = [n for n in lengths if sum(len(ids) >= n for ids in tokens.values()) < 2]
        if alone:
            raise SystemExit(f"error: --text: expected two of {alone[0]} tokens or more for --per-layer, got less")
        budgets = [measure_layers(model, tokens, length, options) for length in lengths]
        facts = {"dtype": options.dtype, "tail": options.tail, "head_dim": _head_dim(model)}
        return {**shared, "options": facts, "layers": budgets[0]["layers"], "cases": [], "budgets": budgets}
    cases = []
    for length in lengths:
        cases.append(measure_length(model, tokenizer, tokens, length, options))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  {length} tokens: {cases[-1]['seconds']} seconds", file=sys.stderr)
    layers = sorted({row["layer"] for row in cases[0]["spread"]})
    head_dim = _head_dim(model)
    for case in cases:
        for row in case["rows"]:
            setting = Setting(row["score"], row["weight"], row["page_size"], row["index_format"], row["budget"])
            row["bits"] = entry_bits(setting, head_dim, dtype)
    return {
        **shared,
        "options": {"dtype": options.dtype, "tail": options.tail, "head_dim": head_dim, "budgets": options.budget},
        "layers": layers,
        "cases": cases,
    }


def _head_dim(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# ---- The report. ----


def table(case: Mapping[str, Any], cell: Any) -> list[str]:
    """A line for each score, page size and format; a column for each budget."""
    lines: dict[tuple[str, int, str], dict[int, str]] = {}
    for row in case["rows"]:
        key = (label(row["score"], row["weight"]), row["page_size"], row["index_format"])
        lines.setdefault(key, {})[row["budget"]] = cell(row)
    budgets = sorted({row["budget"] for row in case["rows"]})
    rows = [
        {"score": name, "S": str(size), "index": form, **{str(budget): line.get(budget, "") for budget in budgets}}
        for (name, size, form), line in lines.items()
    ]
    return text_table(rows, left=["score", "index"])


def layers_table(found: Mapping[str, Any]) -> list[str]:
    """A line for each method and total: KL and what it saves, on other texts and on its own."""
    one = {row["budget"]: row["kl"] for row in found["uniform"]}
    lines = []
    for method, saved in found["saved"].items():
        of_method = [row for row in found["rows"] if row["method"] == method]
        for number, row in enumerate(of_method):
            cells = {where: f"{row[where]['kl']:.4f} {saved[where]['totals'][number]:+.1%}" for where in saved}
            lines.append({"budgets by": method, "total": str(row["total"]), "one": f"{one[row['total']]:.4f}", **cells})
    return text_table(lines, left=["budgets by"])


def report(result: dict[str, Any]) -> str:
    o = result["options"]
    lines = [
        f"{result['model']}, {o['dtype']}, {result['environment']['device']}; {len(result['layers'])} layers sparse"
    ]
    for found in result.get("budgets", []):
        lines += ["", f"{found['length']} tokens, {', '.join(found['texts'])}: KL, bytes saved at equal KL", ""]
        lines += layers_table(found)
        for method, saved in found["saved"].items():
            if saved["held_out"]:
                of = saved["held_out"]
                lines.append(f"{method}: {of['mean']:+.1%} ({of['low']:+.1%} to {of['high']:+.1%}) on other texts")
    for case in result["cases"]:
        lines += ["", f"{case['length']} tokens, {', '.join(case['texts'])}: KL, attention kept", ""]
        lines += table(case, lambda row: f"{row['kl']:.4f} {row['mass']:.3f}")
        if "needles" in case:
            dense = case["needles"]
            lines += ["", f"needles: nats, right of {dense['trials']}; dense {dense['nats']:.3f} {dense['right']}", ""]
            lines += table(case, lambda row: f"{row['needles']['nats']:.3f} {row['needles']['right']}")
        lines += ["", f"KL at {case['failures']['budget']} tokens: the worst {case['failures']['worst_count']}, all"]
        lines += [f"  {name}: {x['worst']:.3f}, {x['all']:.4f}" for name, x in case["failures"]["remedies"].items()]
    return "\n".join(lines)
