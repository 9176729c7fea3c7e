"""Prompts that stay dense though the settings ask for sparse prefill: as one expects, or with one named warning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hf_helpers import SHAPE, prompt, run_and_collect, tiny
from hf_prefill_cases import CLOSE, EXACT, SPARSE, enabled, score
from transformers import AutoModelForCausalLM, DynamicCache

import unique_attn as ua
from unique_attn.hf import attention, compat, masks


@pytest.fixture(autouse=True)
def _fresh_warnings():
    compat._warned.clear()


# ---- What is dense as one expects. ----


def stays_stock(model, inputs, count: int = 0, **kwargs: Any) -> list[str]:
    """The warnings of a call whose result is that of stock attention."""
    with ua.record_prefill(model) as records:
        output, messages = run_and_collect(lambda: score(model, inputs, **kwargs))
    assert len(records) == count
    torch.testing.assert_close(output, score(tiny(), inputs), **CLOSE)
    return messages


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"prefill_above": 200},
        {"dense_layers": (0, 1, 2)},
        {"max_decode_tokens": 200},
        {"prefill": "dense", "threshold": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_quietly_dense(fields, use_cache):
    assert stays_stock(enabled(replace(SPARSE, **fields)), prompt(length=200), use_cache=use_cache) == []


def test_limits():
    for fields, count in (({"prefill_above": 199}, 3), ({"max_decode_tokens": 199}, 3), ({"dense_layers": (1,)}, 2)):
        model = enabled(replace(EXACT, **fields))
        assert stays_stock(model, prompt(1, length=200), count) == []


def test_training_is_dense():
    ids = prompt(length=200)["input_ids"]
    grads = []
    for model in (enabled().train(), tiny().train()):
        _, messages = run_and_collect(lambda model=model: model(ids, labels=ids, use_cache=False).loss.backward())
        assert messages == []
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_traced_model_is_dense():
    model, inputs = enabled(), prompt(length=200)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    torch.testing.assert_close(score(compiled, inputs, use_cache=False), score(tiny(), inputs), **CLOSE)


# ---- What is dense by name. ----


def test_holes_in_the_mask():
    inputs = prompt(length=200)
    inputs["attention_mask"][0, 50:60] = 0
    message = "LlamaAttention is dense in this call: the attention mask of a prompt is not causal with left padding"
    assert stays_stock(enabled(), inputs) == [f"unique_attn: {message}"]


def test_large_masks_are_looked_at_in_parts(monkeypatch):
    padding = torch.tensor([0, 15])
    for tokens, length in ((50, 50), (31, 50), (1, 50)):
        good = masks.causal_mask(padding, tokens, length)
        for size in (1, 400, 1 << 20):
            monkeypatch.setattr(masks, "_MASK_BYTES", size)
            assert masks.hidden_left(good, 2, tokens, length) == [0, 15]
            for place in ((0, 0, 0, 3), (1, 0, tokens // 2, 20), (1, 0, -1, 20), (1, 0, 0, 13)):
                wrong = good.clone()
                wrong[place] = ~wrong[place]
                assert masks.hidden_left(wrong, 2, tokens, length) is None


def test_right_padding():
    inputs = prompt(length=200)
    inputs["attention_mask"][0, 150:] = 0
    (message,) = stays_stock(enabled(), inputs)
    assert "not causal with left padding" in message


@pytest.mark.filterwarnings("ignore:.*output_attentions.*:UserWarning")
def test_output_attentions():
    model, ids = enabled(), prompt(length=200)["input_ids"]
    with torch.no_grad():
        output, messages = run_and_collect(lambda: model(ids, output_attentions=True))
        expected = tiny(implementation="eager")(ids, output_attentions=True)
    torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(output.attentions[2], expected.attentions[2], rtol=1e-4, atol=1e-5)
    assert messages == ["unique_attn: LlamaAttention is dense in this call: output_attentions needs all weights"]


class _OtherCache(DynamicCache):
    """A cache of another make."""


@torch.no_grad()
def test_caches_of_other_makes():
    """What begins there is a whole prompt; what continues it is dense."""
    ids = prompt(1, length=300)["input_ids"]
    model, caches = enabled(EXACT), [_OtherCache(), DynamicCache()]
    with ua.record_prefill(model) as records:
        for part in ids.split([200, 100], 1):
            output, messages = run_and_collect(lambda part=part: model(part, past_key_values=caches[0]).logits)
            torch.testing.assert_close(output, tiny()(part, past_key_values=caches[1]).logits, **CLOSE)
    assert [x.num_keys for x in records] == [200] * 3
    (message,) = messages
    assert "its keys are not those of a layer of a DynamicCache" in message


def test_head_dim_that_the_ops_do_not_take():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, "head_dim": 20})
    model = AutoModelForCausalLM.from_config(config).eval()
    inputs = prompt(length=200)
    expected = score(model, inputs)
    output, messages = run_and_collect(lambda: score(ua.enable(model, SPARSE), inputs))
    torch.testing.assert_close(output, expected, **CLOSE)
    assert messages == ["unique_attn: LlamaAttention stays dense: its head dim 20 is not a multiple of 8 up to 256"]


def test_packed_sequences():
    """Stock attention does not look at these, and neither do we."""
    inputs = prompt(1, length=200)
    bounds = torch.tensor([0, 150, 200], dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 150, "max_length_k": 150}
    messages = stays_stock(enabled(), inputs, **packing)
    assert messages == ["unique_attn: LlamaAttention is dense in this call: it is told where packed sequences begin"]


@torch.no_grad()
def test_packed_position_ids():
    """Without a cache, transformers makes a mask of them."""
    ids, positions = prompt(1, length=200)["input_ids"], torch.cat([torch.arange(150), torch.arange(50)])[None]
    call = {"position_ids": positions, "use_cache": False}
    output, messages = run_and_collect(lambda: enabled()(ids, **call).logits)
    torch.testing.assert_close(output, tiny()(ids, **call).logits, **CLOSE)
    (message,) = messages
    assert "not causal with left padding" in message


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dropout": 0.5}, "is dense in this call: it uses dropout"),
        ({"is_causal": False}, "is dense in this call: it is not causal"),
        ({"softcap": 50.0}, "stays dense: it softcaps its logits"),
        ({"of_the_caller": 1}, "is dense in this call: unique_attn does not know what of_the_caller would change"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_calls_that_ask_for_more(monkeypatch, call, reason):
    asked = []
    monkeypatch.setattr(attention, "dense_attention", lambda *args: asked.append(args))
    module = enabled().model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    _, messages = run_and_collect(lambda: attention.unique_attention_forward(module, q, kv, kv, None, **call))
    assert len(asked) == 1
    assert messages == [f"unique_attn: LlamaAttention {reason}"]


def test_a_model_that_shares_its_config_with_an_enabled_one():
    config = tiny().config
    one, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    inputs = prompt(length=200)
    before = score(other, inputs)
    ua.enable(one, SPARSE)
    after, messages = run_and_collect(lambda: score(other, inputs))
    assert torch.equal(after, before)
    assert messages == [
        "unique_attn: LlamaAttention stays dense: a model that shares its config was enabled, and its own was not"
    ]
