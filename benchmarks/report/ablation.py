"""Tables and pictures of which pages to read, from results of ``ablation``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.measure.machine import slug
from benchmarks.measure.page_choice import SCORES, label
from benchmarks.report import plots
from benchmarks.report.summary import machine, of_models
from benchmarks.report.tables import tokens
from examples.support.results import markdown

Result = Mapping[str, Any]
Case = Mapping[str, Any]
Row = Mapping[str, Any]

BASE = {"page_size": 8, "index_format": "exact"}
DRAWN = [
    ("recent", None), ("mean", None), ("unique", 0.5), ("minmax", None), ("directional", 2.0), ("second order", None),
    ("directional, normalized", None), ("oracle", None),
]  # fmt: skip
LAMBDAS = (0.0, 0.125, 0.25, 0.5, 1.0)
TERMS = {  # of a head, in the order of the table
    "unique_ratio": "spread term of `unique` / mean term, standard deviations over pages",
    "directional_ratio": "spread term of `directional` / mean term",
    "order_spread": "order by `unique` and by its spread term alone, rank correlation",
    "order_mean": "order by `unique` and by its mean term alone",
    "rank_mean": "true attention and the mean term, rank correlation",
    "rank_unique_spread": "true attention and the spread term of `unique`",
    "rank_directional_spread": "true attention and the spread term of `directional`",
    **{f"rank_unique_{x:g}": f"true attention and `unique`, lambda = {x:g}" for x in LAMBDAS},
    "rank_directional": "true attention and `directional`, c = 2",
    "spread_norm": "spread of a page and norm of its mean, rank correlation",
    "key_norm_cv": "norms of keys: standard deviation / mean",
    "equal_c": "the c with which `directional` adds as much as `unique` does",
}
HEAD_ROWS = 16  # more heads are shown by layer


def cases(results: Sequence[Result]) -> Iterator[tuple[Result, Case]]:
    for result in of_models(results, "ablation"):
        for case in result["cases"]:
            yield result, case


# ---- Scores over budgets. ----


def score_table(rows: Iterable[Row], name: Callable[[Row], str], cell: Callable[[Row], str]) -> str:
    """A line for each name, a column for each budget."""
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        lines.setdefault(name(row), {})[row["budget"]] = cell(row)
    budgets = sorted({budget for line in lines.values() for budget in line})
    table = [
        {"score": head, **{f"{budget} tokens": line.get(budget, "-") for budget in budgets}}
        for head, line in lines.items()
    ]
    return markdown(pd.DataFrame(table))


def quality_cell(row: Row) -> str:
    """KL, attention kept, and what needles take."""
    found = f"{row['kl']:.4f}, {row['mass']:.3f}"
    return f"{found}, {row['needles']['nats']:.2f}" if "needles" in row else found


def _is_base(row: Row) -> bool:
    return BASE.items() <= row.items()


def _name(row: Row) -> str:
    return f"`{label(row['score'], row['weight'])}`" if SCORES[row["score"]].index_rule else row["score"]


def _stored(row: Row) -> str:
    bits = f", {row['bits']:.3g} bits" if row["bits"] else ""
    form = f", {row['index_format']}" if row["bits"] else ""
    return f"S={row['page_size']} {_name(row)}{form}{bits}"


def difference_table(case: Case) -> str:
    """KL beyond that of the default rule, with its standard error, of scores that read the same entries."""
    rows = [
        row
        for row in case["rows"]
        if _is_base(row) and SCORES[row["score"]].index_rule == "directional" and row["kl_more"] != 0
    ]
    return score_table(rows, _name, lambda row: f"{row['kl_more']:+.4f} ± {row['kl_more_se']:.4f}")


def case_block(result: Result, case: Case) -> str:
    o = result["options"]
    head = (
        f"`python -m benchmarks ablation`, {result['model']}, {machine(result['environment'])}, {o['dtype']}: "
        f"{tokens(case['length'])} tokens of {', '.join(case['texts'])}, the last {o['tail']} of each decoded; "
        f"{len(result['layers'])} layers choose pages of {BASE['page_size']} tokens, exact index. KL of the next "
        "tokens from dense attention (nats), attention kept"
    )
    if "needles" in case:
        dense = case["needles"]
        head += f", nats per token of {dense['trials']} hidden codes (dense: {dense['nats']:.2f})"
    base = [row for row in case["rows"] if _is_base(row)]
    others = [row for row in case["rows"] if not _is_base(row) or (row["score"], row["weight"]) == ("directional", 2.0)]
    parts = [f"{head}:\n\n{score_table(base, _name, quality_cell)}"]
    parts.append(
        "<details>\n<summary>Page sizes and compressed entries; differences from the default</summary>\n\n"
        "The same by page size and format, with the bits of the index per key channel and token:\n\n"
        f"{score_table(others, _stored, quality_cell)}\nKL beyond that of `directional, c = 2`, "
        "mean over the tokens and its standard error, of scores that read the same entries:\n\n"
        f"{difference_table(case)}\n</details>\n"
    )
    return "\n".join(parts)


# ---- Terms. ----


def _spreads(results: Sequence[Result]) -> dict[str, tuple[Result, Sequence[Row]]]:
    """By model, heads of the longest context for which there are some."""
    found: dict[str, tuple[Result, Sequence[Row]]] = {}
    for result, case in cases(results):
        if case.get("spread"):
            found[result["model"]] = (result, case["spread"])
    return found


def _cell(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def term_table(spreads: Mapping[str, tuple[Result, Sequence[Row]]]) -> str:
    """Median over heads, and the range, a column for each model."""
    rows = [
        {
            "of a query head": text,
            **{model: _cell(row[name] for row in heads) for model, (_, heads) in spreads.items()},
        }
        for name, text in TERMS.items()
    ]
    return markdown(pd.DataFrame(rows))


def _median(heads: Sequence[Row], name: str) -> float:
    return statistics.median(row[name] for row in heads)


def _best_lambda(heads: Sequence[Row]) -> float:
    """The one of those tried whose scores rank pages best, mean over heads."""
    return max(LAMBDAS, key=lambda x: sum(row[f"rank_unique_{x:g}"] for row in heads))


def term_sentences(model: str, head_dim: int, heads: Sequence[Row]) -> str:
    """What the numbers of a model say, in words."""
    of = {name: f"{_median(heads, name):.2f}" for name in TERMS}
    best = _best_lambda(heads)
    outweighed = sum(row["unique_ratio"] > 1 for row in heads)
    against = sum(row["rank_unique_spread"] < 0 for row in heads)
    return (
        f"- **{model}**: with lambda = 0.5, the spread term of `unique` varies {of['unique_ratio']} times as much "
        f"between pages as the mean term (median head; more than the mean term in {outweighed} of {len(heads)} heads), "
        f"that of `directional` {of['directional_ratio']} times. The order of pages by `unique` agrees with that of "
        f"its spread term by {of['order_spread']}, with that of the mean term by {of['order_mean']}. The true "
        f"attention agrees with the mean term by {of['rank_mean']}, with the spread term of `unique` by "
        f"{of['rank_unique_spread']} (negative in {against} heads), with that of `directional` by "
        f"{of['rank_directional_spread']}. Of the lambdas tried, {best:g} ranks pages best "
        f"({of[f'rank_unique_{best:g}']}; 0.5 gives {of['rank_unique_0.5']}). Lambda = 0.5 adds as much as "
        f"`directional` would with c = {_median(heads, 'equal_c'):.1f}; if all {head_dim} channels scattered alike, "
        f"that would be {0.5 * head_dim**0.5:.0f}.\n"
    )


def head_table(heads: Sequence[Row]) -> str:
    """Ratios and rank correlations of each head, or each layer if there are many."""
    names = ["unique_ratio", "directional_ratio", "rank_mean", "rank_unique_spread", "rank_unique_0.5"]
    names += ["rank_directional_spread", "rank_directional", "equal_c"]
    groups: dict[str, list[Row]] = {}
    for row in heads:
        key = f"{row['layer']}, {row['head']}" if len(heads) <= HEAD_ROWS else str(row["layer"])
        groups.setdefault(key, []).append(row)
    title = "layer, head" if len(heads) <= HEAD_ROWS else "layer, mean of its heads"
    rows = []
    for key, each in groups.items():
        cells = {_short(name): f"{sum(row[name] for row in each) / len(each):.2f}" for name in names}
        rows.append({title: key, **cells, "best lambda of those tried": f"{_best_lambda(each):g}"})
    return markdown(pd.DataFrame(rows))


def _short(name: str) -> str:
    words = {
        "unique_ratio": "spread / mean, `unique`",
        "directional_ratio": "spread / mean, `directional`",
        "rank_mean": "rank corr. mean",
        "rank_unique_spread": "spread of `unique`",
        "rank_unique_0.5": "`unique`",
        "rank_directional_spread": "spread of `directional`",
        "rank_directional": "`directional`",
        "equal_c": "equal c",
    }
    return words[name]


# ---- Failures. ----


def _quoted(row: Row) -> str:
    """An excerpt; an arrow where the next token is to come."""
    words = f"{row['before']} → {row['after']}".replace("`", "'").replace("|", "\\|")
    return f"`{words}`"


def failure_block(result: Result, case: Case) -> str:
    found = case["failures"]
    low, first, middle, third, high = found["head_quantiles"]
    remedies = markdown(
        pd.DataFrame(
            {
                "": name,
                f"KL of the {found['worst_count']} worst tokens": f"{x['worst']:.3f}",
                "KL of all": f"{x['all']:.4f}",
            }
            for name, x in found["remedies"].items()
        )
    )
    heads = markdown(
        pd.DataFrame(
            {
                "layer, head": f"{row['layer']}, {row['head']}",
                "attention lost, mean": f"{row['lost']:.3f}",
                "most": f"{row['most']:.3f}",
                "where it lost most": f"{row['text']}: {_quoted(row)}",
            }
            for row in found["worst_heads"]
        )
    )
    names = [name for name in found["remedies"] if name != "c = 3"]
    worst = markdown(
        pd.DataFrame(
            {
                "before the token → after": f"{row['text']}: {_quoted(row)}",
                "likeliest, dense / sparse": " / ".join(f"`{_plain(row[side])}`" for side in ("dense", "sparse")),
                **{f"KL {name}": f"{row['kl'][name]:.2f}" for name in names},
            }
            for row in found["worst_tokens"]
        )
    )
    return (
        f"{result['model']}, {tokens(case['length'])} tokens, `directional`, {found['budget']} tokens in pages of 8. "
        f"Heads lose {low:.3f} to {high:.3f} of their attention, half of them {first:.3f} to {third:.3f}, the median "
        f"head {middle:.3f}. {100 * found['worst_share']:.0f}% of the KL is on {found['worst_count']} of "
        f"{len(case['texts']) * result['options']['tail']} tokens:\n\n{remedies}\n"
        "<details>\n<summary>The worst heads and tokens</summary>\n\n"
        f"{heads}\n{worst}\n</details>\n"
    )


def _plain(token: str) -> str:
    return token.replace("`", "'").replace("|", "\\|").replace("\n", "↵").strip() or "␣"


# ---- The blocks. ----


def block(results: Sequence[Result]) -> str:
    """The block ``ABLATION``; empty without results."""
    parts = [case_block(result, case) for result, case in cases(results)]
    return "\n".join([*parts, *(plots.image(f"KL against budget, {n}", file) for n, file in _figures(results).items())])


def terms_block(results: Sequence[Result]) -> str:
    """The block ``ABLATION-TERMS``."""
    spreads = _spreads(results)
    if not spreads:
        return ""
    sizes = ", ".join(f"D={result['options']['head_dim']} for {model}" for model, (result, _) in spreads.items())
    parts = [
        "".join(
            term_sentences(model, result["options"]["head_dim"], heads) for model, (result, heads) in spreads.items()
        )
    ]
    parts += [
        "Median over the heads of all layers of full attention and, in brackets, the smallest and the largest; terms "
        f"in the unit of the logits, pages of 8 tokens; {sizes}:\n\n{term_table(spreads)}"
    ]
    for model, (_, heads) in spreads.items():
        parts.append(f"<details>\n<summary>{model}, head by head</summary>\n\n{head_table(heads)}\n</details>\n")
    return "\n".join(parts)


def failures_block(results: Sequence[Result]) -> str:
    """The block ``ABLATION-FAILURES``: of each model, the longest context."""
    longest = {result["model"]: (result, case) for result, case in cases(results)}
    return "\n".join(failure_block(result, case) for result, case in longest.values())


def _figures(results: Sequence[Result]) -> dict[str, str]:
    """Files of pictures by what they show."""
    longest = {
        result["model"]: f"{result['model']}, {tokens(case['length'])} tokens" for result, case in cases(results)
    }
    return {name: f"ablation_{slug(model)}.png" for model, name in longest.items()}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw KL against budget, of each model at its longest context.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    drawn = []
    longest = {result["model"]: (result, case) for result, case in cases(results)}
    for name, (_, case), file in zip(_figures(results), longest.values(), _figures(results).values()):
        rows = {(r["score"], r["weight"], r["budget"]): r["kl"] for r in case["rows"] if _is_base(r)}
        budgets = sorted({budget for *_, budget in rows})
        lines = {label(*key): [max(rows[key[0], key[1], budget], 1e-6) for budget in budgets] for key in DRAWN}
        drawn.append(
            plots.plot_lengths(
                budgets,
                lines,
                folder / file,
                title="What dropping pages changes",
                subtitle=f"{name}, pages of 8 tokens, against the tokens that a query reads",
                ylabel="KL of next tokens from dense attention, nats",
                logarithmic=True,
            )
        )
    return drawn
