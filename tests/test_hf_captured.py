"""Decode steps of plain generate() from captured steps: on CUDA in graphs, here as the same steps without one."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from hf_helpers import SMALL, WINDOW, prompt, tiny
from op_cases import DEVICES

pytest.importorskip("transformers")

import transformers
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import unique_attn as ua
from unique_attn.hf import captured, step_graph
from unique_attn.hf.arena import MAX_GRAPHS, MAX_IDLE

OFF = ua.UniqueConfig.from_dict({**SMALL.to_dict(), "graphs": "off"})
WINDOWS = ["qwen2-window", "gemma3", "gpt-oss"]
pytestmark = pytest.mark.filterwarnings("ignore:unique_attn:UserWarning")


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts captured steps: [made, run]. On the CPU they are the same steps, run as they are."""
    counts = [0, 0]
    make, run = step_graph.StepGraph.__init__, step_graph.StepGraph.run

    def counted_make(self: Any, *args: Any) -> None:
        make(self, *args)
        counts[0] += 1

    def counted_run(self: Any, *args: Any) -> None:
        counts[1] += 1
        run(self, *args)

    for module in (captured, ua.hf.layer):
        monkeypatch.setattr(module, "CAPTURES", ("cuda", "cpu"))
    monkeypatch.setattr(captured, "_said", set())
    monkeypatch.setattr(step_graph.StepGraph, "__init__", counted_make)
    monkeypatch.setattr(step_graph.StepGraph, "run", counted_run)
    return counts


def on(device: str, family: str = "llama", config: ua.UniqueConfig = SMALL) -> Any:
    model = ua.enable(tiny(family).to(device), config).eval()
    if family == "gpt-oss" and device == "cuda":  # products of groups in fp32 copy their offsets to the host
        model.set_experts_implementation("batched_mm")
    return model


def inputs_on(device: str, batch: int = 2, length: int = 20, padding: list[int] | None = None) -> dict[str, Any]:
    return {name: x.to(device) for name, x in prompt(batch, length, padding).items()}


