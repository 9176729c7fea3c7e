"""What users do to models and caches behind the library's back: right, or a named error or warning."""

from __future__ import annotations

import contextvars
import copy
from typing import Any

import pytest
import torch
import transformers
from hf_helpers import (
    ALWAYS_SPARSE,
    CONFIGS,
    SMALL,
    assert_same,
    generate,
    layers_on_pages,
    prompt,
    run_and_collect,
    tiny,
)
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

import unique_attn as ua
from unique_attn.hf import compat
from unique_attn.train_config import TrainConfig

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
TOKEN = torch.tensor([[5]])


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    compat._warned.clear()


def call(model: Any, ids: torch.Tensor, cache: Any, **kwargs: Any) -> torch.Tensor:
    arguments = {compat.cache_argument(model): cache, **kwargs}
    return model(ids, use_cache=True, **arguments).logits


def decoded(model: Any, steps: int = 2) -> DynamicCache:
    """A cache that has seen a prompt and some tokens."""
    cache = DynamicCache()
    call(model, prompt(1)["input_ids"], cache)
    for _ in range(steps):
        call(model, TOKEN, cache)
    return cache


# ---- Contents of caches that are read and written. ----


def write_keys(cache: Any) -> None:
    cache.layers[0].keys[:, :, 3] = 5.0


def write_values(cache: Any) -> None:
    keys, values = cache.layers[1].keys, cache.layers[1].values
    values.zero_()
    del keys


def write_later(cache: Any) -> None:
    keys = cache.layers[2].keys
    assert cache.get_seq_length() == keys.shape[2]
    keys.mul_(0.5)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", [write_keys, write_values, write_later])
def test_what_is_written_to_a_cache_in_place_counts(write: Any, grad: Any) -> None:
    results = []
    for model in (tiny(), ua.enable(tiny(), ALWAYS_SPARSE)):
        with grad():
            cache = decoded(model)
            write(cache)
            results.append([call(model, TOKEN, cache) for _ in range(3)])
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert all(layers_on_pages(cache))  # again


@torch.no_grad()
def test_reading_a_cache_leaves_it_on_pages() -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    cache, other = decoded(model), decoded(tiny())
    for layer, expected in zip(cache.layers, other.layers):
        torch.testing.assert_close(layer.keys, expected.keys, **CLOSE)
        torch.testing.assert_close(layer.values, expected.values, **CLOSE)
        assert layer.keys is layer.keys  # gathered once
    assert all(layers_on_pages(cache))
    held = cache.layers[0].keys
    torch.testing.assert_close(call(model, TOKEN, cache), call(tiny(), TOKEN, other), **CLOSE)
    held.zero_()  # of the past
    torch.testing.assert_close(call(model, TOKEN, cache), call(tiny(), TOKEN, other), **CLOSE)


@pytest.mark.parametrize("steps", [0, 3])
@torch.no_grad()
def test_shallow_copies_of_layers_go_on_by_themselves(steps: int) -> None:
    results = []
    for model in (tiny(), ua.enable(tiny(), ALWAYS_SPARSE)):
        cache = decoded(model, steps)
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        results.append([call(model, torch.tensor([[token]]), each) for token in (5, 9) for each in (cache, fork, fork)])
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@torch.inference_mode()
def test_a_mask_that_changes_in_place_is_looked_at_again() -> None:
    results = []
    for model in (tiny(), ua.enable(tiny(), ALWAYS_SPARSE)):
        cache, mask = decoded(model, 1), torch.ones(1, 1, 1, 42, dtype=torch.bool)
        for _ in range(2):
            logits = call(model, TOKEN, cache, attention_mask=mask, position_ids=torch.tensor([[41]]))
            cache.crop(-1)
            mask[..., 10:20] = False
        results.append(logits)
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@torch.no_grad()
def test_layers_that_are_skipped_are_a_named_error() -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    cache = decoded(model)
    skipped = model.model.layers[1]
    model.model.layers[1] = _Skip(skipped)
    call(model, TOKEN, cache)
    call(model, TOKEN, cache)
    model.model.layers[1] = skipped
    with pytest.raises(RuntimeError, match="some layers are skipped, cut or changed alone"):
        call(model, TOKEN, cache)


