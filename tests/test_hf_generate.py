"""``generate`` in all its modes: full budgets against stock attention, small ones against a PyTorch simulation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hf_helpers import ALWAYS_SPARSE, SMALL, VOCAB, assert_same, generate, layers_on_pages, prompt, tiny
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import unique_attn as ua
from unique_attn import reference

# ---- The simulation: stock cache, per step the oracle's selection over all keys, in fp64. ----


def simulated_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    config: ua.UniqueConfig = module.config.simulated
    length, num_tokens = key.shape[2], query.shape[2]
    if num_tokens > config.max_decode_tokens or length == num_tokens or length < config.dense_limit:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    out = []
    for b in range(len(query)):
        padding = 0 if attention_mask is None else int((~attention_mask[b, 0, -1]).sum())
        out.append(oracle_row(query[b], key[b, :, padding:], value[b, :, padding:], config, scaling))
    return torch.stack(out).to(query.dtype), None


def oracle_row(q, k, v, config, scaling):
    """One sequence: queries ``[Hq, T, D]`` of the last T tokens, keys and values ``[H, L, D]``."""
    heads, length, dim = k.shape
    q, keys, values = q.double().unflatten(0, (heads, -1)), k.double(), v.double()
    scaling = dim**-0.5 if scaling is None else scaling
    size, out = config.page_size, []
    for t in range(q.shape[2]):
        seen = length - q.shape[2] + t + 1
        stored = {"index_format": config.index_format, "dtype": k.dtype}
        pages = [reference.encode_entry(page, config.rule, **stored) for page in keys[:, :seen].split(size, dim=1)]
        entry = reference.decode_index(torch.stack(pages, 1), rule=config.rule, head_dim=dim, **stored)
        entry = tuple(part.double() for part in entry)
        scores = reference.rule_score(q[:, :, t], entry, config.rule, config.spread_weight).amax(1)
        selected = reference.topk_pages(
            scores[None, None].to(reference.score_dtype(k.dtype)),
            torch.tensor([seen]),
            config.num_pages,
            page_size=size,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
        )[0, 0]
        page_of_token = torch.arange(seen) // size
        visible = (selected[:, :, None] == page_of_token).any(1)  # [H, seen]
        logits = scaling * q[:, :, t] @ keys[:, :seen].mT
        weights = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        out.append((weights @ values[:, :seen]).flatten(0, 1))
    return torch.stack(out)


@pytest.fixture(autouse=True)
def _register_simulation():
    AttentionInterface.register("simulated", simulated_attention)
    AttentionMaskInterface.register("simulated", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield
    AttentionInterface._global_mapping.pop("simulated")
    AttentionMaskInterface._global_mapping.pop("simulated")


def simulated(config: ua.UniqueConfig, family: str = "llama"):
    model = tiny(family)
    model.set_attn_implementation("simulated")
    model.config.simulated = config
    return model


def enabled(config: ua.UniqueConfig = ALWAYS_SPARSE, family: str = "llama"):
    return ua.enable(tiny(family), config)


SETTINGS = [
    SMALL,
    ua.UniqueConfig(rule="unique", page_size=4, budget=16, dense_below=0, block_size=4, lambda_=0.7),
    ua.UniqueConfig(rule="minmax", budget=24, dense_below=0, sink_pages=0, recent_pages=2),
    ua.UniqueConfig(rule="mean", page_size=16, budget=48, dense_below=70, block_size=16),
    ua.UniqueConfig(index_format="compressed", page_size=4, budget=24, dense_below=0, block_size=8),
]


@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["even", "padded"])
@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: f"{config.rule}-{config.index_format}")
def test_small_budget_equals_simulation(config, padding):
    inputs = prompt(length=61, padding=padding)
    expected = generate(simulated(config), inputs, tokens=16)
    output = generate(enabled(config), inputs, tokens=16)
    assert_same(output, expected)
    assert all(layers_on_pages(output.past_key_values))
    dense = generate(tiny(), inputs, tokens=16)
    assert not torch.allclose(torch.stack(dense.logits), torch.stack(output.logits), atol=1e-2)  # it is sparse


MODES = {
    "sample": {"do_sample": True, "top_k": 20},
    "several-samples": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "prompt-lookup": {"prompt_lookup_num_tokens": 5, "eos_token_id": VOCAB},  # 4.57 wants one; this never comes
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", ["full", "small"])
def test_modes(mode, budget):
    config = ALWAYS_SPARSE if budget == "full" else SMALL
    kwargs = {**MODES[mode], "output_logits": False, "return_dict_in_generate": True}
    batch = 1 if mode == "prompt-lookup" else 2
    inputs = prompt(batch, length=50, padding=[0, 9][:batch])
    if mode == "prompt-lookup":  # a prompt that repeats itself, so that drafts are accepted
        inputs["input_ids"][:, 10:] = inputs["input_ids"][:, :10].repeat(1, 4)

    def run(model):
        torch.manual_seed(3)
        return generate(model, inputs, tokens=20, **kwargs)

    expected = run(tiny() if budget == "full" else simulated(config))
    output = run(enabled(config))
    assert torch.equal(output.sequences, expected.sequences)
    assert all(layers_on_pages(output.past_key_values))


@pytest.mark.parametrize("drafts", [4, 25])
def test_assisted_decoding(drafts):
    """More drafts than the ops take query tokens run in pieces, each token with its own selection."""
    inputs = prompt(1, length=50)
    assistant = tiny()
    with torch.no_grad():  # mostly right, so that some drafts are accepted and some are not
        for parameter in assistant.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.002)
    assistant.generation_config.num_assistant_tokens = drafts
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    # The padding token is not generated: transformers would take it for padding when it makes the assistant's mask.
    settings = {"tokens": 30, "suppress_tokens": [0], "output_logits": False, "assistant_model": assistant}

    expected = generate(simulated(SMALL), inputs, **settings)
    output = generate(enabled(SMALL), inputs, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(layers_on_pages(output.past_key_values))


@pytest.mark.parametrize("tokens", [2, 16, 21])
def test_tokens_at_once_equal_one_by_one(tokens):
    """Verified drafts get the logits that greedy search would have got."""
    model = enabled(SMALL)
    inputs = prompt(length=60 + tokens, padding=[0, 9])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def run(pieces):
        logits, cache, begin = [], None, 0
        with torch.no_grad():
            for size in pieces:
                end = begin + size
                out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
                logits.append(out.logits)
                begin, cache = end, out.past_key_values
        return torch.cat(logits, 1)

    torch.testing.assert_close(run([60, tokens]), run([60] + [1] * tokens), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("more", [5, 45], ids=["short", "long"])
def test_continued_generation_with_a_kept_cache(more):
    """A second turn: few new tokens are decoded sparsely, many are a dense prefill on top of the pages."""
    inputs = prompt(padding=[0, 9])

    def run(model):
        first = generate(model, inputs, tokens=6)
        new = prompt(length=more, seed=7)["input_ids"]
        ids = torch.cat([first.sequences, new], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - 40), value=1)
        second = {"input_ids": ids, "attention_mask": mask}
        return generate(model, second, tokens=8, past_key_values=first.past_key_values)

    expected = run(tiny())
    output = run(enabled())
    assert_same(output, expected)
    assert all(layers_on_pages(output.past_key_values))


@pytest.mark.parametrize("kind", ["adopted", "explicit"])
def test_prefix_caching(kind):
    """One prompt in the cache, copied for each question; the copies share the prompt's blocks."""
    model = enabled(SMALL)
    inputs = prompt(1)
    questions = [prompt(1, length=4, seed=seed)["input_ids"] for seed in (11, 12, 13)]

    def answer(model, question, cache):
        ids = torch.cat([inputs["input_ids"], question], 1)
        mask = torch.ones_like(ids)
        return generate(model, {"input_ids": ids, "attention_mask": mask}, tokens=20, past_key_values=cache)

    prefix = DynamicCache(config=model.config) if kind == "adopted" else ua.UniqueCache(SMALL, model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :-1], past_key_values=prefix)
        model(inputs["input_ids"][:, -1:], past_key_values=prefix)  # a step, so that the prefix is on pages
    assert all(layers_on_pages(prefix))
    before = [layer.keys for layer in prefix.layers]
    copies = [copy.deepcopy(prefix) if kind == "adopted" else prefix.fork() for _ in questions]
    outputs = [answer(model, question, cache) for question, cache in zip(questions, copies)]

    pool = prefix.layers[0]._table.pool
    assert copies[0].layers[0]._table.pool is pool
    assert pool.ref_count(pool.blocks(prefix.layers[0]._table.seqs[0])[0]) == 4
    pool.check_invariants()
    for layer, keys in zip(prefix.layers, before):
        assert torch.equal(layer.keys, keys)
    for question, output in zip(questions, outputs):
        alone = simulated(SMALL)
        cache = DynamicCache(config=alone.config)
        with torch.no_grad():
            alone(inputs["input_ids"][:, :-1], past_key_values=cache)
            alone(inputs["input_ids"][:, -1:], past_key_values=cache)
        assert_same(output, answer(alone, question, cache))
    del copies, outputs, output, cache
    assert pool.ref_count(pool.blocks(prefix.layers[0]._table.seqs[0])[0]) == 1  # gone caches give their blocks back


