"""Where sparse decoding loses most: heads, tokens with the words around them, and what would have helped there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.page_choice import Setting
from benchmarks.measure.tail_decode import TailBatch
from unique_attn.calibration.distances import ROWS

WORDS_BEFORE, WORDS_AFTER = 14, 6  # of an excerpt
HEADS, TOKENS = 6, 5  # that are shown
WORST = 0.05  # share of the tokens that the remedies are measured on
AS_IT_IS = "as it is"


def token_kl(dense: Tensor, other: Tensor) -> Tensor:
    """KL of next tokens ``[samples, T]``, nats, of logits ``[samples, T, vocabulary]`` from dense ones; in fp32."""
    found = []
    for wanted, got in zip(dense.flatten(0, 1).split(ROWS), other.flatten(0, 1).split(ROWS)):
        p, q = wanted.float().log_softmax(-1), got.float().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1).clamp(min=0))
    return torch.cat(found).view(dense.shape[:2])


def excerpt(tokenizer: Any, ids: Sequence[int], position: int) -> dict[str, str]:
    """The words of a text up to a position, and those after it."""
    before = tokenizer.decode(ids[max(0, position - 60) : position + 1]).split()[-WORDS_BEFORE:]
    after = tokenizer.decode(ids[position + 1 : position + 30]).split()[:WORDS_AFTER]
    return {"before": " ".join(before), "after": " ".join(after)}


def remedies(base: Setting, mass_lost: dict[int, float]) -> dict[str, Setting]:
    """What may help, by name. Another weight costs no byte: on tokens that were picked because they are the worst, any
    other choice of pages looks better, and that one shows by how much."""
    worst = sorted(mass_lost, key=lambda layer: -mass_lost[layer])[: max(1, len(mass_lost) // 4)]
    return {
        AS_IT_IS: base,
        "c = 3": replace(base, weight=3.0),
        "twice the budget": replace(base, budget=2 * base.budget),
        "four times the budget": replace(base, budget=4 * base.budget),
        "pages of 4 tokens": replace(base, page_size=4),
        f"{len(worst)} of {len(mass_lost)} layers dense": replace(base, dense_layers=tuple(sorted(worst))),
        "the best pages (oracle)": replace(base, score="oracle", weight=None),
    }


def failures(batch: TailBatch, names: Sequence[str], tokenizer: Any, base: Setting) -> dict[str, Any]:
    """The heads and tokens with the largest losses of a setting, over a batch that has logits of its whole tail."""
    found = batch.decode(base, mass=True)
    layers = sorted(found.mass)
    lost = 1 - torch.stack([found.mass[layer].float() for layer in layers])  # [layers, samples, T, Hq]
    heads = lost.mean((1, 2))
    by_layer = dict(zip(layers, heads.mean(1).tolist()))
    ids = batch.ids.tolist()
    start = batch.tokens - batch.tail

    def where(flat: int) -> tuple[int, int]:
        return divmod(flat, batch.tail)

    worst_heads = []
    for flat in heads.flatten().argsort(descending=True)[:HEADS].tolist():
        layer, head = divmod(flat, heads.shape[1])
        of_head = lost[layer, :, :, head]
        sample, token = where(int(of_head.argmax()))
        worst_heads.append(
            {
                "layer": layers[layer],
                "head": head,
                "lost": round(float(heads[layer, head]), 4),
                "most": round(float(of_head[sample, token]), 4),
                "text": names[sample],
                **excerpt(tokenizer, ids[sample], start + token),
            }
        )

    tried = remedies(base, by_layer)
    kl = {
        name: token_kl(batch.dense, (found if name == AS_IT_IS else batch.decode(setting)).logits)
        for name, setting in tried.items()
    }
    order = kl[AS_IT_IS].flatten().argsort(descending=True)
    worst = order[: max(TOKENS, round(WORST * order.numel()))]
    worst_tokens = []
    for flat in order[:TOKENS].tolist():
        sample, token = where(flat)
        likeliest = {
            name: tokenizer.decode([int(logits[sample, token].argmax())])
            for name, logits in (("dense", batch.dense), ("sparse", found.logits))
        }
        worst_tokens.append(
            {
                "text": names[sample],
                "position": start + token,
                **excerpt(tokenizer, ids[sample], start + token),
                **likeliest,
                "kl": {name: round(float(each[sample, token]), 4) for name, each in kl.items()},
            }
        )
    total = kl[AS_IT_IS].sum()
    return {
        "budget": base.budget,
        "layers": {layer: round(value, 4) for layer, value in by_layer.items()},
        "dense_layers": list(next(s.dense_layers for s in tried.values() if s.dense_layers)),
        "head_quantiles": [round(float(x), 4) for x in heads.flatten().quantile(_quantiles(heads))],
        "worst_heads": worst_heads,
        "worst_tokens": worst_tokens,
        "worst_share": round(float(kl[AS_IT_IS].flatten()[worst].sum() / total.clamp(min=1e-12)), 4),
        "worst_count": len(worst),
        "remedies": {
            name: {"worst": round(float(each.flatten()[worst].mean()), 5), "all": round(float(each.mean()), 5)}
            for name, each in kl.items()
        },
    }


def _quantiles(like: Tensor) -> Tensor:
    return torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=like.device)
