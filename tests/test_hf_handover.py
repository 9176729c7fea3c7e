"""What stands between a cache and the attention function: arguments, masks, names of arguments, copies, memory."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
import transformers
from hf_helpers import (
    ALWAYS_SPARSE,
    SHAPE,
    SMALL,
    VOCAB,
    assert_same,
    generate,
    layers_on_pages,
    prompt,
    run_and_collect,
    tiny,
)
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import unique_attn as ua
from unique_attn.hf import compat
from unique_attn.hf.attention import UnsupportedFeatureError, unique_attention_forward

CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    compat._warned.clear()


def of_family(name: str, implementation: str | None = None, **shape: Any) -> Any:
    """A tiny model of a family; skips with the reason where the installed transformers does not have it."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


# ---- Names of arguments. ----


@pytest.mark.parametrize("how", ["past_key_values", "cache", "position"])
def test_a_cache_is_found_whatever_it_is_called(how: str) -> None:
    model, ids = ua.enable(tiny(), ALWAYS_SPARSE), prompt()["input_ids"]
    names = list(inspect.signature(model.forward).parameters)
    name = "cache" if "cache" in names else "past_key_values"
    if how == "cache" and how not in names:
        pytest.skip("this transformers has no such argument")

    def run(each: Any, cache: Any) -> torch.Tensor:
        out = []
        with torch.no_grad():
            for new in ids.split([35, 1, 1, 3], 1):
                if how == "position":
                    given = [None] * (names.index(name) + 1)
                    given[names.index("input_ids")], given[names.index(name)] = new, cache
                    out.append(each(*given).logits)
                else:
                    out.append(each(new, **{how: cache}).logits)
        return torch.cat(out, 1)

    cache = DynamicCache()
    torch.testing.assert_close(run(model, cache), run(tiny(), DynamicCache()), **CLOSE)
    assert all(layers_on_pages(cache))


@pytest.mark.parametrize("part", ["model", "model.layers.0"])
def test_parts_of_an_enabled_model(part: str) -> None:
    """The model without its head makes its own cache, and goes on with it; a layer alone attends as always."""
    model, plain, ids = ua.enable(tiny(), ALWAYS_SPARSE), tiny(), prompt()["input_ids"]

    def run(each: Any) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            cache = each.model(ids[:, :30]).past_key_values
            if part == "model":
                return each.model(ids[:, 30:31], past_key_values=cache).last_hidden_state, cache
            x = each.model.embed_tokens(ids[:, 30:31])
            turned = each.model.rotary_emb(x, torch.full((1, 1), 30))
            name = compat.cache_argument(each.model.layers[0].self_attn)
            return each.model.layers[0].self_attn(x, turned, None, **{name: cache})[0], cache

    (got, cache), (expected, _) = run(model), run(plain)
    torch.testing.assert_close(got, expected, **CLOSE)
    if part == "model":
        assert all(layers_on_pages(cache))


SMALL_FAMILIES: dict[str, dict[str, Any]] = {
    "GPTNeoX": {**SHAPE, "num_hidden_layers": 2},
    "Falcon": {**SHAPE, "alibi": False, "multi_query": True},
    "Bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "GPT2": {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": None},
}


@pytest.mark.parametrize("padding", [None, [0, 9]])
@pytest.mark.parametrize("family", ["GPTNeoX", "GPT2"])
def test_families_that_name_things_their_own_way(family: str, padding: Any) -> None:
    model = of_family(family, **SMALL_FAMILIES[family])
    inputs = prompt(padding=padding)
    expected = generate(model, inputs)
    output, messages = run_and_collect(lambda: generate(ua.enable(model, ALWAYS_SPARSE), inputs))
    assert_same(output, expected)
    assert layers_on_pages(output.past_key_values) == [True, True]
    assert messages == []


def test_a_family_that_could_never_be_sparse_keeps_its_own_attention() -> None:
    model = of_family("Bloom", **SMALL_FAMILIES["Bloom"])
    before = model.config._attn_implementation
    expected = generate(model, prompt())
    _, messages = run_and_collect(lambda: ua.enable(model, ALWAYS_SPARSE))
    assert model.config._attn_implementation == before
    assert_same(generate(model, prompt()), expected, tolerance=0)
    assert messages == [
        "unique_attn: BloomForCausalLM keeps its own attention and is dense: its family has eager attention only"
    ]


def test_a_family_without_the_interface_is_refused() -> None:
    model = of_family("Falcon", **SMALL_FAMILIES["Falcon"])
    expected = generate(model, prompt())
    with pytest.raises(ValueError, match="expected a family that uses transformers' AttentionInterface, got Falcon"):
        ua.enable(model)
    assert_same(generate(model, prompt()), expected, tolerance=0)
    with pytest.raises((KeyError, UnsupportedFeatureError)):  # the first is transformers' own
        generate(of_family("Falcon", "unique", **SMALL_FAMILIES["Falcon"]), prompt())


