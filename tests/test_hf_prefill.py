"""Sparse prefill in models: against stock attention where nothing is dropped, else against masks made by hand."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_helpers import ALWAYS_SPARSE, NO_SDPA, assert_same, generate, layers_on_pages, prompt, run_and_collect, tiny
from hf_prefill_cases import (
    CLOSE,
    EXACT,
    FAMILIES,
    FULL,
    PADDING,
    PAPER,
    SPARSE,
    density,
    enabled,
    handmade_attention,
    on,
    score,
)
from op_cases import needs_cuda
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import unique_attn as ua
from unique_attn.hf import compat, masks
from unique_attn.hf.attention import unique_attention_forward
from unique_attn.ops import NotDifferentiableError, unpack_block_mask


@pytest.fixture(autouse=True)
def _fresh_warnings():
    compat._warned.clear()


@pytest.fixture
def handmade():
    """A function that makes the model whose prompts attend under masks by hand."""

    def model(config: ua.UniqueConfig, family: str = "llama"):
        AttentionInterface.register("handmade", handmade_attention)
        kind = "eager" if family in NO_SDPA else "sdpa"
        AttentionMaskInterface.register("handmade", ALL_MASK_ATTENTION_FUNCTIONS[kind])
        made = tiny(family)
        made.set_attn_implementation("handmade")
        made.config.handmade = config
        return made

    yield model
    AttentionInterface._global_mapping.pop("handmade", None)
    AttentionMaskInterface._global_mapping.pop("handmade", None)


# ---- generate(). ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["even", "padded"])
@pytest.mark.parametrize("config", [EXACT, replace(PAPER, top_p=1.0)], ids=["directional", "unisparse"])
def test_nothing_dropped_is_stock(device, family, padding, config):
    inputs = on(device, prompt(length=300, padding=padding))
    expected = generate(tiny(family).to(device), inputs, tokens=6)
    model = enabled(config, family).to(device)
    with ua.record_prefill(model) as records:
        output, messages = run_and_collect(lambda: generate(model, inputs, tokens=6))
    assert_same(output, expected, tolerance=1e-3 if device.type == "cuda" else 2e-4)
    assert messages == []
    assert [(x.layer_idx, x.row) for x in records] == [(layer, row) for layer in sorted(FULL[family]) for row in (0, 1)]
    assert [(x.num_queries, x.num_keys) for x in records[:2]] == [(300 - pad,) * 2 for pad in padding or (0, 0)]
    if config is EXACT:
        assert density(records) == 1
    assert {i for i, paged in enumerate(layers_on_pages(output.past_key_values)) if paged} == FULL[family]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["even", "padded"])
@pytest.mark.parametrize("config", [SPARSE, PAPER], ids=["directional", "unisparse"])
def test_equals_masks_by_hand(handmade, family, padding, config):
    inputs = prompt(length=480, padding=padding)
    expected = generate(handmade(config, family), inputs, tokens=6)
    model = enabled(config, family)
    with ua.record_prefill(model) as records:
        output = generate(model, inputs, tokens=6)
    assert_same(output, expected)
    assert density(records) < 0.85
    stock = generate(tiny(family), inputs, tokens=6)
    assert not torch.allclose(torch.stack(stock.logits), torch.stack(output.logits), atol=1e-2)


def test_defaults_of_the_methods():
    inputs = prompt(1, length=300)
    for method in ("directional", "unisparse"):
        model = enabled(replace(EXACT, prefill=method, threshold=None))
        with ua.record_prefill(model) as records:
            score(model, inputs)
        assert len(records) == 3
        assert 0.2 < density(records) <= 1


@pytest.mark.parametrize("config", [EXACT, SPARSE, PAPER], ids=["exact", "directional", "unisparse"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["even", "padded"])
def test_chunks(handmade, config, padding):
    """Query blocks are counted from the start of each chunk, so the masks are not those of the whole prompt."""
    inputs = prompt(length=330, padding=padding)
    settings = {"tokens": 6, "prefill_chunk_size": 100}
    expected = generate(tiny() if config is EXACT else handmade(config), inputs, **settings)
    model = enabled(config)
    with ua.record_prefill(model) as records:
        output, messages = run_and_collect(lambda: generate(model, inputs, **settings))
    assert_same(output, expected)
    assert messages == []
    # The last chunk has 30 tokens, as few as a decode step.
    assert [(x.num_queries, x.num_keys) for x in records if x.row == 0 and x.layer_idx == 0] == [
        (100, 100),
        (100, 200),
        (100, 300),
    ]


@pytest.mark.parametrize("steps", [0, 3], ids=["dense", "on pages"])
@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["even", "padded"])
def test_a_kept_cache_is_continued(handmade, steps, config, padding):
    """A second turn of many tokens, on a cache that has or has not turned to pages."""
    inputs = prompt(length=120, padding=padding)
    more = torch.nn.functional.pad(inputs["attention_mask"], (0, 150), value=1)
    new = prompt(length=150, seed=7)["input_ids"]

    def run(model):
        first = generate(model, inputs, tokens=steps + 1)
        ids = torch.cat([first.sequences[:, : 120 + steps], new[:, : 150 - steps]], 1)
        return generate(
            model, {"input_ids": ids, "attention_mask": more}, tokens=6, past_key_values=first.past_key_values
        )

    expected = run(tiny() if config is EXACT else handmade(config))
    model = enabled(config)
    with ua.record_prefill(model) as records:
        output = run(model)
    assert_same(output, expected)
    assert all(layers_on_pages(output.past_key_values))
    assert {(x.num_queries, x.num_keys) for x in records if x.row == 0} == {(120, 120), (150 - steps, 270)}


def test_beams(handmade):
    inputs = prompt(length=200, padding=PADDING)
    settings = {"tokens": 8, "num_beams": 3, "output_logits": False}
    expected = generate(handmade(SPARSE), inputs, **settings)
    assert torch.equal(generate(enabled(), inputs, **settings).sequences, expected.sequences)


def test_settings_of_a_cache_win_over_those_of_the_model(handmade):
    inputs = prompt(length=200)
    expected = generate(handmade(SPARSE), inputs, tokens=4)
    model = enabled(ALWAYS_SPARSE)
    assert_same(generate(model, inputs, tokens=4, past_key_values=ua.UniqueCache(SPARSE, model.config)), expected)
    model = enabled(SPARSE)
    cache = ua.UniqueCache(ALWAYS_SPARSE, model.config)
    assert_same(generate(model, inputs, tokens=4, past_key_values=cache), generate(tiny(), inputs, tokens=4))


@pytest.mark.parametrize("padding", [None, PADDING], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphed_decoder(device, padding, family):
    """Its prefill is that of generate(); its own settings count there."""
    inputs = on(device, prompt(length=200, padding=padding))
    model = enabled(SPARSE, family).to(device)
    if family == "gpt-oss" and device.type == "cuda":
        model.set_experts_implementation("batched_mm")
    expected = generate(model, inputs, tokens=8).sequences
    dense = ua.enable(model, ALWAYS_SPARSE)
    decoder = ua.GraphedDecoder(dense, batch=2, max_length=220, config=SPARSE)
    with ua.record_prefill(model) as records:
        got = decoder.generate(inputs["input_ids"], 8, inputs["attention_mask"] if padding else None)
    assert torch.equal(got, expected)
    assert {x.layer_idx for x in records} == FULL[family]


# ---- Scoring. ----


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scoring(handmade, family, padding, use_cache):
    inputs = prompt(length=260, padding=padding)
    model = enabled(SPARSE, family)
    with ua.record_prefill(model) as records:
        output = score(model, inputs, use_cache=use_cache)
    assert {x.layer_idx for x in records} == FULL[family]
    torch.testing.assert_close(output, score(handmade(SPARSE, family), inputs, use_cache=use_cache), **CLOSE)


def test_masks_of_several_words(handmade):
    """More than 32 key blocks."""
    inputs = prompt(1, length=2300)
    model = enabled(SPARSE)
    with ua.record_prefill(model) as records:
        output = score(model, inputs)
    assert records[0].mask.shape == (18, 4, 2)
    assert density(records) < 0.7
    torch.testing.assert_close(output, score(handmade(SPARSE), inputs), **CLOSE)


@needs_cuda
def test_the_device_is_waited_for_once_in_a_call():
    """By the first layer, and only if there is a mask."""
    modules = [layer.self_attn for layer in enabled().cuda().model.layers]
    q, kv = torch.randn(2, 4, 200, 16, device="cuda"), torch.randn(2, 2, 200, 16, device="cuda")
    mask = masks.causal_mask(torch.tensor(PADDING, device="cuda"), 200, 200)
    for module in modules:  # what is set up in a first call
        unique_attention_forward(module, q, kv, kv, mask)
    with torch.no_grad():
        for given in (None, mask.clone()):
            for i, module in enumerate(modules):
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("default" if given is not None and i == 0 else "error")
                try:
                    unique_attention_forward(module, q, kv, kv, given)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


def test_padding_attends_to_nothing():
    """Its output is 0, so a layer adds nothing to it."""
    model, inputs = enabled(), prompt(length=200, padding=PADDING)
    seen = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    score(model, inputs)
    handle.remove()
    assert not seen[0][1, :70].any()
    assert seen[0][1, 70:].any(-1).all()
    assert seen[0][0].any(-1).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_causal_4d_masks_are_recognized(handmade, kind):
    ids = prompt(1, length=200)["input_ids"]
    mask = torch.ones(1, 1, 200, 200, dtype=torch.bool).tril()
    mask[..., :20] = False
    if kind.is_floating_point:
        mask = torch.where(mask, 0.0, torch.finfo(kind).min)
    model = enabled()
    with ua.record_prefill(model) as records, torch.no_grad():
        output = model(ids, attention_mask=mask).logits[:, 20:]
        expected = handmade(SPARSE)(ids, attention_mask=mask).logits[:, 20:]
    assert [x.num_keys for x in records] == [180] * 3
    torch.testing.assert_close(output, expected, **CLOSE)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_is_looked_at_once_in_a_call(monkeypatch, mode):
    looked, look = [], masks.hidden_left
    monkeypatch.setattr(masks, "hidden_left", lambda mask, *shape: looked.append(shape) or look(mask, *shape))
    model = enabled()
    for use_cache in (False, True):
        for length, padding in ((200, PADDING), (240, PADDING), (240, [3, 0])):
            with mode(), ua.record_prefill(model) as records:
                model(**prompt(length=length, padding=padding), use_cache=use_cache)
            assert [x.num_keys for x in records] == [length - pad for pad in padding] * 3
            assert looked == [(2, length, length)]
            looked.clear()


@torch.inference_mode()
def test_a_mask_that_changes_in_place_is_looked_at_again():
    ids, mask = prompt(1, length=200)["input_ids"], torch.ones(1, 1, 200, 200, dtype=torch.bool).tril()
    model = enabled(EXACT)
    for _ in range(3):
        output, expected = (each(ids, attention_mask=mask).logits for each in (model, tiny()))
        torch.testing.assert_close(output, expected, **CLOSE)
        mask[..., 100:150, 30:60] = ~mask[..., 100:150, 30:60]  # a hole, and none


# ---- Gradients, dtypes, threads, files. ----


@pytest.mark.parametrize("trained", ["all", "values"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_are_named_errors(trained, use_cache):
    model = enabled()
    if trained == "values":
        model.requires_grad_(False)
        model.model.layers[0].self_attn.v_proj.requires_grad_(True)
    ids = prompt(length=200)["input_ids"]
    loss = model(ids, labels=ids, use_cache=use_cache).loss
    with pytest.raises(NotDifferentiableError, match=r"sparse prefill has no gradient: call model.train\(\)"):
        loss.backward()


@pytest.mark.parametrize("use_cache", [False, True])
def test_autocast(device, use_cache):
    inputs = on(device, prompt(length=200, padding=PADDING))
    model, stock = enabled(EXACT).to(device), tiny().to(device)
    exact = score(stock, inputs)
    with torch.autocast(device.type, dtype=torch.bfloat16), ua.record_prefill(model) as records:
        output, expected = score(model, inputs, use_cache=use_cache), score(stock, inputs, use_cache=use_cache)
    assert len(records) == 6
    assert output.dtype == expected.dtype
    assert (output - exact).abs().max() <= 2 * (expected - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device, dtype):
    inputs = on(device, prompt(length=200, padding=PADDING))
    exact = score(tiny().to(device), inputs)
    expected = score(tiny(dtype=dtype).to(device), inputs)
    output = score(enabled(EXACT, dtype=dtype).to(device), inputs)
    assert output.dtype == dtype
    assert (output - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_threads_and_several_models(device):
    """Two models with settings of their own, each in two threads: forwards that take turns layer by layer."""
    models = [enabled(SPARSE).to(device), enabled(PAPER, "qwen2").to(device)]
    inputs = [on(device, prompt(length=200 + 10 * i, padding=[0, 7 * i], seed=i)) for i in range(4)]
    expected = [score(models[i % 2], inputs[i]) for i in range(4)]
    meet = threading.Barrier(4)
    for model in models:
        for layer in model.model.layers[:2]:
            layer.self_attn.q_proj.register_forward_hook(lambda *_: (meet.wait(60), None)[1])
    got: list[Any] = [None] * 4
    counts: list[Any] = [None] * 4

    def run(i: int) -> None:
        with ua.record_prefill(models[i % 2]) as records:
            got[i] = score(models[i % 2], inputs[i], use_cache=i < 2)
        counts[i] = {(x.layer_idx, x.num_keys) for x in records if x.row == 1}

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for i in range(4):
        torch.testing.assert_close(got[i], expected[i])
        assert counts[i] == {(layer, 200 + 3 * i) for layer in range(3 - i % 2)}


def test_settings_are_saved_and_loaded(tmp_path):
    inputs = prompt(length=200)
    model = enabled(PAPER)
    expected = score(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="unique").eval()
    assert ua.UniqueConfig.from_dict(loaded.config.unique_attn) == PAPER
    torch.testing.assert_close(score(loaded, inputs), expected)  # without enable()
    with ua.record_prefill(loaded) as records:
        score(loaded, inputs)
    assert {x.layer_idx for x in records} == {0, 1, 2}
    ua.disable(loaded)
    assert stays_stock_after_disable(loaded, inputs)


def stays_stock_after_disable(model, inputs) -> bool:
    return torch.allclose(score(model, inputs), score(tiny(), inputs), **CLOSE)


# ---- Records. ----


def test_records():
    model = enabled()
    with ua.record_prefill(model) as records, ua.record_selection(model) as selections:
        generate(model, prompt(length=300, padding=PADDING), tokens=3)
    assert len(selections) == 6  # 2 decode steps of 3 layers
    assert len(records) == 6  # 2 rows of 3 layers
    for record in records:
        assert isinstance(record, ua.PrefillRecord)
        assert (record.block_q, record.block_k) == (128, 64)
        blocks = -(-record.num_queries // 128)
        seen = torch.arange(blocks)[:, None] * 128 + 127 >= torch.arange(-(-record.num_keys // 64)) * 64
        kept = unpack_block_mask(record.mask, seen.shape[1])[:blocks]
        assert not (kept & ~seen[:, None]).any()
        assert record.visible == int(seen.sum())
        torch.testing.assert_close(record.density, kept.sum((0, 2)) / seen.sum())
        torch.testing.assert_close(record.mass, record.kept[:blocks].mean(0))
        assert record.density.shape == record.mass.shape == (4,)
        assert (record.mass > 0.5).all()
    with ua.record_prefill(model) as records:
        pass
    score(model, prompt(length=300))
    assert records == []


def test_records_of_chunks_count_from_the_chunk():
    record = ua.PrefillRecord(0, 0, 130, 300, 128, 64, torch.zeros(2, 1, 1, dtype=torch.int32), torch.ones(2, 1))
    # Queries at 170 to 297 see the blocks 0 to 4, those at 298 and 299 too.
    assert (record.query_blocks, record.visible) == (2, 10)
    assert record.density.tolist() == [0.0]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (tiny, ValueError, "model: expected the attention implementation 'unique', got 'sdpa'"),
        (lambda: torch.nn.Linear(2, 2), TypeError, "model: expected a transformers model, got Linear"),
    ],
    ids=["not enabled", "no model"],
)
def test_record_prefill_refuses(model, error, message):
    with pytest.raises(error, match=message), ua.record_prefill(model()):
        pass
