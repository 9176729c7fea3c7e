"""GraphedDecoder against model.generate() with the same settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_helpers import SMALL, prompt, tiny
from op_cases import DEVICES, needs_cuda

import unique_attn as ua
from unique_attn.hf.graphed import GraphedDecoder, sampler

FAMILIES = ["llama", "llama-mha", "qwen2", "qwen3", "qwen2-window", "mistral-window", "gemma3", "gpt-oss"]


def expected(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    return model.generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0)


@pytest.mark.filterwarnings("ignore:unique_attn:UserWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [None, [9, 0]], ids=["even", "padded"])
def test_equals_generate(device: str, family: str, padding: list[int] | None) -> None:
    """From before the budget is full until long after, across pages and blocks."""
    model = ua.enable(tiny(family).to(device), SMALL).eval()
    if family == "gpt-oss" and device == "cuda":  # products of groups in fp32 copy their offsets to the host
        model.set_experts_implementation("batched_mm")
    inputs = {name: x.to(device) for name, x in prompt(2, 20, padding).items()}
    decoder = GraphedDecoder(model, batch=2, max_length=100)
    got = decoder.generate(inputs["input_ids"], 60, inputs["attention_mask"] if padding else None)
    torch.testing.assert_close(got, expected(model, inputs, 60), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", [None, [9, 0]], ids=["even", "padded"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 20},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
    ],
    ids=["greedy", "processors", "sampling"],
)
def test_model_generate_runs_it(device: str, padding: list[int] | None, settings: dict[str, Any]) -> None:
    """``custom_generate`` is transformers' way to bring a decoding loop."""
    model = ua.enable(tiny().to(device), SMALL).eval()
    inputs = {name: x.to(device) for name, x in prompt(2, 20, padding).items()}
    free = model.generate(**inputs, max_new_tokens=40, pad_token_id=0, do_sample=False)
    settings = {**settings, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": int(free[0, 45])}
    decoder = ua.GraphedDecoder(model, batch=2, max_length=60)
    torch.manual_seed(5)
    wanted = model.generate(**inputs, **settings)
    torch.manual_seed(5)
    got = model.generate(**inputs, **settings, custom_generate=decoder)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_model_generate_is_refused_what_it_does_not_do() -> None:
    model = ua.enable(tiny(), SMALL).eval()
    inputs = prompt(2, 20)
    decoder = ua.GraphedDecoder(model, batch=2, max_length=40)
    for settings, complaint in (
        ({"return_dict_in_generate": True}, "return_dict_in_generate: expected False"),
        ({"max_new_tokens": 22}, "max_new_tokens: expected at most 41 tokens with the prompt, got 42"),
        ({"use_cache": False}, "use_cache: expected True"),
    ):
        with pytest.raises(ValueError, match=complaint):
            model.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False, **settings}, custom_generate=decoder)
    other = ua.enable(tiny(), SMALL).eval()
    with pytest.raises(ValueError, match="model: expected the model that"):
        other.generate(**inputs, max_new_tokens=5, custom_generate=decoder)
    assert model.generate(**inputs, max_new_tokens=21, do_sample=False, custom_generate=decoder).shape == (2, 41)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compressed_index(device: str) -> None:
    model = ua.enable(tiny().to(device), replace(SMALL, index_format="compressed")).eval()
    inputs = {name: x.to(device) for name, x in prompt(2, 50).items()}
    got = ua.GraphedDecoder(model, batch=2, max_length=120).generate(inputs["input_ids"], 40)
    torch.testing.assert_close(got, expected(model, inputs, 40), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_is_used_again_with_other_prompts(device: str) -> None:
    model = ua.enable(tiny().to(device), SMALL).eval()
    decoder = GraphedDecoder(model, batch=2, max_length=90)
    for length in (50, 7, 31):
        inputs = {name: x.to(device) for name, x in prompt(2, length, seed=length).items()}
        got = decoder.generate(inputs["input_ids"], 30)
        torch.testing.assert_close(got, expected(model, inputs, 30), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_give_logits_and_count(device: str) -> None:
    model = ua.enable(tiny().to(device), SMALL).eval()
    ids = prompt(1, 10)["input_ids"].to(device)
    decoder = GraphedDecoder(model, batch=1, max_length=13)
    assert decoder.prefill(ids).shape == (1, 1)
    for _ in range(3):
        token = decoder.step()
        assert torch.equal(token[:, 0], decoder.logits.argmax(-1))
    assert decoder.cache.seq_lens.tolist() == [13]
    with pytest.raises(RuntimeError, match="max_length = 13 tokens are reached"):
        decoder.step()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("several", [False, True])
def test_stops_where_every_row_has_ended(device: str, several: bool) -> None:
    """As ``generate`` does: rows that have ended are padded, and nothing follows the end of the last one."""
    model = ua.enable(tiny().to(device), SMALL).eval()
    ids = prompt(2, 12)["input_ids"].to(device)
    decoder = GraphedDecoder(model, batch=2, max_length=60)
    new = decoder.generate(ids, 40)[:, 12:]
    eos = [int(new[0, 5]), int(new[1, 9])] if several else int(new[0, 5])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": eos, "pad_token_id": 3}
    wanted = model.generate(ids, **settings)
    for every in (1, 4, 100):
        got = decoder.generate(ids, 40, eos_token_id=eos, check_every=every, pad_token_id=3)
        assert torch.equal(got, wanted)
    model.generation_config.pad_token_id = 5
    assert torch.equal(decoder.generate(ids, 40, eos_token_id=eos), wanted.masked_fill(wanted == 3, 5))


@pytest.mark.parametrize("device", DEVICES)
def test_samples_from_the_softmax(device: str) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], device=device).expand(20000, -1)
    drawn = sampler(temperature=0.5, top_k=3)(logits).bincount(minlength=4) / 20000
    wanted = torch.tensor([0.0, 2.0, 4.0, -torch.inf], device=device).softmax(-1)
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_dense_layers_read_everything(device: str) -> None:
    model = ua.enable(tiny().to(device), replace(SMALL, dense_layers=(0, 1, 2))).eval()
    inputs = {name: x.to(device) for name, x in prompt(2, 60).items()}
    got = GraphedDecoder(model, batch=2, max_length=100).generate(inputs["input_ids"], 20)
    torch.testing.assert_close(got, expected(ua.disable(model), inputs, 20), rtol=0, atol=0)


def test_refuses_what_it_cannot_do() -> None:
    model = tiny()
    with pytest.raises(TypeError, match="expected a model from"):
        GraphedDecoder(model, 1, 10)
    ua.enable(model, SMALL)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        GraphedDecoder(model, 0, 10)
    decoder = GraphedDecoder(model, 2, 10)
    with pytest.raises(RuntimeError, match="expected a prefill"):
        decoder.step()
    ids = prompt(2, 10)["input_ids"]
    with pytest.raises(ValueError, match="input_ids: expected shape"):
        decoder.prefill(ids[:1])
    with pytest.raises(ValueError, match="fewer than max_length = 10"):
        decoder.prefill(ids)
    with pytest.raises(ValueError, match="attention_mask: expected padding on the left"):
        decoder.prefill(ids[:, :5], torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="max_new_tokens: expected 1 to"):
        decoder.generate(ids[:, :5], 7)
    with pytest.raises(ValueError, match="temperature"):
        sampler(temperature=0)


@needs_cuda
def test_a_step_allocates_nothing_and_does_not_wait() -> None:
    model = ua.enable(tiny().cuda(), SMALL).eval()
    decoder = GraphedDecoder(model, 2, 200)
    decoder.prefill(prompt(2, 30)["input_ids"].cuda())
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