def test_loaded_as_unique(tmp_path):
    """Without ``enable``: the first call puts the hooks there, with default settings."""
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="unique").eval()
    inputs = prompt(padding=[0, 9], length=505)
    output = generate(model, inputs, tokens=8)
    assert all(layers_on_pages(output.past_key_values))  # since the context of 512 tokens in the last step
    again = generate(model, inputs, tokens=8)
    expected = generate(tiny(), inputs, tokens=8)
    assert_same(output, expected)
    assert_same(again, expected)


def test_short_contexts_stay_dense():
    config = ua.UniqueConfig(budget=64)
    output = generate(enabled(config), prompt(length=40), tokens=20)
    assert not any(layers_on_pages(output.past_key_values))
    output = generate(enabled(config), prompt(length=60), tokens=20)
    assert all(layers_on_pages(output.past_key_values))


def test_short_contexts_are_on_pages_where_steps_are_captured(monkeypatch):
    monkeypatch.setattr(ua.hf.layer, "CAPTURES", ("cpu",))
    output = generate(enabled(ua.UniqueConfig(budget=64)), prompt(length=10, padding=[0, 3]), tokens=20)
    assert all(layers_on_pages(output.past_key_values))
    assert_same(output, generate(tiny(), prompt(length=10, padding=[0, 3]), tokens=20))
    output = generate(enabled(ua.UniqueConfig(budget=64, dense_below=100)), prompt(length=66), tokens=20)
    assert not any(layers_on_pages(output.past_key_values))


