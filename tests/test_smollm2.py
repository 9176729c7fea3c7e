"""The real model: SmolLM2-135M-Instruct over a real text, decoded token by token."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

import unique_attn
from unique_attn import UniqueConfig, ops

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from benchmarks.measure.real_keys import RealKeys, capture
from benchmarks.suite.index_quality import by_ops
from examples.support import DOCUMENT, evaluate
from examples.support.models import ModelFetchError, load_model

CONTEXT, STEPS = 1200, 12


class Dense(NamedTuple):
    """What sdpa makes of the same tokens."""

    model: Any
    ids: torch.Tensor
    cache: Any
    decoded: evaluate.Decoded
    logits: torch.Tensor
    all_ids: torch.Tensor


@pytest.fixture(scope="module")
def dense() -> Dense:
    try:
        model, tokenizer = load_model(quiet=True)
    except ModelFetchError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
    text = DOCUMENT.read_text("utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : CONTEXT + STEPS + 1]
    cache = evaluate.prefill(model, ids[:, :CONTEXT])
    return Dense(model, ids[:, CONTEXT:], cache, *evaluate.teacher_forced(model, ids[:, CONTEXT:], cache), ids)


def sparse(dense: Dense, **settings: Any) -> tuple[evaluate.Decoded, torch.Tensor, list[Any]]:
    unique_attn.enable(dense.model, UniqueConfig(**settings))
    try:
        evaluate.prefill(dense.model, dense.ids[:, :4])  # a layer's first call is dense
        with unique_attn.record_selection(dense.model) as records:
            decoded, logits = evaluate.teacher_forced(dense.model, dense.ids, dense.cache)
    finally:
        unique_attn.disable(dense.model)
    return decoded, logits, records


@pytest.mark.parametrize("rule", ["mean", "unique", "directional", "minmax"])
def test_reading_everything_is_dense(dense: Dense, rule: str):
    _, logits, records = sparse(dense, rule=rule, budget=1280, dense_below=0)
    assert len(records) == 30 * STEPS  # every layer ran the ops in every step
    torch.testing.assert_close(logits, dense.logits, atol=2e-3, rtol=0)


def test_small_budget(dense: Dense, record_property):
    decoded, logits, records = sparse(dense, budget=128)
    assert len(records) == 30 * STEPS
    assert all(record.pages.shape == (1, 1, 3, 16) for record in records)
    assert all(record.pages[0, 0, head, 0] == 0 for record in records for head in range(3))  # the sink page
    assert math.isfinite(decoded.perplexity)
    assert not torch.equal(logits, dense.logits)  # something was left out
    record_property("perplexity_dense", dense.decoded.perplexity)
    record_property("perplexity_budget_128", decoded.perplexity)
    print(f"perplexity of {STEPS} tokens: dense {dense.decoded.perplexity:.2f}, 128 tokens {decoded.perplexity:.2f}")
    # The text is far from random to the model either way: a uniform guess would score 49152.
    assert decoded.perplexity < 1000


def test_compressed_index(dense: Dense):
    """Real keys: the selection of a compressed index holds nearly as much attention, and decoding is as close."""
    tokens = dense.all_ids[:, :CONTEXT]
    keys = RealKeys.of(*capture(dense.model, tokens, 16), page_size=8)
    for rule in ("mean", "unique", "directional"):
        exact, compressed = (by_ops(keys, rule, each, [64, 128, 256], torch.float32) for each in ops.INDEX_FORMATS)
        print(f"{rule}: mass kept by 64, 128 and 256 tokens, exact {exact}, compressed {compressed}")
        assert all(b > a - 0.005 for a, b in zip(exact, compressed, strict=True))
    decoded, _, records = sparse(dense, budget=128, index_format="compressed")
    assert len(records) == 30 * STEPS
    assert decoded.perplexity == pytest.approx(sparse(dense, budget=128)[0].perplexity, rel=0.2)


def test_more_budget_is_closer(dense: Dense):
    def error(budget: int) -> float:
        return (sparse(dense, budget=budget)[1] - dense.logits).square().mean().sqrt().item()

    assert error(768) < error(64)


def test_disable_restores_dense(dense: Dense):
    sparse(dense, budget=64)
    _, logits = evaluate.teacher_forced(dense.model, dense.ids[:, :4], dense.cache)
    assert torch.equal(logits, dense.logits[:3])
