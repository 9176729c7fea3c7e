"""The drop-in on a GPU: same results as stock attention there, and decode steps that never wait for the device."""

from __future__ import annotations

import pytest
import torch
from hf_helpers import ALWAYS_SPARSE, SMALL, assert_same, generate, layers_on_pages, prompt, tiny
from op_cases import needs_cuda

import unique_attn as ua

pytestmark = needs_cuda


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.filterwarnings("ignore:unique_attn:UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["even", "padded"])
def test_full_budget_gives_stock_logits(family, padding):
    inputs = on_gpu(prompt(padding=padding))
    expected = generate(tiny(family).cuda(), inputs)
    output = generate(ua.enable(tiny(family).cuda(), ALWAYS_SPARSE), inputs)
    assert_same(output, expected, tolerance=1e-3)
    assert any(layers_on_pages(output.past_key_values)) == (family != "gemma2")


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 20, "eos_token_id": 200}])
def test_small_budget_equals_the_cpu(mode):
    inputs = prompt(1, length=60)
    inputs["input_ids"][:, 20:] = inputs["input_ids"][:, :20].repeat(1, 2)
    settings = {"tokens": 20, "output_logits": False, **mode}
    expected = generate(ua.enable(tiny(), SMALL), inputs, **settings)
    output = generate(ua.enable(tiny().cuda(), SMALL), on_gpu(inputs), **settings)
    assert torch.equal(output.sequences.cpu(), expected.sequences)


def test_short_contexts_are_captured():
    inputs = on_gpu(prompt(length=10, padding=[0, 3]))
    model = ua.enable(tiny().cuda(), ua.UniqueConfig(budget=64))
    output = generate(model, inputs, tokens=20)
    assert all(layers_on_pages(output.past_key_values))
    assert_same(output, generate(tiny().cuda(), inputs, tokens=20), tolerance=1e-3)
    off = generate(ua.enable(tiny().cuda(), ua.UniqueConfig(budget=64, graphs="off")), inputs, tokens=20)
    assert torch.equal(torch.stack(output.logits), torch.stack(off.logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = on_gpu(prompt())
    exact = torch.stack(generate(tiny(dtype=torch.float32).cuda(), inputs, tokens=2).logits)[1]
    stock = torch.stack(generate(tiny(dtype=dtype).cuda(), inputs, tokens=2).logits)[1].float()
    output = generate(ua.enable(tiny(dtype=dtype).cuda(), ALWAYS_SPARSE), inputs, tokens=2)
    assert all(layers_on_pages(output.past_key_values))
    error = (torch.stack(output.logits)[1].float() - exact).abs().max()
    assert error <= 2 * (stock - exact).abs().max() + 1e-3


def test_steps_do_not_wait_for_the_device():
    """Over a page border and a block border, with a padding mask that a step must not look at."""
    model = ua.enable(tiny().cuda(), SMALL)
    ids, mask = on_gpu(prompt(padding=[0, 9], length=80)).values()
    masks = [mask[:, :end].contiguous() for end in range(81)]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model(ids[:, :40], attention_mask=masks[40], use_cache=True).past_key_values
        model(ids[:, 40:41], attention_mask=masks[41], past_key_values=cache)  # turns to pages
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for end in range(42, 80):
                model(
                    ids[:, end - 1 : end],
                    attention_mask=masks[end],
                    position_ids=positions[:, end - 1 : end],
                    past_key_values=cache,
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(layers_on_pages(cache))
    assert cache.layers[0].seq_lens.tolist() == [79, 70]


def test_holes_in_later_masks_are_reported():
    """On a GPU, the masks of steps are checked in the background."""
    model = ua.enable(tiny().cuda(), SMALL)
    ids, mask = on_gpu(prompt(padding=[0, 9], length=80)).values()

    def step(end):
        model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        torch.cuda.synchronize()

    with torch.no_grad():
        cache = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
        for end in range(41, 50):
            step(end)
        mask[0, 20] = 0
        step(50)  # wrong, but nobody waited to see that
        with pytest.raises(ValueError, match="attention_mask: expected the left padding to stay as it was"):
            step(51)
