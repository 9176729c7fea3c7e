"""Measuring settings on a model and texts: dense prompts, sparse decode steps through the shipped ops."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unique_attn._version import __version__
from unique_attn.calibration.distances import distance
from unique_attn.calibration.needles import Needle, make_needle
from unique_attn.calibration.result import Calibration, Row
from unique_attn.config import UniqueConfig
from unique_attn.index_format import index_entry_bytes
from unique_attn.rules import rule_info

BUDGETS = (64, 128, 256, 512, 1024, 2048)
MOST_DENSE = (1, 2, 4)  # layers to try as dense ones


def calibrate(
    model: nn.Module,
    texts: Sequence[str | Tensor],
    tokenizer: Any = None,
    *,
    rules: Sequence[str] = ("directional", "mean"),
    page_sizes: Sequence[int] = (8, 16),
    budgets: Sequence[int] | None = None,
    config: UniqueConfig | None = None,
    max_tokens: int = 4096,
    tail: int = 128,
    needles: int = 8,
    tolerance: float = 0.02,
    progress: bool = True,
) -> Calibration:
    """Measure what rules, page sizes and budgets cost a model in quality, and recommend a setting.

    Each text is read densely up to its last ``tail`` tokens; these are decoded densely, and sparsely with every
    setting, as ``generate()`` would decode them. Where a smaller budget is beyond the tolerance, the layers that lose
    most attention are tried as ``dense_layers``. The model is left as it was.

    Args:
        model: a causal language model of transformers, enabled or not, on any device.
        texts: strings, or int64 ``[n]`` tokens.
        tokenizer: of the model; not needed for tokens without needles.
        rules: scoring rules.
        page_sizes: tokens per page.
        budgets: tokens that a step may read, of which those below half of the shortest text are measured; by default
            64, 128, ... 2048.
        config: everything else, such as ``index_format``.
        max_tokens: most tokens of a text.
        tail: last tokens of each text whose next tokens are compared.
        needles: texts with a six-digit code at different depths that is asked for at the end; 0 without.
        tolerance: largest KL of next tokens from those of dense attention, nats, for the recommendation.
        progress: show a bar.

    Raises:
        TypeError, ValueError: an argument, named; texts that are too short; a model of which no layer is sparse, or
            that is prepared for training.
    """
    plan = _Plan(model, texts, tokenizer, budgets, max_tokens, tail, needles, tolerance)
    base = UniqueConfig() if config is None else config
    settings = [
        replace(base, rule=rule, page_size=page, budget=budget, dense_below=0, index_format=_format(base, rule))
        for rule in rules
        for page in page_sizes
        for budget in plan.budgets
        if budget % page == 0 and base.block_size % page == 0 and budget // page > base.sink_pages + base.recent_pages
    ]
    settings = list(dict.fromkeys(settings))
    if not settings:
        raise ValueError(
            f"budgets: expected some that are multiples of page_sizes {list(page_sizes)} and hold more than "
            f"{base.sink_pages + base.recent_pages} pages, got {budgets}"
        )
    with _borrowed(model) as borrowed:
        samples = [_Sample.text(borrowed, ids, tail) for ids in plan.texts]
        samples += [_Sample.needle(borrowed, needle) for needle in plan.needles]
        dense = _row(None, [sample.dense_result() for sample in samples], samples)
        bar = _bar(len(settings), progress)
        rows = [_measure(borrowed, samples, setting, bar) for setting in settings]
        if not any(row.mass for row in rows):
            raise ValueError("model: expected one of which some layer can be sparse, got none that was")
        more = _with_dense_layers(rows, dense, tolerance)
        bar.total += len(more)
        for setting in more:
            rows.append(_measure(borrowed, samples, setting, bar))
        bar.close()
    rows = [replace(row, config=replace(row.config, dense_below=base.dense_below)) for row in rows if row.config]
    facts = {
        "unique_attn": __version__,
        "torch": torch.__version__,
        "device": str(borrowed.device),
        "machine": platform.platform(),
        "model": type(model).__name__,
        "dtype": str(borrowed.dtype),
    }
    return Calibration(dense, rows, tolerance, [len(ids) for ids in plan.texts], tail, facts)


class _Plan:
    """Checked arguments."""

    def __init__(
        self,
        model: Any,
        texts: Any,
        tokenizer: Any,
        budgets: Sequence[int] | None,
        max_tokens: int,
        tail: int,
        needles: int,
        tolerance: float,
    ) -> None:
        if isinstance(texts, (str, Tensor)) or not isinstance(texts, Sequence) or not texts:
            raise TypeError(f"texts: expected a list of texts or of tokens, got {type(texts).__name__}")
        for name, value, least in (("max_tokens", max_tokens, 64), ("tail", tail, 1), ("needles", needles, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if not tolerance > 0:
            raise ValueError(f"tolerance: expected a KL above 0, got {tolerance!r}")
        if tokenizer is None and (needles or any(isinstance(text, str) for text in texts)):
            raise ValueError("tokenizer: expected that of the model for texts and needles, got None")
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_tokens
        self.texts = [_tokens(text, tokenizer)[: min(max_tokens, positions)] for text in texts]
        least = 2 * tail + 128
        if max_tokens < least:
            raise ValueError(f"max_tokens: expected at least 2 * tail + 128 = {least}, got {max_tokens}")
        lengths = [len(text) for text in self.texts]
        shortest = min(lengths)
        if shortest < least:
            raise ValueError(
                f"texts: expected at least 2 * tail + 128 = {least} tokens each, got {shortest} in text "
                f"{lengths.index(shortest)}"
            )
        given = BUDGETS if budgets is None else budgets
        self.budgets = sorted(budget for budget in given if budget <= shortest // 2)
        if not self.budgets:
            raise ValueError(f"budgets: expected some of at most half of the {shortest} tokens, got {list(given)}")
        self.needles: list[Needle] = []
        for number in range(needles):
            text = self.texts[number % len(self.texts)]
            depth = (number + 0.5) / needles
            self.needles.append(make_needle(tokenizer, text.tolist(), len(text), depth, number))


def _tokens(text: str | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(text, Tensor):
        if text.dim() != 1 or text.dtype != torch.long:
            raise TypeError(f"texts: expected int64 tokens [n], got {text.dtype} {list(text.shape)}")
        return text
    return torch.tensor(tokenizer(text).input_ids)


def _format(base: UniqueConfig, rule: str) -> str:
    return base.index_format if rule_info(rule).compressible else "exact"


# ---- The model. ----


@dataclass(frozen=True)
class _Borrowed:
    """A model whose attention is switched by the calibration."""

    model: Any
    cache_name: str
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def logits(self, ids: Tensor, cache: Any, keep: int) -> Tensor:
        """``[keep, vocabulary]`` after the last tokens of ``ids`` ``[1, n]``, which ``cache`` then holds, too."""
        out = self.model(ids.to(self.device), use_cache=True, **{self.cache_name: cache}, **self._kept(keep))
        logits: Tensor = out.logits[0, -keep:]
        return logits

    def _kept(self, keep: int) -> dict[str, int]:
        import inspect

        return {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}


@contextmanager
def _borrowed(model: Any) -> Iterator[_Borrowed]:
    from unique_attn.hf.compat import cache_argument
    from unique_attn.hf.hooks import attention_modules, hook_of
    from unique_attn.hf.model import disable, enable

    hooks = (hook_of(module) for module in attention_modules(model))
    hook = next((hook for hook in hooks if hook is not None), None)
    if hook is not None and hook.train is not None:
        raise ValueError("model: expected one that is not prepared for training, got one enabled with train=")
    name = cache_argument(model)
    if name is None:
        raise ValueError("model: expected a causal language model whose forward takes a cache, got another one")
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    disable(model)
    try:
        yield _Borrowed(model, name, parameter.device, parameter.dtype)
    finally:
        disable(model)
        if hook is not None:
            enable(model, hook.config)
        model.train(training)


# ---- One text. ----


class _Sample:
    """A text that was read densely up to a tail, and the tail's dense logits."""

    def __init__(self, borrowed: _Borrowed, ids: Tensor, tail: int, answer: int) -> None:
        from unique_attn.hf.compat import DynamicCache

        self.ids, self.tail, self.answer = ids, tail, answer
        self.cache = DynamicCache(config=borrowed.model.config)
        prompt = ids[:, : ids.shape[1] - tail]
        borrowed.logits(prompt, self.cache, 1)
        self.dense = borrowed.logits(ids[:, -tail:], copy.deepcopy(self.cache), tail)

    @classmethod
    def text(cls, borrowed: _Borrowed, ids: Tensor, tail: int) -> _Sample:
        return cls(borrowed, ids[None], tail, 0)

    @classmethod
    def needle(cls, borrowed: _Borrowed, needle: Needle) -> _Sample:
        return cls(borrowed, needle.ids, needle.question + needle.answer, needle.answer)

    def dense_result(self) -> _Result:
        return self.result(self.dense, {})

    def result(self, logits: Tensor, mass: Mapping[int, float]) -> _Result:
        targets = self.ids[0, 1 - self.tail :].to(logits.device)
        if not self.answer:
            found = distance(self.dense, logits, targets)
            return _Result(found.kl, found.top1, found.nll, mass, None, None)
        rows, wanted = logits[-self.answer - 1 : -1], targets[-self.answer :]
        nll = -rows.float().log_softmax(-1).gather(-1, wanted[:, None]).mean()
        return _Result(0.0, 0.0, 0.0, mass, bool((rows.argmax(-1) == wanted).all()), float(nll))


