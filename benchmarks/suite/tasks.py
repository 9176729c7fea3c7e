"""Tasks after RULER through plain generate(): the document read densely, question and answer decoded on pages.

A sample is a prompt of a given length with something hidden in Python's own documentation, see
:mod:`benchmarks.measure.tasks`. The samples of a task are read densely in batches, once; then stock attention and every
setting of an enabled model answer all of them from copies of that cache, greedily. The score is RULER's: the share of
the expected texts that an answer contains.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

import unique_attn
from benchmarks.measure import texts as texts_of
from benchmarks.measure.gemma import GEMMA
from benchmarks.measure.real_models import add_model_flags, load, name_of, settle
from benchmarks.measure.tasks import TASKS, Sample, Writer, samples
from benchmarks.measure.tasks.answers import answer, read, tidy
from benchmarks.measure.text_table import text_table
from examples.support.models import SMOLLM2
from examples.support.results import DTYPES, environment
from unique_attn.rules import INDEX_FORMATS, PAGE_SIZES, RULES

Setting = dict[str, Any]  # rule, page_size, budget and index_format
LENGTHS = {SMOLLM2: [4096, 8192], GEMMA: [4096, 8192, 16384, 32768]}
DEFAULT_RULES = ["directional", "mean", "minmax", "unique"]
BUDGETS = [128, 256, 512, 1024]
DENSE = "dense"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, LENGTHS, "prompt and answer")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="sets of samples, over which deviations are taken")
    parser.add_argument("--samples", type=int, default=20, help="of a task, a length and a seed")
    parser.add_argument("--batch", type=int, default=60, help="samples that are answered at once")
    parser.add_argument("--rules", nargs="*", default=DEFAULT_RULES, choices=list(RULES), help="none: dense alone")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--page-size", type=int, default=8, choices=list(PAGE_SIZES))
    parser.add_argument(
        "--index-format",
        nargs="+",
        default=["exact"],
        choices=list(INDEX_FORMATS),
        help="of rules that have it; the others are exact",
    )
    parser.add_argument(
        "--form",
        default="auto",
        choices=["auto", "chat", "plain"],
        help="prompts by the model's chat template, or as a text that goes on; auto is chat where there is a template",
    )
    parser.add_argument("--graphs", default="auto", choices=["auto", "off"], help="captured decode steps on CUDA")


def settings(options: argparse.Namespace) -> list[Setting]:
    """Every rule in every index format that it has, with every budget."""
    formats = {
        rule: [each for each in dict.fromkeys(options.index_format) if each == "exact" or RULES[rule].compressible]
        or ["exact"]
        for rule in options.rules
    }
    return [
        {"rule": rule, "page_size": options.page_size, "budget": budget, "index_format": index_format}
        for rule in options.rules
        for index_format in formats[rule]
        for budget in sorted(set(options.budgets))
    ]


def label(setting: Mapping[str, Any] | None) -> str:
    if setting is None:
        return DENSE
    storage = "" if setting["index_format"] == "exact" else f", {setting['index_format']}"
    return f"{setting['rule']}, {setting['budget']}{storage}"


# ---- One task at one length. ----


def measure_task(
    model: Any,
    tokenizer: Any,
    made: Sequence[Sample],
    ladder: Sequence[Setting],
    new_tokens: int,
    batch: int,
    graphs: str,
    bar: Any,
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Scores and answers of all samples, by the label of the setting.

    All prompts are equally long. Those of a batch are read densely up to where the longest question of all begins; of a
    shorter one, some tokens before it are decoded as well.
    """
    tail = max(sample.question for sample in made)
    scores: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    for start in range(0, len(made), batch):
        part = made[start : start + batch]
        ids = torch.tensor([sample.ids for sample in part], device=model.device)
        cache = read(model, ids[:, :-tail])
        for setting in (None, *ladder):
            bar.set_postfix_str(label(setting))
            tidy(model.device)
            out = answer(model, ids, cache, None if setting is None else config(setting, tail, graphs), new_tokens)
            found = tokenizer.batch_decode(out.cpu(), skip_special_tokens=True)
            texts.setdefault(label(setting), []).extend(found)
            scores.setdefault(label(setting), []).extend(sample.score(text) for sample, text in zip(part, found))
            bar.update(len(part))
    return scores, texts


def config(setting: Setting, tail: int, graphs: str) -> unique_attn.UniqueConfig:
    """Settings with which a question of up to ``tail`` tokens is a decode step, at any length."""
    return unique_attn.UniqueConfig(**setting, dense_below=0, max_decode_tokens=max(32, tail), graphs=graphs)


def summary(scores: Sequence[float], seeds: int) -> dict[str, Any]:
    """Mean of each seed's scores, which stand one behind the other; their mean and standard deviation."""
    each = len(scores) // seeds
    means = [statistics.fmean(scores[i * each : (i + 1) * each]) for i in range(seeds)]
    return spread(means)


