"""Everything on the second GPU while the first is the current device, on both at once, and a model split over them."""

from __future__ import annotations

import pytest
import torch
from hf_helpers import ALWAYS_SPARSE, SMALL, assert_same, generate, layers_on_pages, prompt, tiny
from hf_training_cases import SOFT, step

import unique_attn as ua

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 CUDA devices on this machine")

DEVICE = "cuda:1"


def there(padding: list[int] | None = None, length: int = 40) -> dict[str, torch.Tensor]:
    return {name: x.to(DEVICE) for name, x in prompt(padding=padding, length=length).items()}


@pytest.fixture(autouse=True)
def _the_first_stays_current() -> object:
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


@pytest.fixture
def first_unused() -> object:
    before = torch.cuda.memory_allocated(0)
    yield
    assert torch.cuda.memory_allocated(0) - before < 1 << 20


@pytest.mark.usefixtures("first_unused")
@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["even", "padded"])
def test_generate(padding: list[int] | None) -> None:
    output = generate(ua.enable(tiny().to(DEVICE), ALWAYS_SPARSE), there(padding))
    assert_same(output, generate(tiny().to(DEVICE), there(padding)), tolerance=1e-3)
    assert all(layers_on_pages(output.past_key_values))


@pytest.mark.usefixtures("first_unused")
@pytest.mark.parametrize("padding", [None, [9, 0]], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_graphed_decoder(family: str, padding: list[int] | None) -> None:
    model, inputs = ua.enable(tiny(family).to(DEVICE), SMALL), there(padding)
    decoder = ua.GraphedDecoder(model, 2, 100)
    for _ in range(2):  # captured, then replayed from the start
        got = decoder.generate(inputs["input_ids"], 40, inputs["attention_mask"])
        wanted = model.generate(**inputs, do_sample=False, max_new_tokens=40, pad_token_id=0)
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("first_unused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(dtype: torch.dtype) -> None:
    on_gpu, on_cpu = (ua.enable(tiny(), SMALL, train=SOFT).train() for _ in range(2))
    inputs = prompt(padding=[0, 9])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss, grads = step(on_gpu.to(DEVICE), **{k: x.to(DEVICE) for k, x in inputs.items()}, labels=labels.to(DEVICE))
    expected, expected_grads = step(on_cpu, **inputs, labels=labels)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-3, atol=1e-3)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.cpu(), expected_grads[name], rtol=1e-2, atol=1e-3)
    if dtype == torch.bfloat16:  # the kernels for 16 bits
        assert step(on_gpu.to(dtype), **{k: x.to(DEVICE) for k, x in inputs.items()})[0].isfinite()


def test_a_model_split_over_both() -> None:
    """As ``device_map`` does: the layers of one cache are on two devices."""
    accelerate = pytest.importorskip("accelerate")
    inputs = {name: x.cuda() for name, x in prompt(padding=[0, 9]).items()}
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1}
    places |= {"model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    model = accelerate.dispatch_model(ua.enable(tiny(), SMALL), places, main_device=0)
    expected = generate(ua.enable(tiny().cuda(), SMALL), inputs)
    for settings in ({}, {"num_beams": 2}):
        output = generate(model, inputs, tokens=30, **settings)
        assert all(layers_on_pages(output.past_key_values))
        assert [layer._pages.device.index for layer in output.past_key_values.layers] == [0, 1, 1]
    assert_same(generate(model, inputs), expected, tolerance=1e-3)
    with pytest.raises(ValueError, match="model: expected all weights on one device, got cuda:0, cuda:1"):
        ua.GraphedDecoder(model, 2, 64)
