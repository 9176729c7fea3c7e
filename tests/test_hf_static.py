"""Static caches: pages in place, uncompiled, compiled by transformers and compiled by the user."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hf_helpers import SMALL, assert_same, generate, prompt, run_and_collect, tiny
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import unique_attn as ua
from unique_attn.hf import compat
from unique_attn.hf.attention import unique_attention_forward
from unique_attn.hf.static_layer import UniqueStaticLayer

pytestmark = pytest.mark.skipif(
    not hasattr(StaticLayer(8), "cumulative_length"),
    reason="transformers 4 counts the tokens of a static cache elsewhere",
)
FAMILIES = ["llama", "gemma3", "gpt-oss"]
PADDING = [0, 9]


@pytest.fixture(autouse=True)
def _fresh():
    compat._warned.clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def enabled(family: str = "llama", config: ua.UniqueConfig = SMALL, **fields: Any) -> Any:
    return ua.enable(tiny(family), config, **fields)


def compiled(**kwargs: Any) -> dict[str, Any]:
    """Arguments with which ``generate`` compiles its steps, on the CPU too."""
    how = CompileConfig(backend="eager", fullgraph=True, mode=None, **kwargs)
    how._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": how}


def sparse_layers(cache: Any) -> list[bool]:
    return [isinstance(layer, UniqueStaticLayer) and layer.indexed for layer in cache.layers]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---- generate(). ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_decodes_as_the_default_one(family):
    model, inputs = enabled(family), prompt(length=60, padding=PADDING)
    expected = generate(model, inputs)
    full = [kind == "full_attention" for kind in getattr(model.config, "layer_types", None) or []]
    for kwargs in ({"cache_implementation": "static"}, compiled()):
        output, messages = run_and_collect(lambda kwargs=kwargs: generate(model, inputs, **kwargs))
        assert_same(output, expected)
        assert messages == []
        assert sparse_layers(output.past_key_values) == (full or [True] * model.config.num_hidden_layers)


def test_it_reads_the_selected_pages_only():
    inputs = prompt(length=60)
    sparse, dense = generate(enabled(), inputs, **compiled()), generate(tiny(), inputs)
    assert not torch.allclose(torch.stack(sparse.logits), torch.stack(dense.logits), atol=1e-3)


def test_one_graph_serves_all_lengths():
    model = enabled()
    for number, length in enumerate((60, 40, 52)):
        inputs = prompt(length=length)
        output = generate(model, inputs, max_length=80, tokens=None, **compiled())
        assert_same(output, generate(model, inputs, max_length=80, tokens=None))
        assert graphs() == 1, f"call {number}"


@pytest.mark.parametrize(
    "kwargs",
    [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["beams", "sequences"],
)
def test_other_ways_to_generate(kwargs):
    model, inputs = enabled(), prompt(1, 60)
    settings = {"max_new_tokens": 12, "do_sample": False, **kwargs}
    torch.manual_seed(0)
    expected = model.generate(**inputs, **settings)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **settings), expected)


@pytest.mark.parametrize("padding", [9, 30])
@pytest.mark.parametrize("how", [lambda: {"cache_implementation": "static"}, compiled], ids=["plain", "compiled"])
def test_prompt_in_chunks(how, padding):
    model, inputs = enabled(), prompt(length=60, padding=[0, padding])
    output, messages = run_and_collect(lambda: generate(model, inputs, prefill_chunk_size=16, **how()))
    assert messages == []
    assert_same(output, generate(model, inputs, prefill_chunk_size=16))
    assert all(sparse_layers(output.past_key_values))


def test_sparse_prefill():
    fields = {"prefill": "directional", "threshold": 0.05, "prefill_above": 64}
    model, inputs = enabled(**fields), prompt(length=200, padding=PADDING)
    for kwargs, more in (({"cache_implementation": "static"}, {}), (compiled(), {"prefill_chunk_size": 150})):
        with ua.record_prefill(model) as records:
            output = generate(model, inputs, **kwargs, **more)
        assert records
        assert_same(output, generate(model, inputs, **more))


# ---- Compiled by the user. ----


def loop(model: Any, inputs: dict[str, torch.Tensor], cache: Any, tokens: int = 8) -> torch.Tensor:
    """Logits ``[B, tokens, vocabulary]`` of greedy steps, the first by the prompt."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    out = []
    for _ in range(tokens):
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            step = model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        out.append(step.logits[:, -1])
        ids = out[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.stack(out, 1)


def full_mask(inputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    mask = inputs["attention_mask"]
    return {**inputs, "attention_mask": torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)}


@pytest.mark.parametrize("padding", [None, PADDING], ids=["even", "padded"])
def test_forward_compiled_by_the_user(padding):
    inputs = prompt(length=60, padding=padding)
    expected = loop(enabled(), inputs, ua.UniqueCache(SMALL))
    model = enabled()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=100)
    result, messages = run_and_collect(lambda: loop(model, inputs, cache))
    torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-4)
    assert messages == []
    assert all(sparse_layers(cache))
    cache.reset()
    result, messages = run_and_collect(lambda: loop(model, inputs, cache))
    torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-4)
    assert messages == []
    assert all(sparse_layers(cache))