def spread(means: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(means) if len(means) > 1 else 0.0
    return {
        "mean": round(statistics.fmean(means), 4),
        "std": round(deviation, 4),
        "seeds": [round(mean, 4) for mean in means],
    }


def example(
    made: Sequence[Sample], scores: Mapping[str, Sequence[float]], texts: Mapping[str, Sequence[str]], tokenizer: Any
) -> dict[str, Any]:
    """The sample on which settings lose most against dense attention: its question, and all answers."""
    lost = [
        sum(scores[DENSE][i] - each[i] for each in scores.values()) + 1e-3 * scores[DENSE][i] for i in range(len(made))
    ]
    worst = max(range(len(made)), key=lost.__getitem__)
    sample = made[worst]
    return {
        "question": tokenizer.decode(sample.ids[-sample.question :]),
        "expected": list(sample.answers),
        "answers": {name: each[worst] for name, each in texts.items()},
    }


# ---- The run. ----


def check(options: argparse.Namespace) -> None:
    for name in ("seeds", "samples", "batch"):
        value = getattr(options, name)
        if value < 1:
            raise SystemExit(f"error: --{name}: expected at least 1, got {value}")
    for budget in options.budgets:
        least = 2 * options.page_size  # sink and recent page
        if budget < least or budget % options.page_size:
            raise SystemExit(
                f"error: --budgets: expected multiples of --page-size {options.page_size} from {least} on, got {budget}"
            )


def run(options: argparse.Namespace) -> dict[str, Any]:
    check(options)
    device = torch.device(options.device)
    settle(options, LENGTHS)
    ladder, lengths = settings(options), sorted(set(options.length))
    text = texts_of.technical()
    model, tokenizer = load(options.model, device, DTYPES[options.dtype])
    if options.form == "auto":
        options.form = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    try:
        writer = Writer(tokenizer, text, chat=options.form == "chat")
    except ValueError as error:
        raise SystemExit(f"error: --form: {error}") from error
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or lengths[-1]
    if lengths[-1] > most:
        raise SystemExit(f"error: --length: expected at most the {most} tokens of the model, got {lengths[-1]}")
    work = [(length, name) for length in lengths for name in dict.fromkeys(options.tasks)]
    each = options.seeds * options.samples
    found: dict[int, dict[str, dict[str, Any]]] = {length: {} for length in lengths}
    examples: dict[int, dict[str, Any]] = {length: {} for length in lengths}
    with tqdm(total=len(work) * each * (1 + len(ladder)), unit="answer", dynamic_ncols=True) as bar:
        for length, name in work:
            bar.set_description(f"{name}, {length} tokens")
            try:
                made = [
                    one for seed in range(options.seeds) for one in samples(name, writer, length, seed, options.samples)
                ]
            except ValueError as error:
                raise SystemExit(f"error: --length {length}, task {name}: {error}") from error
            new_tokens = TASKS[name].new_tokens
            scores, texts = measure_task(model, tokenizer, made, ladder, new_tokens, options.batch, options.graphs, bar)
            for setting, values in scores.items():
                found[length].setdefault(setting, {})[name] = summary(values, options.seeds)
            examples[length][name] = example(made, scores, texts, tokenizer)
    return {
        "bench": "tasks",
        "model": name_of(options),
        "options": {
            "dtype": options.dtype,
            "seeds": options.seeds,
            "samples": options.samples,
            "batch": options.batch,
            "page_size": options.page_size,
            "form": options.form,
            "graphs": options.graphs,
        },
        "environment": environment(device),
        "filler": {"technical": texts_of.facts(text)},
        "cases": [
            {"length": length, "rows": rows(found[length], ladder), "examples": examples[length]} for length in lengths
        ],
    }


def rows(found: Mapping[str, Mapping[str, Any]], ladder: Sequence[Setting]) -> list[dict[str, Any]]:
    """A row for stock attention and for each setting, with its tasks and their average."""
    made = []
    for setting in (None, *ladder):
        tasks = found[label(setting)]
        average = spread([statistics.fmean(seed) for seed in zip(*(task["seeds"] for task in tasks.values()))])
        made.append({"setting": label(setting), **(setting or {}), "tasks": dict(tasks), "average": average})
    return made


# ---- The report. ----


def report(result: dict[str, Any]) -> str:
    o = result["options"]
    lines = [
        f"{result['model']}, {o['dtype']}, {result['environment']['device']}, pages of {o['page_size']}; share of the "
        f"expected texts in the answers (%): mean and deviation of {o['seeds']} seeds x {o['samples']} samples",
        "",
    ]
    for case in result["cases"]:
        title = f"{case['length']} tokens"
        table = [
            {
                title: row["setting"],
                **{TASKS[name].title: cell(task) for name, task in row["tasks"].items()},
                "average": cell(row["average"]),
            }
            for row in case["rows"]
        ]
        lines += [*text_table(table, left=[title]), ""]
    return "\n".join(lines)


def cell(task: Mapping[str, Any]) -> str:
    return f"{100 * task['mean']:.1f} ± {100 * task['std']:.1f}"
