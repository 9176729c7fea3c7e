"""Captured steps when something happens: models that change, copies, threads, interruptions, memory that is short."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from typing import Any

import captured_cases
import pytest
import torch
from captured_cases import OFF, generated, inputs_on, on, uncaptured
from hf_helpers import SMALL, tiny
from op_cases import DEVICES

pytest.importorskip("transformers")

from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import unique_attn as ua
from unique_attn import memory
from unique_attn.block_storage import BlockStorage
from unique_attn.hf import step_graph
from unique_attn.hf.arena import MAX_GRAPHS, MAX_IDLE

pytestmark = pytest.mark.filterwarnings("ignore:unique_attn:UserWarning")
steps = captured_cases.steps  # the fixture


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
@pytest.mark.parametrize("end", ["disabled", "enabled again"])
def test_pages_go_with_the_settings(device: str, end: str, steps: list[int]) -> None:
    """Enabled, used and enabled again or disabled, many times: nothing waits for the garbage collector."""
    model = on(device)
    gc.collect()
    gc.disable()
    try:
        for turn in range(3):
            generated(model, inputs_on(device))
            assert steps[1] > 30 * (turn + 1)
            arenas = vars(model)["_unique_attn_steps"]._arenas
            places = [weakref.ref(arenas), *(weakref.ref(arena) for arena in arenas._idle)]
            assert len(places) > 1
            del arenas
            if end == "disabled":
                ua.disable(model)
                assert not any(place() for place in places)
            ua.enable(model, SMALL)
            assert not any(place() for place in places)
    finally:
        gc.enable()


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
def test_many_caches_have_room_for_their_pages() -> None:
    """More of them than the addresses of a process would serve if every one took what it may ever need."""
    like = torch.empty(1, 2, 0, 64, device="cuda", dtype=torch.bfloat16)
    kept = [BlockStorage.create(4, like, 64, ua.UniqueConfig()) for _ in range(5000)]
    before = kept[0].capacity
    assert before > 50 * kept[-1].capacity
    assert kept[-1].capacity >= 1000
    kept.clear()
    assert BlockStorage.create(4, like, 64, ua.UniqueConfig()).capacity == before


def test_room_shrinks_with_what_is_left() -> None:
    total, reserved = 80 * 2**30, 0
    first = memory.room(total, 0)
    assert first == 10 * 2**30
    sizes = []
    for _ in range(100_000):  # tensors
        sizes.append(memory.room(total, reserved))
        reserved += sizes[-1]
    assert sizes == sorted(sizes, reverse=True)
    assert reserved < memory.SPACE
    assert sizes[96 * 40] > 2**30  # 40 caches of 32 layers
    assert memory.room(total, memory.SPACE + 1) == 0


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
