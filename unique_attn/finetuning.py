"""Data and measurements of ``examples/finetune.py``: does a model that reads few pages still read and still find?

Training sequences are prose with facts spread in it ("The code of the Lisbon archive is 48213.") and questions about
some of them at the end. What is measured, on prose and on facts that training never saw: the perplexity of prose, and
how many questions are answered with exactly the right digits.
"""

from __future__ import annotations

import ast
import random
import re
import statistics
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unique_attn
from unique_attn import TrainConfig, UniqueConfig, evaluate
from unique_attn.hf.hooks import attention_modules

Tokens = list[int]

HELD_OUT = 0.1  # share of every document that is never trained on
TOKENS_PER_FACT, TOKENS_PER_QUESTION = 64, 256
PLACES = ["archive", "library", "harbour", "museum", "station", "observatory", "theatre", "brewery"]
CITIES = [
    "Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Tokyo", "Dublin", "Prague", "Athens", "Warsaw", "Madrid",
    "Nairobi", "Quito", "Havana", "Seoul", "Delhi", "Tunis", "Riga", "Sofia", "Bern", "Ankara", "Manila", "Dakar",
    "Accra", "Boston", "Geneva", "Naples", "Porto", "Leeds", "Bergen", "Kyoto", "Jaipur", "Cusco", "Basel",
    "Bruges", "Ghent", "Malmo", "Turin", "Verona", "Zagreb", "Tallinn", "Odessa", "Baku", "Hanoi", "Perth",
    "Denver", "Austin", "Quebec", "Calgary", "Toledo",
]  # fmt: skip
HELD_OUT_CITIES = CITIES[-10:]  # asked about in the evaluation alone


# ---- Prose. ----


def offline_documents() -> list[str]:
    """English text that every Python installation has: the language reference of ``help()``, the long docstrings of the
    standard library, and the lighthouse of the demo. No paragraph comes twice."""
    found = [resources.files("unique_attn").joinpath("data/carrow_head.txt").read_text("utf-8")]
    try:
        from pydoc_data import topics

        found += [topics.topics[name] for name in sorted(topics.topics)]
    except ImportError:  # some distributions leave it out
        pass
    found += _docstrings(Path(sysconfig.get_path("stdlib")))
    seen: set[str] = set()
    unique = []
    for text in found:
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
        fresh = [part for part in dict.fromkeys(paragraphs) if part not in seen]
        seen.update(fresh)
        unique.append("\n\n".join(fresh))
    return [text for text in unique if len(text) > 400]


def _docstrings(folder: Path) -> Iterator[str]:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
    for file in sorted(folder.rglob("*.py")):
        if skipped.isdisjoint(file.relative_to(folder).parts):
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node)
                    if text and len(text) > 400:
                        yield text


def read_documents(files: Sequence[str | Path]) -> list[str]:
    """The text of every file.

    Raises:
        ValueError: a file is missing, empty or no UTF-8 text; the message names it.
    """
    documents = []
    for file in files:
        try:
            text = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise ValueError(f"--text: cannot read {str(file)!r}: {reason}") from error
        if not text.strip():
            raise ValueError(f"--text: expected text, got the empty file {str(file)!r}")
        documents.append(text)
    return documents


def tokenize(tokenizer: Any, documents: Sequence[str]) -> tuple[list[Tokens], list[Tokens]]:
    """Sentences as tokens, in the order of the text: those to train on, and the last tenth of all, which is held out.

    Documents are shuffled (always in the same way) so that the held-out part is not all of one kind; of a single
    document it is the end.
    """
    order = list(documents)
    random.Random(0).shuffle(order)
    text = "\n\n".join(order)
    pieces = re.findall(r"\s*\S.*?(?:[.!?](?=\s)|(?=\n\s*\n)|\Z)", text, re.DOTALL)
    sentences: list[Tokens] = tokenizer(pieces, add_special_tokens=False).input_ids
    allowed = (1 - HELD_OUT) * sum(map(len, sentences))
    count, total = 0, 0
    while total + len(sentences[count]) <= allowed:
        total += len(sentences[count])
        count += 1
    return sentences[:count], sentences[count:]


