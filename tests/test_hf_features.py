"""Features beyond plain causal attention: each works, or goes dense with one warning, or is a named error."""

from __future__ import annotations

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
    logits,
    prompt,
    run_and_collect,
    tiny,
)
from transformers import DynamicCache

import unique_attn as ua
from unique_attn.hf import compat
from unique_attn.hf.attention import UnsupportedFeatureError, additive_mask, unique_attention_forward
from unique_attn.hf.cache import adopt
from unique_attn.hf.layer import UniqueLayer
from unique_attn.ops import NotDifferentiableError

OTHER_CACHE = (
    "unique_attn: LlamaAttention is dense: its keys are not those of a layer of a DynamicCache or StaticCache "
    "(latent, quantized, offloaded and encoder-decoder caches have no pages, static ones before transformers 5 "
    "neither, and a layer that is called by itself gets none)"
)


@pytest.fixture(autouse=True)
def _fresh_warnings():
    compat._warned.clear()


def enabled(config: ua.UniqueConfig = ALWAYS_SPARSE, family: str = "llama", **kwargs):
    return ua.enable(tiny(family, **kwargs), config)


def steps(model, ids, masks, cache=None, **kwargs):
    """Logits of successive calls with the masks given (``[B, length]``, 4D, or None)."""
    out, begin = [], 0 if cache is None else cache.get_seq_length()
    with torch.no_grad():
        for mask in masks:
            end = mask.shape[-1]
            result = model(ids[:, begin:end], attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
            cache, begin = result.past_key_values, end
            out.append(result.logits)
    return torch.cat(out, 1), cache


# ---- Softcap, sinks, sliding windows. ----


def test_softcap_is_dense_with_one_warning():
    model = tiny("gemma2", "unique")
    output, messages = run_and_collect(lambda: generate(model, prompt()))
    assert_same(output, generate(tiny("gemma2"), prompt()))
    assert messages == ["unique_attn: Gemma2Attention stays dense: it softcaps its logits"]


def test_sliding_windows_stay_stock_without_a_warning():
    output, messages = run_and_collect(lambda: generate(enabled(family="gemma3"), prompt()))
    assert messages == []
    assert [layer.is_sliding for layer in output.past_key_values.layers] == [True, False, False]
    _, messages = run_and_collect(lambda: enabled(family="mistral-window"))
    assert messages == ["unique_attn: every layer of MistralForCausalLM has a sliding window, so none is sparse"]


def test_sliding_windows_in_a_cache_without_a_config():
    """There, every layer keeps all keys, and the mask alone makes the window."""
    inputs = prompt(padding=[0, 9], length=50)
    output = generate(enabled(family="gemma3"), inputs, past_key_values=DynamicCache())
    assert_same(output, generate(tiny("gemma3"), inputs, past_key_values=DynamicCache()))
    assert layers_on_pages(output.past_key_values) == [False, True, True]


def test_attention_sinks_matter():
    model = enabled(family="gpt-oss")
    with_sinks = logits(generate(model, prompt()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-1e4)
    assert not torch.allclose(logits(generate(model, prompt())), with_sinks, atol=1e-2)


# ---- Masks. ----


def test_holes_in_the_mask_go_dense():
    """A second turn whose rows are padded in the middle."""
    ids = prompt(length=50)["input_ids"]
    mask = prompt(length=50, padding=[0, 9])["attention_mask"]
    mask[0, 42:45] = 0
    masks = [mask[:, :38], mask[:, :39], mask[:, :40], *(mask[:, :end] for end in range(47, 51))]
    (output, cache), messages = run_and_collect(lambda: steps(enabled(), ids, masks))
    expected, _ = steps(tiny(), ids, masks)
    shown = torch.cat([mask[:, : m.shape[1]][:, -n:] for m, n in zip(masks, (38, 1, 1, 7, 1, 1, 1))], 1).bool()
    torch.testing.assert_close(output[shown], expected[shown], rtol=2e-4, atol=2e-4)
    assert not any(layers_on_pages(cache))
    assert messages == [
        "unique_attn: an attention mask is not causal with left padding: dense attention for this cache"
    ]


def test_hidden_new_token_goes_dense():
    ids, mask = prompt(length=44).values()
    mask[1, 41] = 0
    masks = [mask[:, :end] for end in (38, 39, 40, 41, 42, 43, 44)]
    output, cache = steps(enabled(), ids, masks)
    expected, _ = steps(tiny(), ids, masks)
    torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], rtol=2e-4, atol=2e-4)
    assert not any(layers_on_pages(cache))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_custom_4d_masks(dtype):
    """A tree of drafts between ordinary steps: dense in that call, pages before and after."""
    ids = prompt(1, length=48)["input_ids"]
    ones = torch.ones(1, 48, dtype=torch.long)
    tree = torch.ones(1, 1, 4, 44, dtype=torch.bool)
    tree[0, 0, :, 40:] = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    if dtype.is_floating_point:
        tree = torch.where(tree, 0.0, torch.finfo(dtype).min)
    masks = [ones[:, :38], ones[:, :39], ones[:, :40], tree, ones[:, :45], ones[:, :46]]
    output, cache = steps(enabled(), ids, masks)
    expected, _ = steps(tiny(), ids, masks)
    torch.testing.assert_close(output, expected, rtol=2e-4, atol=2e-4)
    assert all(layers_on_pages(cache))