REFUSED = r"continuous batching .* keeps its keys in a cache of its own.*: use generate\(\), .* vLLM"


def test_continuous_batching_of_an_enabled_model_is_refused() -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    with pytest.raises(UnsupportedFeatureError, match=REFUSED):
        model.generate_batch(inputs=[prompt(1)["input_ids"][0].tolist()])
    assert_same(generate(model, prompt()), generate(tiny(), prompt()))
    assert "_Watched" not in str(type(ua.disable(model)).init_continuous_batching)


@pytest.mark.filterwarnings("ignore:The `paged|:FutureWarning")
def test_continuous_batching_by_name_is_refused() -> None:
    """Up to some 5.x it asks for ``paged|unique``; later, transformers refuses ``unique`` itself."""
    model = tiny()
    model.set_attn_implementation("paged|unique")
    if model.config._attn_implementation == "paged|unique":
        with pytest.raises(UnsupportedFeatureError, match=REFUSED):
            model(prompt()["input_ids"])
    else:
        assert model.config._attn_implementation == "unique"
        with pytest.raises(ValueError, match="unique is not supported for continuous batching"):
            model.generate_batch(inputs=[prompt(1)["input_ids"][0].tolist()])


# ---- Arguments that are not known. ----

DEEPSEEK = {
    **SHAPE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 8,
    "index_n_heads": 4,
    "index_head_dim": 32,
}