@dataclass(frozen=True)
class _Result:
    kl: float
    top1: float
    nll: float
    mass: Mapping[int, float]
    right: bool | None  # of a needle
    answer_nll: float | None


def _measure(borrowed: _Borrowed, samples: Sequence[_Sample], config: UniqueConfig, bar: Any) -> Row:
    bar.set_postfix_str(f"{config.rule}, pages of {config.page_size}, {config.budget} tokens")
    row = _row(config, [_decode(borrowed, sample, config) for sample in samples], samples)
    bar.update()
    return row


def _decode(borrowed: _Borrowed, sample: _Sample, config: UniqueConfig) -> _Result:
    """Decode the tail of a sample sparsely, a few tokens at a time, each of which selects pages of its own."""
    from unique_attn.hf.hooks import MassRecord, attention_modules, hook_of, recording
    from unique_attn.hf.model import disable, enable

    enable(borrowed.model, config)
    hooks = [hook for module in attention_modules(borrowed.model) if (hook := hook_of(module)) is not None]
    cache, tail = copy.deepcopy(sample.cache), sample.ids[:, -sample.tail :]
    try:
        with recording(hooks, MassRecord) as records:
            parts = [borrowed.logits(ids, cache, ids.shape[1]) for ids in tail.split(config.max_decode_tokens, 1)]
    finally:
        disable(borrowed.model)
    sums: dict[int, list[Tensor]] = {}
    for record in records:
        sums.setdefault(record.layer_idx, []).append(record.mass.double().flatten(0, 1))
    mass = {layer: float(torch.cat(parts).mean()) for layer, parts in sorted(sums.items())}
    return sample.result(torch.cat(parts), mass)