def test_causal_4d_masks_are_recognized():
    ids = prompt(1, length=42)["input_ids"]
    full = torch.ones(1, 1, 42, 42, dtype=torch.bool).tril()
    masks = [full[:, :, :40, :40], full[:, :, 40:41, :41], full[:, :, 41:, :]]
    output, cache = steps(enabled(), ids, masks)
    expected, _ = steps(tiny(), ids, masks)
    torch.testing.assert_close(output, expected, rtol=2e-4, atol=2e-4)
    assert all(layers_on_pages(cache))


@pytest.mark.parametrize("shown", ["no mask", "all ones"])
def test_padding_must_stay_hidden(shown):
    ids, mask = prompt(padding=[0, 9]).values()
    model = enabled()
    _, cache = steps(model, ids, [mask[:, :38], mask[:, :39]])
    wrong = None if shown == "no mask" else torch.ones_like(mask)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected the left padding of \[0, 9\] tokens to stay hidden"
    ):
        model(ids[:, 39:40], attention_mask=wrong, past_key_values=cache)


# ---- Attention weights, gradients, dropout, compilation. ----


@pytest.mark.filterwarnings("ignore:.*output_attentions.*:UserWarning")
def test_output_attentions():
    ids, mask = prompt(padding=[0, 9]).values()
    model, reference = enabled(), tiny(implementation="eager")
    masks = [mask[:, :38], mask[:, :39]]
    _, cache = steps(model, ids, masks)
    _, expected_cache = steps(reference, ids, masks)
    with torch.no_grad():
        kwargs = {"attention_mask": mask, "output_attentions": True}
        output, messages = run_and_collect(lambda: model(ids[:, 39:40], past_key_values=cache, **kwargs))
        expected = reference(ids[:, 39:40], past_key_values=expected_cache, **kwargs)
    assert len(output.attentions) == 3
    for weights, expected_weights in zip(output.attentions, expected.attentions):
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, expected.logits, rtol=2e-4, atol=2e-4)
    assert messages == ["unique_attn: LlamaAttention is dense in this call: output_attentions needs all weights"]
    assert all(layers_on_pages(cache))


@pytest.mark.parametrize("tokens", [1, 40], ids=["decode", "prefill"])
def test_gradients_through_pages_are_named_errors(tokens):
    model = enabled()
    ids = prompt(length=80)["input_ids"]
    cache = model(ids[:, :38], use_cache=True).past_key_values
    model(ids[:, 38:39], past_key_values=cache)
    output = model(ids[:, 39 : 39 + tokens], past_key_values=cache).logits
    with pytest.raises(NotDifferentiableError, match="has no gradient"):
        output.sum().backward()


def test_training_without_a_cache_has_stock_gradients():
    ids = prompt()["input_ids"]
    grads = []
    for model in (enabled(), tiny()):
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*grads)