def generated(model: Any, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(**inputs, **settings)


def uncaptured(model: Any, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    config = ua.hf.hooks.hook_of(ua.hf.hooks.attention_modules(model)[0]).config
    ua.enable(model, ua.UniqueConfig.from_dict({**config.to_dict(), "graphs": "off"}))
    try:
        return generated(model, inputs, **settings)
    finally:
        ua.enable(model, config)


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


CHANGES = {
    "values": lambda model: model.lm_head.weight.data.neg_(),
    "data": lambda model: setattr(model.lm_head.weight, "data", -model.lm_head.weight.data),
    "replaced": lambda model: setattr(model, "lm_head", copy.deepcopy(model.lm_head).requires_grad_(False)),
    "layer": lambda model: setattr(model.model.layers[0], "mlp", torch.nn.Identity()),
    "attribute": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 2.0),
    "forward": lambda model: setattr(model.model.layers[0].mlp, "forward", lambda x: x * 0.5),
    "resized": lambda model: model.resize_token_embeddings(150, mean_resizing=False),
    "cast": lambda model: model.double(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_model_is_captured_anew(device: str, change: str, steps: list[int]) -> None:
    """Between calls and between steps."""
    if (device, change) == ("cuda", "cast"):
        pytest.skip("the ops take no fp64 on CUDA: no layer is on pages then")
    model, inputs = on(device), inputs_on(device)
    before = generated(model, inputs)
    made = steps[0]
    CHANGES[change](model)
    got = generated(model, inputs)
    assert torch.equal(got, uncaptured(model, inputs))
    assert steps[0] > made or change == "values"
    assert change in ("replaced", "resized", "cast") or not torch.equal(got, before)
    model = on(device)

    def stepwise() -> list[torch.Tensor]:
        each, cache = copy.deepcopy(model), DynamicCache(config=model.config)
        each(**inputs, past_key_values=cache)
        found = []
        for i in range(12):
            if i == 8 and change != "cast":
                torch.manual_seed(4)  # new embeddings are random
                CHANGES[change](each)
            ids, positions = torch.full((2, 1), 3 + i, device=device), torch.full((2, 1), 20 + i, device=device)
            found.append(each(ids, position_ids=positions, past_key_values=cache).logits)
        return found

    got_steps = stepwise()
    ua.enable(model, OFF)
    assert all(torch.equal(a, b) for a, b in zip(got_steps, stepwise(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_copies_pickles_and_disabled_models(device: str, steps: list[int]) -> None:
    model, inputs = on(device), inputs_on(device)
    stock = type(tiny())
    assert type(model) is not stock
    assert isinstance(model, stock)
    wanted = generated(model, inputs)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ran = steps[1]
        assert torch.equal(generated(each, inputs), wanted)
        assert steps[1] > ran
    made = steps[1]
    ua.disable(model)
    assert type(model) is stock
    assert "_unique_attn_steps" not in vars(model)
    generated(model, inputs)
    assert steps[1] == made


@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_step_leaves_the_model_usable(
    device: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = on(device), inputs_on(device)
    wanted = generated(model, inputs)
    run = step_graph.StepGraph.run

    def interrupted(self: Any, *args: Any) -> None:
        if steps[1] % 7 == 5:
            steps[1] += 1
            raise KeyboardInterrupt
        run(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(step_graph.StepGraph, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generated(model, inputs)
    assert torch.equal(generated(model, inputs), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_no_memory_for_a_graph(
    device: str, steps: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = on(device), inputs_on(device)
    wanted = uncaptured(model, inputs)

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_graph.StepGraph, "_capture", full)
    with caplog.at_level(logging.WARNING, logger="unique_attn"):
        assert torch.equal(generated(model, inputs), wanted)
    assert "there was no memory for a graph (CUDA out of memory)" in caplog.text
    assert steps == [0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_the_host_steers_is_not_captured(
    device: str, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A graph would keep what the host knew when it was captured."""
    model, inputs = on(device), inputs_on(device)
    layer = model.model.layers[0]
    forward = type(layer).forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values") or kwargs.get("cache")
        return forward(layer, *args, **kwargs) * (1 + cache.get_seq_length() / 100)

    layer.forward = scaled
    wanted = uncaptured(model, inputs)
    with caplog.at_level(logging.WARNING, logger="unique_attn"):
        assert torch.equal(generated(model, inputs), wanted)
    assert "depends on the length of the cache as the host knows it" in caplog.text
    assert steps[1] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_threads_and_models_at_once(device: str, steps: list[int]) -> None:
    models = [on(device), on(device, "qwen2")]
    cases = [(models[i % 2], inputs_on(device, length=18 + i)) for i in range(4)]
    wanted = [uncaptured(*case) for case in cases]
    found: dict[int, list[torch.Tensor]] = {}

    def work(i: int) -> None:
        found[i] = [generated(*cases[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, wanted[i]) for i in range(4) for each in found[i])
    assert steps[1] > 200


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keeps_cache", [False, True])
def test_graphs_go_with_the_model(device: str, keeps_cache: bool, steps: list[int]) -> None:
    """At once, without the garbage collector."""
    model = on(device)
    cache = generated(model, inputs_on(device), return_dict_in_generate=True).past_key_values if keeps_cache else None
    generated(model, inputs_on(device))
    assert steps[1] > 30
    weight, alive = weakref.ref(model.lm_head.weight), weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
        assert weight() is None
    finally:
        gc.enable()
    assert cache is None or cache.get_seq_length() == 59


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_and_memory_are_bounded(device: str) -> None:
    model = on(device)
    for batch in range(1, MAX_GRAPHS + 4):
        generated(model, inputs_on(device, batch=batch), max_new_tokens=12)
    arenas = vars(model)["_unique_attn_steps"]._arenas
    gc.collect()
    assert 1 <= len(arenas._idle) <= MAX_IDLE
    assert all(len(arena.graphs) <= MAX_GRAPHS for arena in arenas._idle)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device on this machine")
@torch.no_grad()
def test_a_long_generation_has_no_long_step() -> None:
    """Pages grow where they are: 4096 tokens more, no step of more than a few milliseconds beside the usual."""
    import time

    config = ua.UniqueConfig.from_dict({**SMALL.to_dict(), "block_size": 64, "page_size": 8, "budget": 64})
    model, inputs = on("cuda", config=config), inputs_on("cuda", length=900)
    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    clock = StoppingCriteriaList([Clock()])
    for _ in range(2):  # the first call captures
        times.clear()
        generated(model, inputs, max_new_tokens=4096, stopping_criteria=clock)
    taken = torch.tensor(times).double().diff()[8:]
    assert float(taken.max()) < float(taken.median()) + 8e-3