@pytest.mark.parametrize("way", ["forward", "in place"])
def test_generate_of_a_model_compiled_by_the_user(way):
    inputs = prompt(length=60, padding=PADDING)
    expected = generate(enabled(), inputs)
    model = enabled()
    if way == "forward":
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    else:
        model.compile(backend="eager", fullgraph=True)
    output = generate(model, inputs, cache_implementation="static")
    assert_same(output, expected)
    assert all(sparse_layers(output.past_key_values))


def test_step_function_compiled_by_the_user():
    inputs = prompt(length=60)
    expected = loop(enabled(), inputs, ua.UniqueCache(SMALL))
    model = enabled()
    cache = StaticCache(config=model.config, max_cache_len=100)
    with torch.no_grad():
        logits = [model(**inputs, past_key_values=cache).logits[:, -1]]

    @torch.compile(backend="eager", fullgraph=True)
    def step(token, position):
        return model(token, position_ids=position[None], past_key_values=cache).logits[:, -1]

    with torch.no_grad():
        for n in range(7):
            logits.append(step(logits[-1].argmax(-1, keepdim=True), torch.tensor([60 + n])))
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=2e-4, atol=2e-4)
    assert graphs() == 1


def test_a_compiled_call_that_cannot_be_sparse_says_so():
    model = enabled()
    model.compile(backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=100)
    result, messages = run_and_collect(lambda: loop(model, prompt(length=60), cache))
    torch.testing.assert_close(result, loop(tiny(), prompt(length=60), DynamicCache()), rtol=2e-4, atol=2e-4)
    assert len(messages) == 1
    assert "not a StaticCache whose prompt ran uncompiled" in messages[0]


