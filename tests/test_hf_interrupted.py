"""Calls that fail or change in the middle: what is stored then, what a mask is taken for, what is said."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_helpers import prompt, tiny
from hf_prefill_cases import EXACT
from transformers.cache_utils import StaticLayer

import unique_attn as ua
from unique_attn.paging import LayerPages, OutOfStepError

FULL = ua.UniqueConfig(budget=512, dense_below=0, block_size=16)


def steps(model: Any, cache: Any, ids: torch.Tensor, *bounds: int) -> torch.Tensor:
    logits = None
    with torch.no_grad():
        for begin, end in pairwise(bounds):
            logits = model(ids[:, begin:end], past_key_values=cache).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_step_that_fails_where_it_is_stored(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Layers have as many tokens, but not all have those of the step."""
    model, ids = ua.enable(tiny("llama"), FULL), prompt(1, 70)["input_ids"]
    cache = ua.UniqueCache(FULL)
    steps(model, cache, ids, 0, 60, 61, 62)
    calls: list[int] = []
    stock = LayerPages.decode

    def fails(self: LayerPages, *args: Any) -> Any:
        calls.append(0)
        if len(calls) == at + 1:
            raise torch.OutOfMemoryError("no room")
        return stock(self, *args)

    monkeypatch.setattr(LayerPages, "decode", fails)
    with pytest.raises(torch.OutOfMemoryError):
        steps(model, cache, ids, 62, 63)
    monkeypatch.setattr(LayerPages, "decode", stock)
    with pytest.raises(OutOfStepError):
        steps(model, cache, ids, 63, 64)


def test_a_retry_with_a_mask_says_that_layers_are_out_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = ua.enable(tiny("llama"), FULL), prompt(2, 70, padding=[0, 13])
    ids, mask = given["input_ids"], given["attention_mask"]
    cache = ua.UniqueCache(FULL)
    with torch.no_grad():
        model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
        model(ids[:, 60:61], attention_mask=mask[:, :61], past_key_values=cache)
        stock = model.model.layers[1].forward
        monkeypatch.setattr(model.model.layers[1], "forward", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 61:62], attention_mask=mask[:, :62], past_key_values=cache)
        monkeypatch.setattr(model.model.layers[1], "forward", stock)
        with pytest.raises(OutOfStepError):
            model(ids[:, 61:62], attention_mask=mask[:, :62], past_key_values=cache)


@pytest.mark.parametrize("method", ["directional", "unisparse"])
def test_all_of_the_sum_is_all_blocks(method: str) -> None:
    """Of sharp attention, whose shares are too small to count."""
    model = tiny("llama")
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data.mul_(16)
    ids = prompt(2, 900)["input_ids"]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        ua.enable(model, prefill=method, top_p=1.0, prefill_above=100)
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_written_to_uncounted(inference: bool) -> None:
    model = tiny("llama")
    ids = prompt(1, 100)["input_ids"]
    mask = torch.ones(100, 100).tril().bool()[None, None].clone()
    holes = mask.clone()
    holes[0, 0, 60:, 10:40] = False
    with torch.inference_mode(inference), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(ids, attention_mask=holes, use_cache=False).logits
        ua.enable(model, prefill="directional", prefill_above=32)
        model(ids, attention_mask=mask, use_cache=False)
        mask.numpy()[0, 0, 60:, 10:40] = False
        got = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_chunk_that_ends_before_a_row_begins() -> None:
    model, given = tiny("llama"), prompt(3, 130, padding=[0, 60, 100])
    want = model.generate(**given, max_new_tokens=8, do_sample=False, prefill_chunk_size=45)
    ua.enable(model, replace(EXACT, prefill_above=20))
    with ua.record_prefill(model) as records, warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model.generate(**given, max_new_tokens=8, do_sample=False, prefill_chunk_size=45)
    assert torch.equal(got, want)
    assert {record.row for record in records} == {0, 1, 2}


def test_a_short_row_beside_a_long_one_is_dense() -> None:
    model, given = tiny("llama"), prompt(2, 900, padding=[0, 500])
    with torch.no_grad():
        want = model(**given).logits[1, 500:]
        ua.enable(model, prefill="directional", threshold=0.9, prefill_above=450)
        with ua.record_prefill(model) as records:
            got = model(**given).logits[1, 500:]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert {record.row for record in records} == {0}