# ---- Rows. ----


def _row(config: UniqueConfig | None, results: Sequence[_Result], samples: Sequence[_Sample]) -> Row:
    texts = [each for each in results if each.right is None]
    asked = [each for each in results if each.right is not None]

    def mean(values: Iterable[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else math.nan

    layers = sorted({layer for each in texts for layer in each.mass})
    return Row(
        config=config,
        kl=mean(each.kl for each in texts),
        top1=mean(each.top1 for each in texts),
        perplexity=math.exp(mean(each.nll for each in texts)),
        mass={layer: mean(each.mass.get(layer) for each in texts) for layer in layers},
        found=sum(bool(each.right) for each in asked),
        needles=len(asked),
        needle_nll=mean(each.answer_nll for each in asked),
        bytes_per_token=_bytes(config, samples[0], set(layers)),
    )


def _bytes(config: UniqueConfig | None, sample: _Sample, sparse: set[int]) -> int:
    """Keys, values and index that a step reads behind the longest context of a sample."""
    total = 0
    for idx, layer in enumerate(sample.cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() != 4:
            continue
        heads, length, dim = keys.shape[1], keys.shape[2], keys.shape[3] + values.shape[3]
        if config is None or idx not in sparse:
            total += heads * length * dim * keys.itemsize
            continue
        entry = index_entry_bytes(config.rule, keys.shape[3], keys.dtype, config.index_format)
        total += heads * (min(config.budget, length) * dim * keys.itemsize + -(-length // config.page_size) * entry)
    return total


def _with_dense_layers(rows: Sequence[Row], dense: Row, tolerance: float) -> list[UniqueConfig]:
    """Settings beyond the tolerance with their worst layers dense, where that could read less than what is within."""
    within = [row for row in rows if row.kl <= tolerance and row.found >= dense.found]
    least = min((row.bytes_per_token for row in within), default=dense.bytes_per_token)
    beyond = [row for row in rows if row not in within and row.config is not None and len(row.mass) > 1]
    tried = []
    for row in sorted(beyond, key=lambda row: row.kl)[:2]:
        assert row.config is not None
        worst = sorted(row.mass, key=lambda layer: row.mass[layer])
        each = (dense.bytes_per_token - row.bytes_per_token) / len(row.mass)
        for count in MOST_DENSE:
            if count < len(worst) and row.bytes_per_token + count * each < least:
                tried.append(replace(row.config, dense_layers=tuple(worst[:count])))
    return tried


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="setting", disable=not shown, dynamic_ncols=True)