def test_code_made_by_inductor_copies_no_cache():
    model = enabled()
    cache = StaticCache(config=model.config, max_cache_len=4096)
    inputs = prompt(length=60, padding=PADDING)
    layer, module = cache.layers[0], model.model.layers[0].self_attn
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    layer, places = cache.layers[0], [x.data_ptr() for x in (cache.layers[0]._keys, cache.layers[0]._values)]

    @torch.compile(fullgraph=True)
    def step(q, k, v):
        return unique_attention_forward(module, q, *cache.update(k, v, 0), None)[0]

    layer.padded = False  # without a mask
    new = (torch.randn(2, heads, 1, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        _, (code,) = torch._inductor.utils.run_and_get_code(step, *new)
    assert places == [x.data_ptr() for x in (layer._keys, layer._values)]
    assert "unique_decode.stored" in code
    assert not [line for line in code.splitlines() if "empty_strided" in line and "4096, 16" in line]


# ---- Masks. ----


def test_holes_in_the_mask_are_dense():
    inputs = prompt(length=60)
    inputs["attention_mask"][0, 20:25] = 0
    for kwargs in ({"cache_implementation": "static"}, compiled()):
        compat._warned.clear()
        output, messages = run_and_collect(lambda kwargs=kwargs: generate(enabled(), inputs, **kwargs))
        assert_same(output, generate(tiny(), inputs, cache_implementation="static"))
        assert len(messages) == 1
    assert "not causal with left padding" in messages[0]
    assert not any(sparse_layers(output.past_key_values))


def test_holes_that_come_later():
    inputs, later = prompt(length=60), prompt(length=60)
    cache, stock = (StaticCache(config=tiny().config, max_cache_len=100) for _ in range(2))
    loop(enabled(), inputs, cache, 2)
    loop(tiny(), inputs, stock, 2)
    mask = torch.ones(2, 62, dtype=torch.long)
    mask[1, 3:20] = 0
    call = {"input_ids": later["input_ids"][:, :1], "attention_mask": mask, "position_ids": torch.tensor([[61]])}
    model = enabled()
    with torch.no_grad():
        result, messages = run_and_collect(lambda: model(**call, past_key_values=cache).logits)
        dense = tiny()(**call, past_key_values=stock).logits
    assert not any(sparse_layers(cache))
    assert len(messages) == 1
    torch.testing.assert_close(result, dense, rtol=0.2, atol=2.0)  # the keys of the step before come from sparse layers


def test_holes_that_come_in_a_compiled_step_are_an_error():
    model, inputs = enabled(), prompt(length=60)
    cache = StaticCache(config=model.config, max_cache_len=100)
    loop(model, inputs, cache, 1)
    mask = torch.ones(2, 61, dtype=torch.long)
    mask[1, 3:20] = 0
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="attention_mask: expected a causal one with the left"):
        step(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)


# ---- What is dense, and settings. ----


def test_dense_layers_and_short_caches():
    model, inputs = enabled(dense_layers=(1,)), prompt(length=60)
    output = generate(model, inputs, **compiled())
    assert_same(output, generate(model, inputs))
    assert sparse_layers(output.past_key_values) == [True, False, True]
    output = generate(enabled(budget=512), inputs, **compiled())
    assert_same(output, generate(tiny(), inputs))
    assert not any(sparse_layers(output.past_key_values))


def test_dense_below():
    model, inputs = enabled(dense_below=64), prompt(length=60)
    assert_same(generate(model, inputs, **compiled()), generate(model, inputs))


def test_output_attentions_is_dense_in_its_call():
    model = enabled()
    cache = StaticCache(config=model.config, max_cache_len=100)
    inputs = prompt(length=60, padding=PADDING)
    loop(model, inputs, cache, 2)
    assert all(sparse_layers(cache))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    with torch.no_grad():
        step = model(
            inputs["input_ids"][:, :1],
            attention_mask=mask,
            position_ids=torch.tensor([[61], [52]]),
            past_key_values=cache,
            output_attentions=True,
        )
    assert step.attentions[0] is not None
    assert all(sparse_layers(cache))
    assert torch.equal(step.attentions[0][1, :, :, :9], torch.zeros(4, 1, 9))


def test_several_tokens_at_once():
    inputs, more = prompt(length=60, padding=PADDING), prompt(length=80, padding=PADDING)
    model = enabled()
    expected = ua.UniqueCache(SMALL)
    static = StaticCache(config=model.config, max_cache_len=100)
    for begin, end in ((0, 60), (60, 64), (64, 65), (65, 80)):
        call = {
            "input_ids": more["input_ids"][:, begin:end],
            "attention_mask": more["attention_mask"][:, :end],
            "position_ids": torch.stack([torch.arange(begin, end), torch.arange(begin, end) - 9]).clamp(min=0),
        }
        with torch.no_grad():
            a, b = (model(**call, past_key_values=cache).logits[:, -1] for cache in (expected, static))
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
    assert inputs


# ---- The life of a cache. ----


def test_reset_and_use_again():
    model = enabled()
    cache = StaticCache(config=model.config, max_cache_len=100)
    places = None
    for padding, length in ((PADDING, 60), (None, 40), ([4, 0], 50)):
        inputs = prompt(length=length, padding=padding)
        expected = loop(model, inputs, ua.UniqueCache(SMALL))
        torch.testing.assert_close(loop(model, inputs, cache), expected, rtol=2e-4, atol=2e-4)
        now = [(layer._keys.data_ptr(), layer.pages.index.data_ptr()) for layer in cache.layers]
        assert places in (None, now)
        places = now
        cache.reset()
        assert cache.get_seq_length() == 0


def test_disable_in_the_middle():
    model, inputs = enabled(), prompt(length=60, padding=PADDING)
    cache = StaticCache(config=model.config, max_cache_len=100)
    loop(model, inputs, cache, 1)
    stock = StaticCache(config=model.config, max_cache_len=100)
    ua.disable(model)
    expected = loop(model, inputs, stock, 1)
    assert expected is not None
    for ours, theirs in zip(cache.layers, stock.layers):
        torch.testing.assert_close(ours.keys[1, :, 9:60], theirs.keys[1, :, 9:60])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    call = {"attention_mask": mask, "position_ids": torch.tensor([[60], [51]])}
    with torch.no_grad():
        a, b = (model(inputs["input_ids"][:, :1], past_key_values=x, **call).logits for x in (cache, stock))
    torch.testing.assert_close(a, b)


def test_copies_and_pickles():
    model, inputs = enabled(), prompt(length=60, padding=PADDING)
    cache = StaticCache(config=model.config, max_cache_len=100)
    loop(model, inputs, cache, 1)
    fork = copy.deepcopy(cache)
    stored = pickle.loads(pickle.dumps(cache))
    assert not any(isinstance(layer, UniqueStaticLayer) for layer in stored.layers)
    torch.testing.assert_close(stored.layers[0].keys[1, :, 9:60], cache.layers[0].keys[1, :, 9:60])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    call = {"attention_mask": mask, "position_ids": torch.tensor([[60], [51]])}
    with torch.no_grad():
        other = model(torch.tensor([[5], [6]]), past_key_values=fork, **call).logits
        mine = model(inputs["input_ids"][:, :1], past_key_values=cache, **call).logits
        again = model(torch.tensor([[5], [6]]), past_key_values=stored, **call).logits
    assert not torch.equal(mine, other)
    assert cache.layers[0]._keys.data_ptr() != fork.layers[0]._keys.data_ptr()
    torch.testing.assert_close(again, other)


def test_a_cache_is_freed_without_the_garbage_collector():
    import gc
    import weakref

    model = enabled()
    cache = StaticCache(config=model.config, max_cache_len=100)
    loop(model, prompt(length=60), cache, 2)
    layer = weakref.ref(cache.layers[0])
    gc.collect()
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", [None, "eager"])
def test_inference_mode(backend):
    model, inputs = enabled(), prompt(length=60, padding=PADDING)
    expected = generate(model, inputs)
    kwargs = {"cache_implementation": "static"} if backend is None else compiled()
    with torch.inference_mode():
        output = generate(model, inputs, **kwargs)
    assert_same(output, expected)
    assert all(sparse_layers(output.past_key_values))


def test_reading_the_keys_of_a_layer_makes_a_cache_dense():
    model, inputs = enabled(), prompt(length=60, padding=PADDING)
    cache, stock = (StaticCache(config=model.config, max_cache_len=100) for _ in range(2))
    loop(model, inputs, cache, 1)
    loop(tiny(), inputs, stock, 1)
    for ours, theirs in zip(cache.layers, stock.layers):
        ours.keys = ours.keys * 1  # somebody writes to them
        torch.testing.assert_close(ours.keys[1, :, 9:60], theirs.keys[1, :, 9:60])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    call = {"attention_mask": mask, "position_ids": torch.tensor([[60], [51]])}
    with torch.no_grad():
        a = model(inputs["input_ids"][:, :1], past_key_values=cache, **call).logits
        b = tiny()(inputs["input_ids"][:, :1], past_key_values=stock, **call).logits
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_autocast():
    model, inputs = enabled(), prompt(length=60)
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, inputs)
        output = generate(model, inputs, cache_implementation="static")
    assert_same(output, expected, 2e-2)
