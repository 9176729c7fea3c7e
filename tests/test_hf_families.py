"""With a budget that covers the context, every family must reproduce its stock logits; sparse layers really run."""

from __future__ import annotations

import pytest
import torch
from hf_helpers import ALWAYS_SPARSE, CONFIGS, assert_same, generate, layers_on_pages, logits, prompt, tiny

import unique_attn as ua

# Which layers turn to pages.
SPARSE = {
    "llama": [True] * 3,
    "qwen2-window": [False, True, True],
    "mistral-window": [False, False],
    "gemma2": [False, False],  # softcap
    "gemma3": [False, True, True],
    "gpt-oss": [False, True, True],
}


@pytest.mark.filterwarnings("ignore:unique_attn:UserWarning")
@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["even", "padded"])
@pytest.mark.parametrize("family", CONFIGS)
def test_full_budget_gives_stock_logits(family, padding):
    inputs = prompt(padding=padding)
    expected = generate(tiny(family), inputs)
    model = ua.enable(tiny(family), ALWAYS_SPARSE)
    if model.config._attn_implementation != "unique":  # eager only up to some version, so it keeps its own attention
        assert family == "gemma2"
        assert_same(generate(model, inputs), expected, tolerance=0)
        return
    with ua.record_selection(model) as records:
        output = generate(model, inputs)
    assert_same(output, expected)
    sparse = SPARSE.get(family, [True, True])
    assert layers_on_pages(output.past_key_values) == sparse
    assert len(records) == sum(sparse) * 11  # every decode step of every sparse layer
    assert {record.layer_idx for record in records} == {i for i, on in enumerate(sparse) if on}


@pytest.mark.filterwarnings("ignore:unique_attn:UserWarning")
@pytest.mark.parametrize("family", ["gpt-oss", "gemma3", "qwen3"])
@pytest.mark.parametrize("tokens", [3, 21])
def test_several_tokens_at_once(family, tokens):
    """As in the verification of drafts: each query token of a call sees what it may see, and no more."""
    inputs = prompt(padding=[0, 9], length=40 + tokens)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def run(model):
        with torch.no_grad():
            first = model(ids[:, :38], attention_mask=mask[:, :38], use_cache=True)
            one = model(ids[:, 38:39], attention_mask=mask[:, :39], past_key_values=first.past_key_values)
            return model(ids[:, 39:], attention_mask=mask, past_key_values=one.past_key_values)

    expected = run(tiny(family))
    output = run(ua.enable(tiny(family), ALWAYS_SPARSE))
    torch.testing.assert_close(output.logits, expected.logits, rtol=2e-4, atol=2e-4)
    assert any(layers_on_pages(output.past_key_values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    inputs = prompt()
    exact = logits(generate(tiny(dtype=torch.float64), inputs, tokens=2))[1].double()
    stock_error = (logits(generate(tiny(dtype=dtype), inputs, tokens=2))[1].double() - exact).abs().max()
    model = ua.enable(tiny(dtype=dtype), ALWAYS_SPARSE)
    output = generate(model, inputs, tokens=2)
    assert all(layers_on_pages(output.past_key_values))
    # The usual yardstick: at most twice the error of a PyTorch run in the same precision.
    assert (logits(output)[1].double() - exact).abs().max() <= 2 * stock_error + 1e-9


@pytest.mark.parametrize("rule", ["mean", "unique", "directional", "minmax"])
@pytest.mark.parametrize("page_size", [4, 64])
def test_every_rule(rule, page_size):
    inputs = prompt(length=70)
    config = ua.UniqueConfig(rule=rule, page_size=page_size, budget=128, dense_below=0, block_size=64)
    assert_same(generate(ua.enable(tiny(), config), inputs), generate(tiny(), inputs))