def test_rows_that_are_long_by_padding_alone_are_dense() -> None:
    """As stock computes them, not by blocks of which all are kept."""
    model, given = tiny("llama"), prompt(2, 900, padding=[500, 600])
    with torch.no_grad():
        want = model(**given).logits[:, 600:]
        ua.enable(model, prefill="directional", threshold=0.9, prefill_above=450)
        with ua.record_prefill(model) as records:
            got = model(**given).logits[:, 600:]
    assert torch.equal(got, want)
    assert not records


def test_holes_under_drafts_are_said() -> None:
    model, given = ua.enable(tiny("llama"), FULL), prompt(1, 90)
    given["attention_mask"][0, 20:25] = 0
    ids, mask, cache = given["input_ids"], given["attention_mask"], ua.UniqueCache(FULL)
    with torch.no_grad():
        model(ids[:, :80], attention_mask=mask[:, :80], past_key_values=cache)
        with pytest.warns(UserWarning, match="hides tokens in the middle"):
            model(ids[:, 80:84], attention_mask=mask[:, :84], past_key_values=cache)


@pytest.mark.skipif(
    not hasattr(StaticLayer(8), "cumulative_length"), reason="static caches have pages from transformers 5 on"
)
def test_chunks_on_a_short_static_cache_are_sparse() -> None:
    model, ids = ua.enable(tiny("llama"), replace(EXACT, prefill_above=20)), prompt(1, 200)["input_ids"]
    with ua.record_prefill(model) as records:
        model.generate(ids, max_new_tokens=2, cache_implementation="static", prefill_chunk_size=70)
    assert len(records) == 3 * 3


def test_a_cache_that_lived_through_disable() -> None:
    model, ids = tiny("llama"), prompt(1, 70)["input_ids"]
    want = steps(model, None, ids, 0, 64)[:, -1]
    cache = ua.UniqueCache(FULL)
    steps(ua.enable(model, FULL), cache, ids, 0, 60, 61)
    ua.disable(model)
    steps(model, cache, ids, 61, 62)
    ua.enable(model, FULL)
    with ua.record_selection(model) as records:
        got = steps(model, cache, ids, 62, 63, 64)
    assert len(records) == 6
    torch.testing.assert_close(got[:, -1], want, rtol=1e-4, atol=1e-4)


def test_a_cache_of_the_user_beside_a_graphed_decoder() -> None:
    model, given = ua.enable(tiny("llama"), FULL), prompt(1, 40)
    decoder = ua.GraphedDecoder(model, batch=1, max_length=100)
    with pytest.raises(ValueError, match="expected none with a GraphedDecoder"):
        model.generate(**given, max_new_tokens=4, past_key_values=ua.UniqueCache(FULL), custom_generate=decoder)


def test_a_tree_of_several_levels_does_not_last() -> None:
    """Its second level hides stored drafts of the first one, as a hole would."""
    model, ids = tiny("llama"), prompt(1, 80)["input_ids"]
    want = steps(model, None, ids, 0, 64)[:, -1]
    ua.enable(model, FULL)
    cache = ua.UniqueCache(FULL)
    steps(model, cache, ids, 0, 60, 61)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for level in range(3):
            length = 63 + 2 * level
            mask = torch.ones(1, 1, 2, length, dtype=torch.bool)
            for query in range(2):
                mask[0, 0, query, 61 + (1 - query) :: 2] = False
            model(ids[:, length - 2 : length], attention_mask=mask, past_key_values=cache)
        cache.crop(-6)
        with ua.record_selection(model) as records:
            got = model(ids[:, 61:64], past_key_values=cache).logits[:, -1]
    assert len(records) == 3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_disabled_after_a_call_that_failed() -> None:
    model, ids = ua.enable(tiny("llama"), FULL), prompt(1, 70)["input_ids"]
    cache = ua.UniqueCache(FULL)
    steps(model, cache, ids, 0, 60, 61)
    with pytest.raises(IndexError):
        steps(model, cache, torch.full_like(ids, 10**6), 61, 62)
    steps(ua.disable(model), cache, ids, 61, 62)
    with ua.record_selection(ua.enable(model, FULL)) as records:
        steps(model, cache, ids, 62, 63, 64)
    assert len(records) == 6
