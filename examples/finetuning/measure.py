"""What a model is measured on: the perplexity of held-out prose, and answers to questions about held-out facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import unique_attn
from examples.finetuning.data import HELD_OUT, HELD_OUT_CITIES, Sample, Tokens, fact_count, sample
from examples.support import evaluate
from unique_attn import TrainConfig, UniqueConfig
from unique_attn.hf.hooks import attention_modules


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
        facts = fact_count(length, HELD_OUT_CITIES)
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
