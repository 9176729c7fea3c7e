"""How much attention the selected pages hold, by rule and index format, on a real model's keys.

The last queries of every layer of a model over a text; the pages that the ops select of them; and the share of the true
attention that lies there. The first and the own page are always among them. Then, in plain PyTorch, formats that the
compressed index could have had, other weights of the spread, and scores normalized per head, all with ``directional``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.index_formats import FORMATS, OUTLIERS
from benchmarks.measure.real_keys import RealKeys, capture, texts
from benchmarks.measure.text_table import text_table
from examples.support.models import SMOLLM2, SMOLLM2_NAME, load_model
from examples.support.results import DTYPES, environment
from unique_attn import ops

BLOCK = 64  # tokens per block of the paged cache
STEP = 16  # query tokens that one row of `page_scores` takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=SMOLLM2, help="a Hugging Face id, a local folder, or smollm2")
    parser.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="a text; may be given several times"
    )
    parser.add_argument("--tokens", type=int, default=7000, help="tokens of each text, at most")
    parser.add_argument("--queries", type=int, default=64, help="last queries, a multiple of 16")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512], help="tokens that a KV head reads")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--format-page-size", type=int, default=8, help="page size at which formats are compared")
    parser.add_argument(
        "--dtype", default="bf16", choices=list(DTYPES), help="of the queries and keys that the ops get"
    )


# ---- By the ops. ----


def selected(keys: RealKeys, layer: int, rule: str, index_format: str, k: int, dtype: torch.dtype) -> Tensor:
    """The pages int64 ``[H, T, k]`` that the ops select in one layer, -1 behind the last."""
    q = keys.q[layer].permute(2, 0, 1, 3).flatten(1, 2).to(dtype)  # [T, Hq, D]
    heads, tokens, dim = keys.k[layer].shape
    blocks = -(-tokens // BLOCK)
    cache = torch.zeros(heads, blocks * BLOCK, dim, dtype=dtype)
    cache[:, :tokens] = keys.k[layer]
    cache = cache.unflatten(1, (blocks, BLOCK)).transpose(0, 1)
    paging: dict[str, Any] = {"rule": rule, "page_size": keys.page_size, "index_format": index_format}
    index = ops.new_index(cache, **paging)
    table = torch.arange(blocks, dtype=torch.int32)[None]
    length = torch.tensor([tokens], dtype=torch.int32)
    ops.page_index(cache, index, table, 0 * length, length, max_new_tokens=tokens, **paging)
    rows = len(q) // STEP
    ends = tokens - len(q) + STEP * torch.arange(1, rows + 1, dtype=torch.int32)
    scores = ops.page_scores(q.unflatten(0, (rows, STEP)), index, table.repeat(rows, 1), ends, **paging)
    return ops.topk_pages(scores, ends, k, page_size=keys.page_size).long().flatten(0, 1).transpose(0, 1)


def by_ops(keys: RealKeys, rule: str, index_format: str, budgets: list[int], dtype: torch.dtype) -> list[float]:
    """The mass that the ops' selection keeps at each budget."""
    kept = []
    for budget in budgets:
        total = 0.0
        for layer, mass in enumerate(keys.mass):
            pages = selected(keys, layer, rule, index_format, budget // keys.page_size, dtype)
            total += float((mass.gather(-1, pages.clamp(min=0)) * (pages >= 0)).sum(-1).mean())
        kept.append(total / len(keys.mass))
    return kept


# ---- In plain PyTorch. ----


def directional(keys: RealKeys, mean: Tensor, std: Tensor, c: float = 2.0, *, normalized: bool = False) -> Tensor:
    """Scores ``[layers, H, T, P]`` of these means and spreads, maximum over the group.

    ``normalized``: of ``z - logsumexp(z)`` over the pages that a query sees, z the scores times the logits' scale, so
    that no head outweighs the others by its size.
    """
    spread = torch.einsum("lhgtd,lhpd->lhgtp", keys.q.square(), std.square()).sqrt()
    scores = torch.einsum("lhgtd,lhpd->lhgtp", keys.q, mean) + c * spread
    if normalized:
        seen = torch.arange(scores.shape[-1]) <= keys.own_pages[:, None]
        scores = (scores * keys.q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        scores = scores - scores.logsumexp(-1, keepdim=True)
    return scores.amax(2)


def mean_of(texts: dict[str, list[float]]) -> list[float]:
    return [sum(each) / len(each) for each in zip(*texts.values())]


def compare_formats(each: dict[str, RealKeys], budgets: list[int]) -> list[dict[str, Any]]:
    """The mass kept by every format, and what is lost against exact entries, mean of the texts: with the keys as they
    are, and with outliers."""
    mass: list[dict[str, list[float]]] = [{} for _ in FORMATS]
    lost: list[dict[str, list[float]]] = [{} for _ in FORMATS]
    for name, change in {"plain": None, **OUTLIERS}.items():
        losses: list[dict[str, list[float]]] = [{} for _ in FORMATS]
        for text, plain in each.items():
            keys = plain if change is None else plain.changed(change)
            mean, std = keys.statistics()
            exact = keys.kept(directional(keys, mean, std), budgets)
            for i, form in enumerate(FORMATS):
                kept = keys.kept(directional(keys, *form.store(mean, std)), budgets)
                losses[i][text] = [a - b for a, b in zip(exact, kept)]
                if change is None:
                    mass[i][text] = kept
        for i in range(len(FORMATS)):
            lost[i][name] = mean_of(losses[i])
    return [
        {"name": form.name, "bits": form.bits, "entry_bytes": form.entry_bytes, "mass": m, "lost": x}
        for form, m, x in zip(FORMATS, mass, lost)
    ]


def compare_scores(each: dict[str, RealKeys], budgets: list[int]) -> list[dict[str, Any]]:
    """The mass kept by an exact index with other weights of the spread, and with scores normalized per head."""
    settings = [(f"c = {c:g}", c, False) for c in (1.0, 1.5, 2.0, 2.5, 3.0)] + [("normalized per head", 2.0, True)]
    results = []
    for name, c, normalized in settings:
        scores = {t: directional(k, *k.statistics(), c, normalized=normalized) for t, k in each.items()}
        results.append({"name": name, "mass": {t: k.kept(scores[t], budgets) for t, k in each.items()}})
    return results


# ---- The run. ----


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.device != "cpu":
        raise SystemExit(f"error: --device: expected cpu, got {options.device}")
    if options.queries < STEP or options.queries % STEP:
        raise SystemExit(f"error: --queries: expected a multiple of {STEP}, got {options.queries}")
    model, tokenizer = load_model(options.model, quiet=True)
    dtype, budgets = DTYPES[options.dtype], options.budgets
    captured = {}
    for name, text in texts(options.text).items():
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens]
        captured[name] = capture(model, ids, options.queries)
    dim = next(iter(captured.values()))[1].shape[-1]
    result: dict[str, Any] = {
        "bench": "index_quality",
        "model": SMOLLM2_NAME if options.model == SMOLLM2 else str(options.model),
        "options": {"queries": options.queries, "budgets": budgets, "dtype": options.dtype, "head_dim": dim},
        "texts": {name: k.shape[2] for name, (_, k) in captured.items()},
        "environment": environment(torch.device("cpu")),
        "oracle": [],
        "ops": [],
    }
    for size in options.page_sizes:
        each = {name: RealKeys.of(q, k, size) for name, (q, k) in captured.items()}
        oracle = {name: keys.kept(keys.mass, budgets) for name, keys in each.items()}
        result["oracle"].append({"page_size": size, "mass": oracle})
        for rule in ops.RULES:
            for index_format in ops.INDEX_FORMATS if ops.RULES[rule].compressible else ("exact",):
                size_of_entry = ops.index_entry_bytes(rule, dim, dtype, index_format)
                result["ops"].append(
                    {
                        "rule": rule,
                        "index": index_format,
                        "page_size": size,
                        "entry_bytes": size_of_entry,
                        "bits": 8 * size_of_entry / dim / size,
                        "mass": {n: by_ops(keys, rule, index_format, budgets, dtype) for n, keys in each.items()},
                    }
                )
        if size == options.format_page_size:
            result["formats"] = {"page_size": size, "results": compare_formats(each, budgets)}
        result.setdefault("scores", []).append({"page_size": size, "results": compare_scores(each, budgets)})
    return result


def report(result: dict[str, Any]) -> str:
    budgets, names = result["options"]["budgets"], list(result["texts"])

    def masses(mass: dict[str, list[float]]) -> dict[str, str]:
        """A column a text: a number for each budget."""
        return {name: " ".join(f"{x:.4f}" for x in mass[name]) for name in names}

    lines = [
        f"{result['model']}: attention kept by budgets {', '.join(map(str, budgets))} on {', '.join(names)}",
        f"the ops in {result['options']['dtype']}; bits are those of the index per key channel and token",
        "",
    ]
    rows: list[dict[str, str]] = []
    for oracle in result["oracle"]:
        size = oracle["page_size"]
        rows.append({"pages": f"S={size}", "index": "true mass", "bytes": "", "bits": "", **masses(oracle["mass"])})
        rows += [
            {
                "pages": f"S={size}",
                "index": f"{r['rule']}, {r['index']}",
                "bytes": str(r["entry_bytes"]),
                "bits": f"{r['bits']:.2f}",
                **masses(r["mass"]),
            }
            for r in result["ops"]
            if r["page_size"] == size
        ]
    lines += text_table(rows, left=["pages", "index"])
    if "formats" in result:
        size = result["formats"]["page_size"]
        lines += ["", f"formats in PyTorch, directional, S={size}: bits a channel, mass, and what is lost (x 1e-4)"]
        rows = []
        for r in result["formats"]["results"]:
            lost = {f"lost, {name}": " ".join(f"{1e4 * x:.1f}" for x in each) for name, each in r["lost"].items()}
            rows.append({"format": r["name"], "bits": f"{r['bits']:.2f}", **masses(r["mass"]), **lost})
        lines += text_table(rows, left=["format"])
    for scores in result["scores"]:
        lines += ["", f"scores in PyTorch, directional, exact entries, S={scores['page_size']}"]
        lines += text_table([{"score": r["name"], **masses(r["mass"])} for r in scores["results"]], left=["score"])
    return "\n".join(lines)
