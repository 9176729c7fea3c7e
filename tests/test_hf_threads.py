"""Several threads at once: on one model, on forks of one cache, on replicas, and one that fails in the middle."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hf_helpers import ALWAYS_SPARSE, SMALL, prompt, tiny
from op_cases import DEVICES

import unique_attn as ua
from unique_attn.paging import OutOfStepError

TIMEOUT = 60


def at_once(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of functions that run in threads of their own and start together."""
    start = threading.Barrier(len(work))

    def run(function: Callable[[], Any]) -> Any:
        start.wait(TIMEOUT)
        return function()

    with ThreadPoolExecutor(len(work)) as pool:
        return [each.result(TIMEOUT * 4) for each in [pool.submit(run, function) for function in work]]


def greedy(model: Any, cache: Any, token: int, steps: int) -> list[int]:
    """Tokens by plain forward calls that continue ``cache``."""
    tokens = [token]
    device = next(model.parameters()).device
    with torch.no_grad():
        for _ in range(steps):
            out = model(torch.tensor([[tokens[-1]]], device=device), past_key_values=cache, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def prefix(model: Any, length: int = 40, seed: int = 1) -> Any:
    """A cache that has turned to pages."""
    device = next(model.parameters()).device
    ids = prompt(1, length, seed=seed)["input_ids"].to(device)
    cache = ua.UniqueCache(SMALL, model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        model(ids[:, -1:], past_key_values=cache)
    assert all(layer.on_pages for layer in cache.layers)
    return cache


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_in_threads_with_caches_of_their_own(device: str) -> None:
    """Forced to meet between the update of a cache and its attention, in every layer."""
    model = ua.enable(tiny().to(device), SMALL)
    caches = [prefix(model, 40 + 5 * i, seed=i) for i in range(3)]
    expected = [greedy(model, cache.fork(), 7, 4) for cache in caches]
    meet = threading.Barrier(3)
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda *_: (meet.wait(TIMEOUT), None)[1])
        for layer in model.model.layers
    ]
    got = at_once([lambda cache=cache: greedy(model, cache, 7, 4) for cache in caches])
    for handle in handles:
        handle.remove()
    assert got == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("when", ["before", "in the threads"])
def test_forks_of_one_cache_in_threads(device: str, when: str) -> None:
    """They share blocks, write to the one that is partly filled, and let the pool grow while others read."""
    model = ua.enable(tiny().to(device), SMALL)
    cache = prefix(model, 45)
    tokens = [3, 17, 29, 41, 53]
    kept = [layer.keys for layer in cache.layers]
    expected = [greedy(model, cache.fork(), token, 60) for token in tokens]
    assert len({tuple(each) for each in expected}) == len(tokens)
    if when == "before":
        forks = [cache.fork() for _ in tokens]
        work = [lambda f=f, token=token: greedy(model, f, token, 60) for f, token in zip(forks, tokens)]
    else:
        work = [lambda token=token: greedy(model, cache.fork(), token, 60) for token in tokens]
    pool = cache.layers[0]._table.pool
    blocks = pool.num_blocks
    assert at_once(work) == expected
    assert pool.num_blocks > blocks
    pool.check_invariants()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, kept))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_forks_on_streams_of_their_own() -> None:
    model = ua.enable(tiny().cuda(), SMALL)
    cache = prefix(model, 45)
    tokens = [3, 17, 29, 41]
    expected = [greedy(model, cache.fork(), token, 80) for token in tokens]

    def run(token: int) -> list[int]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            return greedy(model, cache.fork(), token, 80)

    for _ in range(5):
        assert at_once([lambda token=token: run(token) for token in tokens]) == expected