def test_dropout_is_dense():
    model = enabled()
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = prompt()["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :38], use_cache=True).past_key_values
        _, messages = run_and_collect(lambda: model(ids[:, 38:39], past_key_values=cache))
    assert messages == ["unique_attn: LlamaAttention is dense in this call: it uses dropout"]


def test_compiled_model_is_dense():
    model = enabled()
    ids, mask = prompt(padding=[0, 9]).values()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with torch.no_grad():
        output = compiled(ids[:, :38], attention_mask=mask[:, :38], use_cache=True)
        step = compiled(ids[:, 38:39], attention_mask=mask[:, :39], past_key_values=output.past_key_values)
        expected = tiny()(ids[:, :39], attention_mask=mask[:, :39]).logits
    torch.testing.assert_close(step.logits[:, -1], expected[:, -1], rtol=2e-4, atol=2e-4)


# ---- Other caches and other models. ----


class _OtherCache(DynamicCache):
    """A cache of another make, as a quantized one is."""


def test_other_caches_are_dense_with_one_warning():
    model = enabled()
    cache = _OtherCache(config=model.config)
    output, messages = run_and_collect(lambda: generate(model, prompt(), past_key_values=cache))
    assert_same(output, generate(tiny(), prompt()))
    assert messages == [OTHER_CACHE]


def test_offloaded_caches_are_left_alone():
    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    cache.offloading = True  # running such a cache needs a GPU
    adopt(cache, ALWAYS_SPARSE)
    assert type(cache.layers[0]) is not UniqueLayer
    cache.offloading = False
    adopt(cache, ALWAYS_SPARSE)
    assert type(cache.layers[0]) is UniqueLayer


def test_encoder_decoder():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=128,
        init_std=0.3,
        pad_token_id=0,
        forced_eos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    inputs = prompt(padding=[0, 9])
    expected = generate(model, inputs)
    output, messages = run_and_collect(lambda: generate(ua.enable(model, ALWAYS_SPARSE), inputs))
    assert_same(output, expected)
    assert messages == [
        "unique_attn: BartForConditionalGeneration keeps its own attention and is dense: it is an encoder-decoder model"
    ]


def test_vision_language_model_keeps_its_vision_attention():
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config={**SHAPE, "head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    inputs = prompt(padding=[0, 9])
    inputs["input_ids"].clamp_(max=VOCAB - 4)
    expected = generate(model, inputs, suppress_tokens=[VOCAB - 1])
    ua.enable(model, ALWAYS_SPARSE)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "unique"
    output = generate(model, inputs, suppress_tokens=[VOCAB - 1])
    assert_same(output, expected)
    assert all(layers_on_pages(output.past_key_values))
    ua.disable(model)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_head_dim_that_the_ops_do_not_take():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, "head_dim": 20})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = generate(model, prompt())
    output, messages = run_and_collect(lambda: generate(ua.enable(model, ALWAYS_SPARSE), prompt()))
    assert_same(output, expected)
    assert messages == ["unique_attn: LlamaAttention stays dense: its head dim 20 is not a multiple of 8 up to 256"]


def test_module_that_changes_its_cached_keys(monkeypatch):
    """Such a module could not do so with pages; it is dense."""

    def doubled(module, query, key, value, *args, **kwargs):
        return unique_attention_forward(module, query, key * 2, value, *args, **kwargs)

    monkeypatch.setitem(compat.AttentionInterface._global_mapping, "unique", doubled)
    output, messages = run_and_collect(lambda: generate(enabled(SMALL), prompt()))
    assert not any(layers_on_pages(output.past_key_values))
    assert messages == [
        "unique_attn: LlamaAttention stays dense: it changes the keys or values that it gets from its cache"
    ]


def test_shared_kv_layers_are_dense():
    assert not compat.shares_kv(transformers.LlamaConfig())
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **{**SHAPE, "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 96},
        layer_types=["full_attention"] * 4,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = transformers.Gemma3nForCausalLM(config).eval()
    expected = generate(model, prompt())
    output, messages = run_and_collect(lambda: generate(ua.enable(model, ALWAYS_SPARSE), prompt()))
    assert_same(output, expected)
    assert messages == ["unique_attn: Gemma3nTextAttention stays dense: layers of its model share keys and values"]


class _Bare(torch.nn.Module):
    layer_idx = 0


def test_feature_without_any_fallback_is_a_named_error():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(UnsupportedFeatureError, match="_Bare asks for softcap, which sdpa cannot compute"):
        unique_attention_forward(_Bare(), q, q, q, None, softcap=3.0)


def test_additive_mask():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    least = torch.finfo(q.dtype).min
    expected = torch.tensor([[0, least, least], [0, 0, least], [0, 0, 0]])[None, None]
    assert torch.equal(additive_mask(None, q, k, causal=True), expected)
    assert additive_mask(None, q[:, :, :1], k, causal=True) is None
    assert additive_mask(None, q, k, causal=False) is None
    assert additive_mask(expected, q, k, causal=True) is expected
