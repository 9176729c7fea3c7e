"""Decode steps of plain generate() from captured steps: on CUDA in graphs, here as the same steps without one."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import captured_cases
import pytest
import torch
from captured_cases import OFF, generated, inputs_on, on, uncaptured
from hf_helpers import SMALL, WINDOW, prompt
from op_cases import DEVICES

pytest.importorskip("transformers")

import transformers
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import unique_attn as ua
from unique_attn.hf import captured, step_graph

WINDOWS = ["qwen2-window", "gemma3", "gpt-oss"]
pytestmark = pytest.mark.filterwarnings("ignore:unique_attn:UserWarning")
steps = captured_cases.steps  # the fixture


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", [None, [9, 0]], ids=["even", "padded"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.5, "min_new_tokens": 20},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=["greedy", "processors", "sampling", "beams", "beam-sampling"],
)
def test_equals_uncaptured(device: str, padding: list[int] | None, settings: dict[str, Any], steps: list[int]) -> None:
    """Bit for bit, logits and scores included."""
    model, inputs = on(device), inputs_on(device, padding=padding)
    settings = {**settings, "return_dict_in_generate": True, "output_scores": True}
    torch.manual_seed(3)
    wanted = uncaptured(model, inputs, **settings)
    assert steps == [0, 0]
    for _ in range(2):
        torch.manual_seed(3)
        got = generated(model, inputs, **settings)
        assert torch.equal(got.sequences, wanted.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.scores, wanted.scores, strict=True))
    assert steps[1] >= 30


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize(("length", "padding"), [(20, None), (WINDOW - 1, [9, 0]), (WINDOW, None), (100, [9, 0])])
def test_layers_with_a_window(
    device: str, family: str, length: int, padding: list[int] | None, steps: list[int]
) -> None:
    """Their tokens are in rings of blocks. Stock attention sums in another order."""
    model, inputs = on(device, family), inputs_on(device, length=length, padding=padding)
    settings = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 60}
    wanted = uncaptured(model, inputs, **settings)
    for _ in range(2):
        got = generated(model, inputs, **settings)
        assert torch.equal(got.sequences, wanted.sequences)
        for a, b in zip(got.logits, wanted.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert steps[1] > 100
    assert all(
        layer.keys.shape == other.keys.shape
        for layer, other in zip(got.past_key_values.layers, wanted.past_key_values.layers, strict=True)
    )
    for layer, other in zip(got.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        for row, pad in enumerate(padding or [0, 0]):
            begin = max(0, pad - (length + 59 - layer.keys.shape[2]))
            torch.testing.assert_close(layer.keys[row, :, begin:], other.keys[row, :, begin:], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="states are in caches of other kinds there")
@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "jamba"])
@pytest.mark.parametrize("beams", [1, 2])
def test_layers_with_states(family: str, beams: int, steps: list[int]) -> None:
    """Recurrent and convolutional states, which transformers 5 updates in place."""
    from families import build, families

    if family not in families():
        pytest.skip(f"no {family} in this version of transformers")
    model = ua.enable(build(family), SMALL)
    inputs = prompt(2, 20, [3, 0])
    settings = {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    wanted = uncaptured(model, inputs, **settings)
    for _ in range(2):
        got = generated(model, inputs, **settings)
        assert torch.equal(got.sequences, wanted.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.scores, wanted.scores, strict=True))
    assert steps[1] > 60


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "opt",
        "phi3",
        "cohere2",
        "gpt_oss",
        "gemma3",
        "qwen2_vl",
        "llava",
        "bamba",
        "nemotron_h",
        "llama4_text",
    ],
)
def test_families(family: str, steps: list[int]) -> None:
    """Padded prompts, images where there are some; what cannot be captured runs as it did."""
    from families import build, families
    from family_cases import generate
    from family_images import inputs

    if family not in families():
        pytest.skip(f"no {family} in this version of transformers")
    model = build(family)
    given = dataclasses.replace(inputs(model), new_tokens=14)
    found = []
    for config in (OFF, SMALL):
        ua.enable(model, config)
        torch.manual_seed(0)
        found.append(generate(model, given, beams=1))
    assert torch.equal(found[0]["sequences"], found[1]["sequences"])
    if "logits" in found[0]:
        torch.testing.assert_close(found[1]["logits"], found[0]["logits"], rtol=1e-3, atol=1e-4)
    assert steps[1] > 0 or family in ("llama4_text", "qwen2_vl") or int(transformers.__version__.split(".")[0]) < 5


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_a_step_that_fails_its_check_is_repeated(
    family: str, steps: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it wrote meanwhile is gone."""
    from families import build, families

    if family not in families():
        pytest.skip(f"no {family} in this version of transformers")
    model, inputs = ua.enable(build(family), SMALL), prompt(2, 40)
    wanted = uncaptured(model, inputs, return_dict_in_generate=True, output_logits=True)
    make = step_graph.StepGraph.__init__

    def wrong(self: Any, model: Any, forward: Any, call: Any, *args: Any) -> None:
        call.tensors["input_ids"].add_(1)
        make(self, model, forward, call, *args)
        call.tensors["input_ids"].sub_(1)

    monkeypatch.setattr(step_graph.StepGraph, "__init__", wrong)
    with caplog.at_level(logging.WARNING, logger="unique_attn"):
        got = generated(model, inputs, return_dict_in_generate=True, output_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))
    assert steps[1] == 0
    assert "on pages alone it computes something else" in caplog.text or steps[0] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_dense_layers_are_captured(device: str, steps: list[int]) -> None:
    model = on(device, config=ua.UniqueConfig.from_dict({**SMALL.to_dict(), "dense_layers": [1]}))
    inputs = inputs_on(device)
    wanted = uncaptured(model, inputs)
    assert torch.equal(generated(model, inputs), wanted)
    assert steps[1] > 30


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_serves_calls_of_a_kind(device: str, steps: list[int]) -> None:
    model, inputs = on(device), inputs_on(device)
    generated(model, inputs)
    made = steps[0]
    for length in (18, 20, 25):
        generated(model, inputs_on(device, length=length), max_new_tokens=30)
    assert steps[0] == made
    generated(model, inputs_on(device, batch=3))
    assert steps[0] > made