def test_a_thread_that_fails_in_the_middle_spoils_only_its_own_cache() -> None:
    model = ua.enable(tiny(), SMALL)
    cache = prefix(model)
    expected = greedy(model, cache.fork(), 5, 30)
    failing = threading.local()

    def fail(*_: Any) -> None:
        if getattr(failing, "now", False):
            raise KeyboardInterrupt

    model.model.layers[1].mlp.register_forward_hook(fail)
    broken = cache.fork()

    def interrupted() -> str:
        greedy(model, broken, 5, 3)
        failing.now = True
        try:
            greedy(model, broken, 5, 1)
        except KeyboardInterrupt:
            return "failed"
        return "went on"

    results = at_once([interrupted, *[lambda: greedy(model, cache.fork(), 5, 30) for _ in range(3)]])
    assert results == ["failed", expected, expected, expected]
    with pytest.raises(OutOfStepError, match=r"reset\(\) the cache"):
        greedy(model, broken, 5, 1)
    broken.reset()
    ids = prompt(1, 40)["input_ids"]
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=broken)
        model(ids[:, -1:], past_key_values=broken)
    assert greedy(model, broken, 5, 30) == expected


def replica(model: Any) -> Any:
    """What ``nn.DataParallel`` makes of a model for each device: shallow copies of its modules."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(twin, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(twin, name, parameter)
    return copies[model]


@pytest.mark.parametrize("train", [None, ua.TrainConfig(tau=2.0)], ids=["decoding", "training"])
def test_replicas_in_threads(train: ua.TrainConfig | None) -> None:
    model = ua.enable(tiny(), SMALL, train=train)
    inputs = [prompt(2, 50, [0, 5 + i], seed=i) for i in range(3)]
    if train is None:

        def run(each: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
            out = []
            with torch.no_grad():
                cache = each(given["input_ids"], attention_mask=given["attention_mask"]).past_key_values
                mask = given["attention_mask"]
                for token in range(3, 9):
                    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                    new = torch.full((2, 1), token)
                    out.append(each(new, attention_mask=mask, past_key_values=cache).logits)
            assert all(layer.on_pages for layer in cache.layers)
            return torch.cat(out)
    else:
        model.train()

        def run(each: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
            return each(**given).logits.detach()

    expected = [run(model, given) for given in inputs]
    got = at_once([lambda given=given: run(replica(model), given) for given in inputs])
    for a, b, given in zip(got, expected, inputs):
        shown = slice(None) if train is None else given["attention_mask"].bool()
        torch.testing.assert_close(a[shown], b[shown])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 CUDA devices on this machine")
def test_data_parallel() -> None:
    model = ua.enable(tiny().cuda(), SMALL, train=ua.TrainConfig(tau=2.0)).train()
    inputs = {name: x.cuda() for name, x in prompt(4, 50, [0, 5, 9, 3]).items()}
    expected = model(**inputs, use_cache=False).logits
    got = torch.nn.DataParallel(model)(**inputs, use_cache=False).logits
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[shown], expected[shown], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_soak() -> None:
    """8 threads, 3 models, 200 generations of many kinds, forks of shared prefixes among them, as in one thread."""
    configs = [
        SMALL,
        ALWAYS_SPARSE,
        ua.UniqueConfig(budget=32, dense_below=0, block_size=16, index_format="compressed"),
    ]
    models = [ua.enable(tiny(family), config) for family, config in zip(("llama", "qwen3", "gemma3"), configs)]
    prefixes = [prefix(models[0], 40), prefix(models[1], 43)]
    kinds: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}]

    def job(number: int) -> Callable[[], list[int]]:
        draw = random.Random(number)
        if draw.random() < 0.4:
            which = draw.randrange(2)
            token, steps = draw.randrange(2, 90), draw.randrange(5, 20)
            return lambda: greedy(models[which], prefixes[which].fork(), token, steps)
        model, kind = draw.choice(models), draw.choice(kinds)
        batch = 1 if "prompt_lookup_num_tokens" in kind else draw.randrange(1, 3)
        length = draw.randrange(30, 60)
        inputs = prompt(batch, length, [0, draw.randrange(0, 9)][:batch], seed=number)
        settings = {"do_sample": False, "max_new_tokens": draw.randrange(3, 9), "pad_token_id": 0, **kind}
        return lambda: model.generate(**inputs, **settings).tolist()

    jobs = [job(number) for number in range(200)]
    expected = [each() for each in jobs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda each: each(), jobs))
    assert got == expected
    for cache in prefixes:
        cache.layers[0]._table.pool.check_invariants()