# ---- Facts and questions. ----


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        ids: tokens.
        weights: of each token in the training loss. 0 for the digits of a fact, which nobody can foresee.
        question: index of the last question's first token.
        answer: index of its answer's first token.
    """

    ids: Tokens
    weights: list[float]
    question: int
    answer: int


def prose_window(sentences: Sequence[Tokens], start: int, length: int) -> list[Tokens]:
    """``length`` tokens from sentence ``start`` on, going on at the beginning after the end."""
    window: list[Tokens] = []
    room = length
    while room > 0:
        window.append(list(sentences[start % len(sentences)][:room]))
        room -= len(window[-1])
        start += 1
    return window


def sample(
    tokenizer: Any,
    sentences: Sequence[Tokens],
    rng: random.Random,
    length: int,
    *,
    cities: Sequence[str],
    facts: int,
    questions: int,
    answer_weight: float = 1.0,
) -> Sample:
    """Prose with ``facts`` at random places and ``questions`` about some of them at the end: ``length`` tokens in all.

    Raises:
        ValueError: facts and questions do not fit into ``length`` tokens.
    """

    def encode(text: str) -> Tokens:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    keys = rng.sample([(city, place) for city in cities for place in PLACES], facts)
    told: list[tuple[Tokens, list[float]]] = []
    asked: list[tuple[Tokens, Tokens]] = []
    for i, (city, place) in enumerate(keys):
        digits = encode(f" {rng.randrange(10000, 100000)}")
        begin, end = encode(f" The code of the {city} {place} is"), encode(".")
        told.append((begin + digits + end, [1.0] * len(begin) + [0.0] * len(digits) + [1.0] * len(end)))
        if i < questions:
            question = f"\nQuestion: What is the code of the {city} {place}?\nAnswer: The code of the {city} {place} is"
            asked.append((encode(question), digits))
    room = length - sum(len(text) for text, _ in told) - sum(len(q) + len(a) for q, a in asked)
    if room < 0:
        raise ValueError(f"{facts} facts and {questions} questions take {length - room} tokens, more than {length}")
    parts = [(text, [1.0] * len(text)) for text in prose_window(sentences, rng.randrange(len(sentences)), room)]
    for fact in told:
        parts.insert(rng.randrange(len(parts) + 1), fact)
    ids = [token for text, _ in parts for token in text]
    weights = [weight for _, each in parts for weight in each]
    asked_at = answer_at = len(ids)
    for text, digits in asked:
        asked_at, answer_at = len(ids), len(ids) + len(text)
        ids += text + digits
        weights += [1.0] * len(text) + [answer_weight] * len(digits)
    return Sample(ids, weights, asked_at, answer_at)


def training_data(
    tokenizer: Any, sentences: Sequence[Tokens], *, count: int, length: int, seed: int, share: float, weight: float
) -> list[dict[str, Tensor]]:
    """``count`` sequences; ``share`` of them with facts and questions, whose answers weigh ``weight`` a token."""
    rng = random.Random(seed)
    facts, questions = max(2, length // TOKENS_PER_FACT), max(1, length // TOKENS_PER_QUESTION)
    cities = CITIES[: -len(HELD_OUT_CITIES)]
    data = []
    for _ in range(count):
        many = (facts, questions) if rng.random() < share else (0, 0)
        each = sample(
            tokenizer, sentences, rng, length, cities=cities, facts=many[0], questions=many[1], answer_weight=weight
        )
        data.append({"input_ids": torch.tensor(each.ids), "weights": torch.tensor(each.weights)})
    return data


# ---- Measurements. ----


@dataclass(frozen=True)
class Evaluation:
    """What every model is measured on.

    Attributes:
        windows: int64 ``[n, length]``, held-out prose.
        samples: held-out prose with held-out facts, one question each.
        skipped: first tokens of a window that do not count in the perplexity: the budget, which is read densely.
        batch: sequences at a time.
    """

    windows: Tensor
    samples: list[Sample]
    skipped: int
    batch: int

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        sentences: Sequence[Tokens],
        *,
        length: int,
        windows: int,
        prompts: int,
        skipped: int,
        batch: int,
    ) -> Evaluation:
        """At most ``windows`` windows of prose without overlap, and ``prompts`` questions; always the same ones.

        Raises:
            ValueError: the held-out text is too short for one window.
        """
        stream = [token for sentence in sentences for token in sentence]
        count = min(windows, len(stream) // length)
        if count == 0:
            need = round(length / HELD_OUT)
            raise ValueError(
                f"--text: too short: {HELD_OUT:.0%} of it are {len(stream)} tokens, fewer than --length {length}; "
                f"give about {need} tokens in all or a smaller --length"
            )
        rng = random.Random(1)
        facts = max(2, length // TOKENS_PER_FACT)
        samples = [
            sample(tokenizer, sentences, rng, length, cities=HELD_OUT_CITIES, facts=facts, questions=1)
            for _ in range(prompts)
        ]
        return cls(torch.tensor(stream[: count * length]).view(count, length), samples, skipped, batch)

    def measure(
        self, model: Any, config: UniqueConfig | None, progress: Callable[[int], object] = lambda count: None
    ) -> dict[str, float]:
        """Perplexity and answers of ``model``, dense if ``config`` is None, by the package's own kernels.

        Returns:
            ``perplexity``: of held-out prose past the first ``skipped`` tokens, as if all of it had been decoded token
            by token.
            ``retrieval``: share of questions that ``generate()`` answers with the right digits; the document is read
            densely, as prefill is, then question and answer are decoded.
            ``retrieval_decoded``, ``answer_nll``: the same share, and the mean negative log-likelihood of an answer's
            token, as if the document, too, had been decoded token by token.
        """
        found = {"perplexity": self._perplexity(model, config, progress)}
        found |= self._forced_answers(model, config, progress)
        found["retrieval"] = self._generated_answers(model, config, progress)
        return found

    @property
    def total(self) -> int:
        """How far ``progress`` counts in :meth:`measure`."""
        return len(self.windows) + 2 * len(self.samples)

    def _perplexity(self, model: Any, config: UniqueConfig | None, progress: Callable[[int], object]) -> float:
        nll = []
        with decoding(model, config):
            for ids in self.windows.to(model.device).split(self.batch):
                with torch.no_grad():
                    logits = model(ids, use_cache=False).logits
                nll.append(token_nll(logits, ids)[:, self.skipped :].flatten())
                progress(len(ids))
        return float(torch.cat(nll).mean().exp())

    def _forced_answers(
        self, model: Any, config: UniqueConfig | None, progress: Callable[[int], object]
    ) -> dict[str, float]:
        right, nll = [], []
        with decoding(model, config):
            for i in range(0, len(self.samples), self.batch):
                part = self.samples[i : i + self.batch]
                ids = torch.tensor([each.ids for each in part], device=model.device)
                with torch.no_grad():
                    longest = max(len(each.ids) - each.answer for each in part)
                    logits = model(ids, use_cache=False, logits_to_keep=longest + 1).logits
                best, targets = logits[:, :-1].argmax(-1), ids[:, -longest:]
                loss = token_nll(logits, ids[:, -longest - 1 :])
                for row, each in enumerate(part):
                    answer = slice(longest - (len(each.ids) - each.answer), None)
                    right.append(torch.equal(best[row, answer], targets[row, answer]))
                    nll.append(float(loss[row, answer].mean()))
                progress(len(part))
        return {"retrieval_decoded": sum(right) / len(right), "answer_nll": sum(nll) / len(nll)}

    def _generated_answers(self, model: Any, config: UniqueConfig | None, progress: Callable[[int], object]) -> float:
        if config is not None:
            unique_attn.enable(model, config)
            evaluate.prefill(model, self.windows[:1, :8].to(model.device))  # a layer's first call is dense
        right = 0
        groups: dict[tuple[int, int], list[Sample]] = {}  # rows of a batch have the same lengths, so no padding
        for each in self.samples:
            groups.setdefault((each.question, each.answer), []).append(each)
        for (question, answer), members in groups.items():
            for i in range(0, len(members), self.batch):
                part = members[i : i + self.batch]
                prompts = torch.tensor([each.ids[:answer] for each in part], device=model.device)
                cache = evaluate.prefill(model, prompts[:, :question])
                longest = max(len(each.ids) for each in part) - answer
                out = model.generate(
                    prompts, attention_mask=torch.ones_like(prompts), past_key_values=cache, do_sample=False,
                    min_new_tokens=longest, max_new_tokens=longest, pad_token_id=0,
                )[:, answer:].tolist()  # fmt: skip
                right += sum(row[: len(each.ids) - answer] == each.ids[answer:] for row, each in zip(out, part))
                progress(len(part))
        if config is not None:
            unique_attn.disable(model)
        return right / len(self.samples)


@contextmanager
def decoding(model: Any, config: UniqueConfig | None) -> Iterator[None]:
    """Forward passes without a cache attend as decoding the same tokens one by one would: the hard training mask.

    ``None`` leaves the model dense.
    """
    if config is None:
        yield
        return
    unique_attn.enable(model, config, train=TrainConfig(mode="hard"))
    modules = attention_modules(model)
    try:
        for module in modules:
            module.training = True  # not their children, nor anything else: no dropout
        yield
    finally:
        for module in modules:
            module.training = False
        unique_attn.disable(model)


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood, fp32 ``[B, L - 1]``, of every token of ``ids`` ``[B, L]`` but the first."""
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return nll.view(ids.shape[0], -1)