class _Skip(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


# ---- Models that share a config, or hide their attention. ----


def test_a_model_that_shares_its_config_with_an_enabled_one_stays_as_it_was() -> None:
    config = CONFIGS["llama"]()
    enabled, other = (transformers.AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert enabled.config is other.config
    before = generate(other, prompt())
    ua.enable(enabled, SMALL)
    after, said = run_and_collect(lambda: generate(other, prompt()))
    assert_same(after, before, tolerance=0)
    assert said == [
        "unique_attn: LlamaAttention stays dense: a model that shares its config was enabled, and its own was not"
    ]
    with ua.record_selection(enabled) as records:
        generate(enabled, prompt())
    assert records
    ua.enable(other, SMALL)
    assert any(layers_on_pages(generate(other, prompt()).past_key_values))


class Mixer(LlamaAttention):
    """Nothing in its name or its attributes tells that it attends."""


def mixed(train: TrainConfig | None = None) -> Any:
    model = tiny()
    for layer in model.model.layers[1:]:
        layer.self_attn.__class__ = Mixer
        del layer.self_attn.is_causal
    return ua.enable(model, SMALL, train)


def test_attention_that_is_not_recognised_belongs_to_its_model() -> None:
    model = mixed()
    with ua.record_selection(model) as records:
        generate(model, prompt(1))
    assert {record.layer_idx for record in records} == {0, 1, 2}
    plain = ua.enable(tiny(), SMALL)
    assert_same(generate(model, prompt(1)), generate(plain, prompt(1)))


def test_attention_that_is_not_recognised_trains_with_the_mask() -> None:
    ids = prompt(2, 60)["input_ids"]
    train = TrainConfig(mode="hard")
    hidden, plain = mixed(train).train(), ua.enable(tiny(), SMALL, train).train()
    torch.testing.assert_close(hidden(ids, use_cache=False).logits, plain(ids, use_cache=False).logits, **CLOSE)


def test_a_part_of_an_enabled_model_can_be_disabled_and_the_other_way_round() -> None:
    for on, off in ((lambda m: m, lambda m: m.model), (lambda m: m.model, lambda m: m)):
        model = tiny(implementation="eager")
        ua.enable(on(model), SMALL)
        assert model.config._attn_implementation == "unique"
        ua.disable(off(model))
        assert model.config._attn_implementation == "eager"
        assert not hasattr(model.config, "unique_attn")


# ---- Said, not silent. ----


def test_a_unique_cache_for_a_model_that_was_not_enabled_is_dense_with_a_warning() -> None:
    output, said = run_and_collect(lambda: generate(tiny(), prompt(1), past_key_values=ua.UniqueCache(ALWAYS_SPARSE)))
    assert_same(output, generate(tiny(), prompt(1)))
    assert said == ["unique_attn: a UniqueCache was given to a model that was not enabled: it stays dense"]


@torch.no_grad()
def test_a_traced_model_is_dense() -> None:
    class Steps(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
            cache = DynamicCache()
            call(self.model, ids, cache)
            call(self.model, token, cache)
            return call(self.model, token, cache)

    inputs = (prompt(1)["input_ids"], TOKEN)
    expected = Steps(tiny())(*inputs)
    traced = torch.jit.trace(Steps(ua.enable(tiny(), ALWAYS_SPARSE)), inputs, check_trace=False)
    torch.testing.assert_close(traced(*inputs), expected, **CLOSE)


def test_recording_may_end_in_another_context() -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    recording = ua.record_selection(model)
    contextvars.copy_context().run(recording.__enter__)
    recording.__exit__(None, None, None)
    with ua.record_selection(model) as records:
        generate(model, prompt(1))
    assert records
