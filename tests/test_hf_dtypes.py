"""Mixed dtypes: autocast over models of every dtype, models that are cast, torch's default device and dtype."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import ALWAYS_SPARSE, SMALL, VOCAB, generate, layers_on_pages, prompt, tiny
from op_cases import DEVICES

import unique_attn as ua

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["even", "padded"])
@pytest.mark.parametrize("auto", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16 model", "fp16 model"])
def test_autocast_agrees_with_stock_under_autocast(device: str, padding: Any, auto: Any, dtype: Any) -> None:
    """On pages. At most twice the error of stock attention in the same precision."""
    inputs = {name: x.to(device) for name, x in prompt(padding=padding).items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def steps(model: Any) -> tuple[torch.Tensor, Any]:
        cache, out, begin = None, [], 0
        with torch.no_grad():
            for end in (34, 35, 36, 39, 40):
                result = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
                cache, begin = result.past_key_values, end
                out.append(result.logits)
        return torch.cat(out, 1).float(), cache

    exact, _ = steps(tiny(dtype=torch.float64).to(device))
    with torch.autocast(device, dtype=auto):
        stock, _ = steps(tiny(dtype=dtype).to(device))
        ours, cache = steps(ua.enable(tiny(dtype=dtype).to(device), ALWAYS_SPARSE))
        assert all(layers_on_pages(cache))
        assert cache.layers[0]._pages.k.dtype == auto
    shown = mask.bool()
    assert (ours - exact)[shown].abs().max() <= 2 * (stock - exact)[shown].abs().max()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "eos_token_id": VOCAB}])
def test_generate_under_autocast(settings: dict[str, Any]) -> None:
    batch = 1 if "prompt_lookup_num_tokens" in settings else 2
    inputs = prompt(batch, 50, [0, 9][:batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = generate(ua.enable(tiny(), SMALL), inputs, output_logits=False, **settings)
    assert all(layers_on_pages(output.past_key_values))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = generate(ua.enable(tiny(), ALWAYS_SPARSE), inputs, tokens=6, output_logits=False, **settings)
        expected = generate(tiny(), inputs, tokens=6, output_logits=False, **settings)
    assert torch.equal(output.sequences, expected.sequences)


def test_assisted_decoding_under_autocast() -> None:
    inputs = prompt(1, 50)
    settings = {"tokens": 6, "suppress_tokens": [0], "output_logits": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = generate(ua.enable(tiny(), ALWAYS_SPARSE), inputs, assistant_model=tiny(), **settings)
        expected = generate(tiny(), inputs, assistant_model=tiny(), **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(layers_on_pages(output.past_key_values))


def test_into_autocast_and_out_of_it() -> None:
    """A cache from before goes on inside, and one from inside goes on outside."""
    ids = prompt()["input_ids"]

    def run(model: Any) -> torch.Tensor:
        out = []
        with torch.no_grad():
            cache = model(ids[:, :30], use_cache=True).past_key_values
            for begin in range(30, 40):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=33 <= begin < 36):
                    out.append(model(ids[:, begin : begin + 1], past_key_values=cache).logits.float())
        return torch.cat(out, 1)

    exact, stock, ours = run(tiny(dtype=torch.float64)), run(tiny()), run(ua.enable(tiny(), ALWAYS_SPARSE))
    torch.testing.assert_close(ours[:, :3], stock[:, :3], rtol=2e-4, atol=2e-4)
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()


@pytest.mark.parametrize("on_pages", [True, False])
def test_a_model_that_is_cast_after_its_cache_was_filled(on_pages: bool) -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE if on_pages else ua.UniqueConfig())
    ids = prompt()["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_key_values
        model(ids[:, 30:31], past_key_values=cache)
        assert all(layers_on_pages(cache)) == on_pages
        model.bfloat16()
        with pytest.raises(
            ValueError, match=r"past_key_values: expected keys and values of the model's dtype, torch.bf"
        ):
            model(ids[:, 31:32], past_key_values=cache)


DEFAULTS = """
import sys
import torch
sys.path.insert(0, {tests!r})
from hf_helpers import ALWAYS_SPARSE, SMALL, generate, logits, prompt, tiny
import unique_attn as ua
device = {device!r}
inputs = {{name: x.to(device) for name, x in prompt(padding=[0, 9]).items()}}
model, stock = tiny().to(device), tiny().to(device)
torch.set_default_device(device)
torch.set_default_dtype({dtype})
ua.enable(model, ALWAYS_SPARSE)
for settings in ({{"num_beams": 2}}, {{}}):
    output, expected = (generate(each, inputs, **settings) for each in (model, stock))
    assert torch.equal(output.sequences, expected.sequences)
    assert all(layer.on_pages for layer in output.past_key_values.layers)
decoder = ua.GraphedDecoder(model, 2, 64)
assert torch.equal(decoder.generate(inputs["input_ids"], 12, inputs["attention_mask"]), expected.sequences)
ua.enable(model, SMALL, train=ua.TrainConfig(tau=2.0)).train()
loss = model(**inputs, labels=inputs["input_ids"]).loss
loss.backward()
print("ok", loss.dtype)
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_default_device_and_dtype(device: str, dtype: torch.dtype) -> None:
    """In a process of its own: they are torch's global state."""
    code = DEFAULTS.format(tests=str(Path(__file__).parent), device=device, dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "ok"