# ---- What a person reads. ----

METRICS = {  # name: title, format, factor
    "perplexity": ("perplexity of held-out prose", ".2f", 1),
    "retrieval": ("answers right, document prefilled (%)", ".1f", 100),
    "retrieval_decoded": ("answers right, all decoded (%)", ".1f", 100),
    "answer_nll": ("nats per answer token, all decoded", ".3f", 1),
}


def variant(train: dict[str, Any] | None) -> str:
    """How a run was trained, in words."""
    if train is None:
        return "trained densely"
    words = f"trained {train['mode']}"
    if train["mode"] == "soft":
        words += f", tau {train['tau']:g}" + (f" to {train['tau_end']:g}" if train["tau_end"] else "")
    return words if train["hard_after"] is None else f"{words}, hard after {train['hard_after']:g}"


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds, by variant, side (``dense``, ``sparse``) and metric."""
    groups: dict[str, list[dict[str, Any]]] = {"as it came": [result["before"]]}
    for run in result["runs"]:
        groups.setdefault(variant(run["train"]), []).append(run)
    summary: dict[str, Any] = {}
    for name, runs in groups.items():
        for side in ("dense", "sparse"):
            for metric in METRICS:
                values = [run[side][metric] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else None
                facts = {"mean": statistics.fmean(values), "spread": spread}
                summary.setdefault(name, {}).setdefault(side, {})[metric] = facts
    return summary


def _cell(facts: dict[str, Any], metric: str) -> str:
    _, form, factor = METRICS[metric]
    spread = "" if facts["spread"] is None else f" ± {factor * facts['spread']:{form}}"
    return f"{factor * facts['mean']:{form}}{spread}"


def table(result: dict[str, Any]) -> str:
    """The summary as a Markdown table: a row a variant and side."""
    head = ["", "decodes", *(title for title, _, _ in METRICS.values())]
    lines = [head, ["---"] * len(head)]
    for name, sides in result["summary"].items():
        for side, metrics in sides.items():
            reads = "densely" if side == "dense" else f"{result['settings']['budget']} tokens"
            lines.append([name, reads, *(_cell(metrics[metric], metric) for metric in METRICS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(result: dict[str, Any], path: str | Path) -> Path:
    """Draw the summary, a panel a metric: bars are means, dots are seeds.

    Raises:
        ImportError: matplotlib is missing.
    """
    from unique_attn import viz

    plt = viz._pyplot()
    names = list(result["summary"])
    runs = [(variant(run["train"]), run) for run in result["runs"]]
    shown = ["perplexity", "retrieval", "retrieval_decoded"]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.3 * len(shown), 4.4), facecolor=viz.PAPER)
    colors = {"dense": viz.RAMP[2], "sparse": viz.RAMP[4]}
    for ax, metric in zip(axes, shown):
        title, form, factor = METRICS[metric]
        for place, name in enumerate(names):
            for offset, side in ((-0.2, "dense"), (0.2, "sparse")):
                mean = factor * result["summary"][name][side][metric]["mean"]
                seeds = [factor * run[side][metric] for label, run in runs if label == name]
                ax.bar(place + offset, mean, 0.38, color=colors[side])
                if len(seeds) > 1:
                    ax.plot([place + offset] * len(seeds), seeds, "o", color=viz.ACCENT, markersize=3)
                ax.annotate(
                    f"{mean:{form}}", (place + offset, max([mean, *seeds])), xytext=(0, 3), textcoords="offset points",
                    ha="center", va="bottom", fontsize=8, color=viz.INK,
                )  # fmt: skip
        viz._style(ax)
        ax.set_title(title, loc="left", fontsize=10, color=viz.INK)
        ax.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    labels = ["decodes densely", f"decodes with a budget of {result['settings']['budget']} tokens"]
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=9, labelcolor=viz.INK)
    o, count = result["options"], len(result["options"]["seeds"])
    note = f"{result['model']}, {o['length']} tokens, {o['steps']} steps of {o['batch']} sequences, {o['method']}"
    note += f", {count} seeds (dots)" if count > 1 else ""
    figure.text(0.02, 0.97, "Fine-tuning for a small budget", fontsize=14, color=viz.INK, weight="bold", va="top")
    figure.text(0.02, 0.905, note, fontsize=9, color=viz.MUTED, va="top")
    figure.tight_layout(rect=(0, 0.06, 1, 0.88))
    return viz._save(plt, figure, path)