def test_a_family_with_a_sparse_attention_of_its_own_keeps_it() -> None:
    model, ids = of_family("DeepseekV32", **DEEPSEEK), prompt(1, 60)["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        _, messages = run_and_collect(lambda: ua.enable(model, ALWAYS_SPARSE))
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert messages == [
            "unique_attn: DeepseekV32ForCausalLM keeps its own attention and is dense: its attention is told indices, "
            "and unique_attn does not know what that changes"
        ]
        with pytest.raises(UnsupportedFeatureError, match="DeepseekV32Attention passes indices to its attention"):
            of_family("DeepseekV32", "unique", **DEEPSEEK)(ids)


def test_what_a_caller_passes_on_is_stock_attention_with_one_warning() -> None:
    ids, extra = prompt()["input_ids"], {"block_indices": torch.ones(3)}

    def run(model: Any) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            out = model(ids[:, :38], use_cache=True, **extra)
            one = model(ids[:, 38:39], past_key_values=out.past_key_values, **extra)
            return torch.cat([out.logits, one.logits], 1), out.past_key_values

    (got, cache), messages = run_and_collect(lambda: run(ua.enable(tiny(), ALWAYS_SPARSE)))
    torch.testing.assert_close(got, run(tiny())[0], **CLOSE)
    assert not any(layers_on_pages(cache))
    reason = "unique_attn does not know what block_indices would change"
    assert messages == [f"unique_attn: LlamaAttention is dense in this call: {reason}"]
    model = ua.enable(tiny(), SMALL, train=ua.TrainConfig()).train()
    loss, messages = run_and_collect(lambda: model(ids, labels=ids, **extra).loss)
    torch.testing.assert_close(loss, tiny().train()(ids, labels=ids).loss)
    assert messages == [f"unique_attn: LlamaAttention trains dense: {reason}"]


@pytest.mark.parametrize("name", ["position_ids", "use_cache", "output_hidden_states", "seq_idx"])
def test_harmless_arguments_change_nothing(name: str) -> None:
    model, ids = ua.enable(tiny(), ALWAYS_SPARSE), prompt()["input_ids"]
    values = {"position_ids": torch.full((2, 1), 30), "use_cache": True, "output_hidden_states": True}
    with torch.no_grad():
        cache = model(ids[:, :30]).past_key_values
        model(ids[:, 30:31], past_key_values=cache, **{name: values.get(name, torch.zeros(2, 1))})
    assert all(layers_on_pages(cache))


# ---- Modules that change what they were given. ----


@pytest.mark.parametrize("keep", [2048, 16])
def test_a_family_that_computes_with_its_cached_values(keep: int) -> None:
    """Doge makes a mask of its own from all cached values."""
    model = of_family("Doge", **{**SHAPE, "keep_window_size": keep})
    inputs = prompt(padding=[0, 9])
    expected = generate(model, inputs)
    output, messages = run_and_collect(lambda: generate(ua.enable(model, ALWAYS_SPARSE), inputs))
    assert_same(output, expected)
    assert not any(layers_on_pages(output.past_key_values))
    reason = "it computes with the keys or values that it gets from its cache"
    assert messages == [f"unique_attn: DogeAttention stays dense: {reason}"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_module_that_changes_its_mask(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The mask that counts is the one that the attention function gets."""

    def hiding(function: Any) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            shown = torch.ones(2, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
            shown[:, :, :, 3] = False
            mask = shown if dtype == torch.bool else torch.where(shown, 0.0, torch.finfo(dtype).min)
            return function(module, query, key, value, mask, *args, **kwargs)

        return attend

    model = tiny()
    interface = compat.AttentionInterface._global_mapping
    monkeypatch.setitem(interface, "sdpa", hiding(interface["sdpa"]))
    expected = generate(model, prompt())
    monkeypatch.setitem(interface, "unique", hiding(unique_attention_forward))
    output = generate(ua.enable(model, ALWAYS_SPARSE), prompt())
    assert_same(output, expected)
    assert not any(layers_on_pages(output.past_key_values))


def test_masks_that_are_written_to_between_calls() -> None:
    """One mask tensor for several calls, with other contents."""
    ids = prompt(length=42)["input_ids"]

    def run(model: Any) -> tuple[torch.Tensor, Any]:
        mask, out = torch.ones(2, 1, 1, 41, dtype=torch.bool), []
        with torch.no_grad():
            cache = model(ids[:, :40], use_cache=True).past_key_values
            for hidden in (None, 5):
                if hidden is not None:
                    mask[..., hidden] = False
                out.append(model(ids[:, 40:41], attention_mask=mask, past_key_values=cache).logits)
                cache.crop(-1)
        return torch.cat(out, 1), cache

    (got, cache), (expected, _) = run(ua.enable(tiny(), ALWAYS_SPARSE)), run(tiny())
    torch.testing.assert_close(got, expected, **CLOSE)
    assert not any(layers_on_pages(cache))


# ---- Attention of the user's own over our caches. ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stock_attention_reads_caches_on_pages(implementation: str) -> None:
    model, ids = ua.enable(tiny(), ALWAYS_SPARSE), prompt()["input_ids"]
    with torch.no_grad():
        expected = tiny()(ids).logits
        cache = model(ids[:, :38]).past_key_values
        model(ids[:, 38:39], past_key_values=cache)
        assert all(layers_on_pages(cache))
        model.set_attn_implementation(implementation)
        got = model(ids[:, 39:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, 39:], **CLOSE)
    assert not any(layers_on_pages(cache))


# ---- Gradient checkpointing. ----


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_checkpointing_the_whole_model(mode: Any, use_cache: bool | None, reentrant: bool) -> None:
    inputs = prompt(2, 60, [0, 13])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def run(checkpointed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = ua.enable(tiny(), SMALL, train=ua.TrainConfig(mode=mode, tau=2.0)).train()

        def logits(embeddings: torch.Tensor) -> torch.Tensor:
            extra = {} if use_cache is None else {"use_cache": use_cache}
            return model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], **extra).logits

        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        out = checkpoint(logits, embeddings, use_reentrant=reentrant) if checkpointed else logits(embeddings)
        loss = model.loss_function(logits=out, labels=labels, vocab_size=VOCAB)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (loss, grads), (expected, expected_grads) = run(True), run(False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads)
    plain = tiny().train()(**inputs, labels=labels).loss
    assert abs(float(plain) - float(loss)) > 1e-3  # the mask was there


# ---- Memory. ----


@pytest.mark.parametrize("make", ["generate's own", "DynamicCache()", "DynamicCache(config)", "UniqueCache"])
@pytest.mark.parametrize("end", ["on pages", "in the middle of a forward"])
def test_caches_are_freed_when_they_are_dropped(make: str, end: str) -> None:
    model, inputs = ua.enable(tiny(), SMALL), prompt()
    makers = {
        "generate's own": lambda: None,
        "DynamicCache()": DynamicCache,
        "DynamicCache(config)": lambda: DynamicCache(config=model.config),
        "UniqueCache": lambda: ua.UniqueCache(SMALL, model.config),
    }
    if end != "on pages":
        model.model.layers[-1].mlp.register_forward_hook(_raise_in_a_step)
    gc.collect()
    gc.disable()
    try:
        cache = makers[make]()
        if end == "on pages":
            cache = generate(model, inputs, **({} if cache is None else {"past_key_values": cache})).past_key_values
            assert all(layers_on_pages(cache))
        else:
            cache = DynamicCache() if cache is None else cache
            with pytest.raises(KeyError):
                generate(model, inputs, past_key_values=cache)
        watched = [weakref.ref(cache), weakref.ref(cache.layers[0])]
        watched += [weakref.ref(cache.layers[0]._pages.k)] * (end == "on pages")
        del cache
        if end == "on pages":
            assert [each() for each in watched] == [None] * 3
    finally:
        gc.enable()
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)


def _raise_in_a_step(module: Any, args: Any, output: torch.Tensor) -> None:
    if output.shape[1] == 1:
        raise KeyError


def test_decoders_are_freed_when_they_are_dropped() -> None:
    model = ua.enable(tiny(), SMALL)
    gc.collect()
    gc.disable()
    try:
        decoder = ua.GraphedDecoder(model, 2, 64)
        decoder.generate(prompt()["input_ids"], 5)
        watched = [weakref.ref(decoder), weakref.ref(decoder.cache), weakref.ref(decoder.cache.layers[0].storage.k)]
        del decoder
        assert [each() for each in watched] == [None] * 3
    finally:
        gc.enable()
