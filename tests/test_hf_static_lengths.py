"""Static caches whose length is no multiple of a page: what is stored has more places, and nobody else sees them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from hf_helpers import SMALL, generate, prompt, tiny
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer

import unique_attn as ua
from unique_attn.hf.static_layer import LISTED

pytestmark = [
    pytest.mark.skipif(
        not hasattr(StaticLayer(8), "cumulative_length"),
        reason="transformers 4 counts the tokens of a static cache elsewhere",
    ),
    pytest.mark.filterwarnings("ignore:unique_attn:UserWarning"),
]
PADDING = [0, 9]
LENGTH = 71
SMALLEST = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
    "num_key_value_heads": 2, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
OWN_KEYS = {  # families that attend to other keys than the cache returned, or look at these before
    "DiffLlama": {},
    "Doge": {},
    "DeepseekV2": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip


def small(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALLEST, **OWN_KEYS[family]})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("new_tokens", [11, 13])
@pytest.mark.parametrize("family", OWN_KEYS)
def test_dense_families(family: str, new_tokens: int, compiled: bool):
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    inputs = prompt(length=60, padding=PADDING)
    kwargs: dict[str, Any] = {"cache_implementation": "static", "max_new_tokens": new_tokens}
    if compiled:  # by transformers, on the CPU too
        kwargs["compile_config"] = CompileConfig(backend="eager", fullgraph=True, mode=None)
        kwargs["compile_config"]._compile_all_devices = True
    torch._dynamo.reset()
    expected = generate(small(family), inputs, **kwargs)
    torch._dynamo.reset()
    found = generate(ua.enable(small(family), SMALL), inputs, **kwargs)
    assert torch.equal(found.sequences, expected.sequences)


def steps(model: Any, kind: str) -> list[torch.Tensor]:
    """Logits of a prompt and of two steps whose masks are as long as the user's cache."""
    inputs = prompt(length=60, padding=PADDING)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    found = []
    with torch.no_grad():
        found.append(model(**inputs, past_key_values=cache).logits[:, -1])
        for step in range(2):
            mask = torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool)
            mask[..., : 61 + step] = True
            for row, hidden in enumerate(PADDING):
                mask[row, ..., :hidden] = False
            if kind == "float":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            places = torch.tensor([[60 + step - hidden] for hidden in PADDING])
            ids = torch.full((2, 1), 5 + step)
            found.append(model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1])
    assert all(layer.keys.shape[2] == LENGTH for layer in cache.layers)
    return found


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("budget", ["small", "dense", "all"])
def test_masks_as_long_as_the_cache(kind: str, budget: str):
    settings = {"small": {}, "dense": {"dense_below": 100}, "all": {"budget": 72, "dense_below": 0}}[budget]
    model = ua.enable(tiny("llama"), ua.UniqueConfig.from_dict({**SMALL.to_dict(), **settings}))
    expected, found = steps(tiny("llama"), kind), steps(model, kind)
    close = [torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True)]
    assert all(close) == (budget != "small")
    assert close[0]


def test_weights_are_those_of_stock():
    stock, model = tiny("llama"), ua.enable(tiny("llama"), SMALL)
    shapes = []
    for each in (stock, model):
        each.set_attn_implementation("eager") if each is stock else None
        cache = StaticCache(config=each.config, max_cache_len=LENGTH)
        with torch.no_grad():
            each(**prompt(length=60), past_key_values=cache)
            out = each(torch.full((2, 1), 5), past_key_values=cache, output_attentions=True)
        shapes.append([weights.shape for weights in out.attentions])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("padding", [None, PADDING])
def test_a_token_too_many_is_an_error(padding: list[int] | None):
    model, inputs = ua.enable(tiny("llama"), SMALL), prompt(length=70, padding=padding)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        model(inputs["input_ids"][:, :1], attention_mask=mask[:, :71], past_key_values=cache)
        with pytest.raises(IndexError, match="expected at most 71 tokens, got 72"):
            model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("family", ["Doge", "llama"])
def test_a_prompt_in_inference_mode(family: str):
    """What is made there is written to outside of it: rows of stock's length of a layer that stays dense, whole pages
    of one that was dense until it was reset."""
    model = ua.enable(small(family) if family in OWN_KEYS else tiny(family), SMALL)
    inputs = prompt(length=60, padding=PADDING)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    for turn in range(2):
        with torch.inference_mode():
            model(**inputs, past_key_values=cache)
        if turn == 0:
            for layer in cache.layers:
                layer.stay_dense(LISTED)
            cache.reset()
    with torch.no_grad():
        out = model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
    assert out.logits.isfinite().all()
    assert all(layer.indexed == (family not in OWN_KEYS) for layer in cache.layers)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str):
    model, inputs = ua.enable(tiny("llama"), SMALL), prompt(length=60, padding=PADDING)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        other = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        logits = [
            model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=each).logits
            for each in (cache, other)
        ]
    assert other.layers[0].keys.shape == cache.layers[0].keys.shape
    assert torch.allclose(*logits, atol=1e-5) or how == "pickle"  # a stock cache then, which is dense in its first call