def test_dense_layers():
    model = enabled(ua.UniqueConfig(budget=32, dense_below=0, dense_layers=(0, 2)))
    with ua.record_selection(model) as records:
        output = generate(model, prompt())
    assert layers_on_pages(output.past_key_values) == [False, True, False]
    assert {record.layer_idx for record in records} == {1}


def test_plain_forward_calls_without_masks():
    ids = prompt()["input_ids"]

    def run(model):
        logits, cache = [], None
        with torch.no_grad():
            for token in ids.split([30, 1, 1, 3, 1, 4], dim=1):
                out = model(token, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits)
        return torch.cat(logits, 1), cache

    expected, _ = run(tiny())
    output, cache = run(enabled())
    torch.testing.assert_close(output, expected, rtol=2e-4, atol=2e-4)
    assert all(layers_on_pages(cache))


def test_inference_mode_and_back():
    model, ids = enabled(), prompt()["input_ids"]
    with torch.inference_mode():
        cache = model(ids[:, :30], use_cache=True).past_key_values
        model(ids[:, 30:31], past_key_values=cache)
    with torch.no_grad():
        output = model(ids[:, 31:], past_key_values=cache).logits
        expected = tiny()(ids).logits[:, 31:]
    torch.testing.assert_close(output, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_prompts_in_chunks_that_begin_in_padding(chunk: int):
    """A token of a row's padding says nothing against pages: the next ones may be on them."""
    inputs = prompt(length=40, padding=[0, 9])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = tiny().generate(**inputs, **settings, prefill_chunk_size=chunk)
    model = ua.enable(tiny(), ua.UniqueConfig(budget=64, dense_below=0, block_size=16))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="unique_attn")
        with ua.record_selection(model) as records:
            found = model.generate(**inputs, **settings, prefill_chunk_size=chunk)
    assert torch.equal(found, expected)
    assert len(records) >= 5 * model.config.num_hidden_layers