@pytest.mark.parametrize("device", DEVICES)
def test_wider_block_tables(device: str, steps: list[int]) -> None:
    """A step from which on a block table is wider runs in another graph."""
    model, inputs = on(device), inputs_on(device, padding=[9, 0])
    wanted = uncaptured(model, inputs, max_new_tokens=150)
    assert torch.equal(generated(model, inputs, max_new_tokens=150), wanted)
    assert steps[0] >= 2
    assert steps[1] > 130


@pytest.mark.parametrize("device", DEVICES)
def test_a_kept_cache_goes_on(device: str, steps: list[int]) -> None:
    """Longer prompts on a cache of before, forks, crops, and other calls in between."""
    model, inputs = on(device), inputs_on(device)

    def run() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        first = generated(model, inputs, past_key_values=cache, max_new_tokens=30)
        longer = torch.cat([first, first[:, :7]], 1)
        fork = copy.deepcopy(cache)
        second = model.generate(
            longer, attention_mask=torch.ones_like(longer), past_key_values=cache, max_new_tokens=20, do_sample=False
        )
        third = model.generate(
            longer, attention_mask=torch.ones_like(longer), past_key_values=fork, max_new_tokens=25, do_sample=False
        )
        return [first, second, third]

    got = run()
    assert steps[1] > 60
    ua.enable(model, OFF)
    assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_forks_in_turn(device: str, family: str, steps: list[int]) -> None:
    """Two caches over the same blocks and rings, a token each in turn."""
    model, inputs = on(device, family), inputs_on(device)

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        model(**inputs, past_key_values=cache)
        caches, found, length = [cache], [], inputs["input_ids"].shape[1]
        for i in range(24):
            if i == 10:
                caches.append(copy.deepcopy(cache))
            for j, each in enumerate(caches):
                ids = torch.full((2, 1), 5 + i + 3 * j, device=device)
                positions = torch.full((2, 1), length + i, device=device)
                found.append(model(ids, position_ids=positions, past_key_values=each).logits)
        return found

    got = run()
    assert steps[1] > 20
    ua.enable(model, OFF)
    for a, b in zip(got, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_streamers_stops_and_ends(device: str, steps: list[int]) -> None:
    model, inputs = on(device), inputs_on(device, batch=1)
    free = uncaptured(model, inputs)

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.reshape(-1).tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((1,), input_ids.shape[1] >= 50, device=input_ids.device)

    streamer = Streamer()
    got = generated(model, inputs, streamer=streamer, stopping_criteria=StoppingCriteriaList([Stop()]))
    assert torch.equal(got, free[:, :50])
    assert streamer.tokens == [*free[0, :50].tolist(), -1]
    ends = [int(free[0, 45]), 10**6 - 1]
    assert torch.equal(generated(model, inputs, eos_token_id=ends), uncaptured(model, inputs, eos_token_id=ends))
    assert steps[1] > 20


@pytest.mark.parametrize("device", DEVICES)
def test_what_runs_uncaptured_is_said_once(
    device: str, steps: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = on(device), inputs_on(device)
    seen: list[int] = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *args: seen.append(1))
    with caplog.at_level(logging.WARNING, logger="unique_attn"):
        got = generated(model, inputs)
        generated(model, inputs)
    assert len(seen) == 80
    assert steps == [0, 0]
    said = [each.getMessage() for each in caplog.records]
    assert said == [
        "unique_attn: decode steps of LlamaForCausalLM run without a CUDA graph: a hook is on model.layers.0.mlp"
    ]
    hook.remove()
    assert torch.equal(generated(model, inputs), got)
    assert steps[1] > 30


@pytest.mark.parametrize("device", DEVICES)
def test_hidden_states_are_those_of_the_step(device: str, steps: list[int]) -> None:
    model, inputs = on(device), inputs_on(device)
    settings = {"return_dict_in_generate": True, "output_hidden_states": True}
    wanted = uncaptured(model, inputs, **settings)
    got = generated(model, inputs, **settings)
    assert steps[1] > 30
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(generated(model, inputs), got.sequences)


def test_rings_that_are_not_used_change_nothing(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer behind one with a window turns out to have a cache of another kind."""
    model, inputs = on("cpu", "qwen2-window"), inputs_on("cpu", length=40)
    wanted = uncaptured(model, inputs, return_dict_in_generate=True, output_logits=True)
    ring = captured.join_ring
    joined: list[Any] = []

    def join(*args: Any) -> Any:
        joined.append(ring(*args))
        return joined[-1]

    monkeypatch.setattr(captured, "join_ring", join)
    monkeypatch.setattr(captured.UniqueLayer, "settled", lambda self: None)
    got = generated(model, inputs, return_dict_in_generate=True, output_logits=True)
    assert len(joined) > 30
    assert steps == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_watching_is_as_before(device: str, steps: list[int]) -> None:
    model, inputs = on(device), inputs_on(device)
    with ua.record_selection(model) as records:
        generated(model, inputs)
    assert len(records) > 60
    assert steps[1] == 0
