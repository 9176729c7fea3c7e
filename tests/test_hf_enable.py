"""Registration, switching a model on and off, recording, and bad arguments of the entry points."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from hf_helpers import ALWAYS_SPARSE, VOCAB, assert_same, generate, layers_on_pages, logits, prompt, tiny
from transformers import AttentionInterface, AttentionMaskInterface

import unique_attn as ua
from unique_attn.hf.hooks import hook_of


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Registration. ----


def test_registered_in_both_interfaces():
    assert "unique" in AttentionInterface().valid_keys()
    assert "unique" in AttentionMaskInterface().valid_keys()


@pytest.mark.parametrize("first", ["unique_attn", "transformers.modeling_utils"])
def test_registered_whichever_is_imported_first(first):
    out = run_python(
        f"import importlib, sys; importlib.import_module({first!r})\n"
        "import unique_attn\n"
        f"assert ('transformers' in sys.modules) == ({first!r} != 'unique_attn')\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "print('unique' in AttentionInterface(), 'unique' in AttentionMaskInterface())\n"
        "import transformers.modeling_utils as m, inspect\n"
        "assert type(m.__spec__.loader).__module__ != 'unique_attn.hf.lazy' and inspect.getsource(m)\n"
    )
    assert out.split() == ["True", "True"]


@pytest.mark.parametrize("module", ["hf.cache", "hf.attention"])
def test_registered_by_whatever_module_is_imported_first(module):
    code = f"import warnings; warnings.simplefilter('error', UserWarning); import unique_attn.{module}\n"
    out = run_python(code + "from transformers import AttentionInterface; print('unique' in AttentionInterface())\n")
    assert out.split() == ["True"]


def test_import_without_transformers():
    out = run_python(
        "import sys; sys.modules['transformers'] = None\n"
        "import unique_attn as ua\n"
        "print(ua.UniqueConfig().budget, ua.ops.RULES['mean'].vectors, ua.PagePool(2, 4).num_free, ua.__version__)\n"
        "print(ua.reference.page_entry.__name__, ua.PoolFullError.__name__, 'enable' in dir(ua))\n"
        "try: ua.enable\n"
        "except ImportError as error: print(error)\n"
    )
    assert out.startswith(f"512 1 2 {ua.__version__}\npage_entry PoolFullError True\n")
    assert "needs transformers >= 4.57" in out


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ua.nothing


# ---- On and off. ----


def test_enable_and_disable():
    model = tiny()
    expected = generate(model, prompt())
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    config = model.config.to_dict()
    assert ua.enable(model, ALWAYS_SPARSE) is model
    assert model.config._attn_implementation == "unique"
    assert all(hook_of(layer.self_attn).config == ALWAYS_SPARSE for layer in model.model.layers)
    generate(model, prompt())
    assert ua.disable(model) is model
    assert model.config._attn_implementation == "sdpa"
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
    assert model.config.to_dict() == config
    assert_same(generate(model, prompt()), expected, tolerance=0)
    ua.disable(model)  # no effect


def test_enable_again_changes_the_settings():
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    ua.enable(model, ua.UniqueConfig(dense_below=1000))
    assert not any(layers_on_pages(generate(model, prompt()).past_key_values))
    assert [len(module._forward_pre_hooks) for module in (model, model.model)] == [1, 1]
    ua.disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_disable_restores_eager():
    model = ua.disable(ua.enable(tiny("gpt-oss")))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("family", "usual"), [("llama", "sdpa"), ("gpt-oss", "eager")])
def test_disable_of_a_model_that_was_loaded_as_unique(family, usual):
    model = tiny(family, "unique")
    with torch.no_grad():
        model(prompt()["input_ids"])
    ua.disable(model)
    assert model.config._attn_implementation == usual
    assert hook_of(model.model.layers[0].self_attn) is None


def test_cache_outlives_disable():
    ids = prompt()["input_ids"]
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_key_values
        model(ids[:, 30:31], past_key_values=cache)
        assert all(layers_on_pages(cache))
        ua.disable(model)
        output = model(ids[:, 31:], past_key_values=cache).logits
        expected = model(ids).logits[:, 31:]
    torch.testing.assert_close(output, expected, rtol=2e-4, atol=2e-4)
    assert not any(layers_on_pages(cache))


def test_only_this_instance_is_changed():
    ua.enable(tiny(), ALWAYS_SPARSE)
    other = tiny()
    assert other.config._attn_implementation == "sdpa"
    assert hook_of(other.model.layers[0].self_attn) is None


def test_copies_and_pickles_of_an_enabled_model():
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    expected = generate(model, prompt())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = generate(twin, prompt())
        assert_same(output, expected, tolerance=0)
        assert all(layers_on_pages(output.past_key_values))
        ua.disable(twin)
        assert hook_of(twin.model.layers[0].self_attn) is None
    assert hook_of(model.model.layers[0].self_attn) is not None


def test_saving_an_enabled_model(tmp_path):
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    generate(model, prompt())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"  # nobody asked for another
    torch.testing.assert_close(logits(generate(again, prompt())), logits(generate(tiny(), prompt())))
    ua.enable(again)  # with the settings that were saved
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="unique")
    for each in (again, loaded):
        output = generate(each, prompt())
        assert all(layers_on_pages(output.past_key_values))
        assert hook_of(each.model.layers[0].self_attn).config == ALWAYS_SPARSE
    ua.disable(again).save_pretrained(tmp_path / "disabled")
    assert "page_size" in (tmp_path / "disabled" / "config.json").read_text()  # it came with the model
    ua.disable(model).save_pretrained(tmp_path / "never")
    assert "page_size" not in (tmp_path / "never" / "config.json").read_text()


def test_saved_settings_of_another_version_are_a_named_error(tmp_path):
    model = tiny()
    model.config.unique_attn = {"budget": 64, "colour": "green"}
    with pytest.raises(ValueError, match=r"expected fields among .*, got colour"):
        ua.enable(model)
    assert model.config._attn_implementation == "sdpa"


def test_settings_as_keywords():
    model = ua.enable(tiny(), budget=64, dense_below=0)
    assert hook_of(model.model.layers[0].self_attn).config == ua.UniqueConfig(budget=64, dense_below=0)
    ua.enable(model, ALWAYS_SPARSE, page_size=16)
    assert hook_of(model.model.layers[0].self_attn).config == dataclasses.replace(ALWAYS_SPARSE, page_size=16)
    with pytest.raises(TypeError, match=r"enable: expected fields of UniqueConfig .*budget.*, got bugdet"):
        ua.enable(model, bugdet=3)
    with pytest.raises(ValueError, match=r"UniqueConfig.budget: expected a multiple of page_size = 16, got 13"):
        ua.enable(model, budget=13)


def test_layers_that_do_not_exist():
    model = tiny()
    with pytest.raises(ValueError, match=r"config.dense_layers: expected layers from 0 to 2, got \[3, 77\]"):
        ua.enable(model, dense_layers=(1, 3, 77))
    assert model.config._attn_implementation == "sdpa"


def test_model_inside_another_module():
    wrapped = torch.nn.ModuleDict({"base": tiny()})
    assert ua.enable(wrapped, ALWAYS_SPARSE) is wrapped
    assert all(layers_on_pages(generate(wrapped["base"], prompt()).past_key_values))
    ua.disable(wrapped)
    assert wrapped["base"].config._attn_implementation == "sdpa"


def test_encoder_with_unique_attention():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).eval()
    inputs = prompt(padding=[0, 9])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("unique")
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected)


# ---- Recording. ----


def test_record_selection():
    config = ua.UniqueConfig(budget=32, dense_below=0)
    model = ua.enable(tiny(), config)
    inputs = prompt(padding=[0, 9], length=60)
    with ua.record_selection(model) as records:
        generate(model, inputs, tokens=4)
    assert [record.layer_idx for record in records] == [0, 1, 2] * 3
    for step in range(3):
        layer_idx, seq_lens, pages = records[3 * step]
        assert layer_idx == 0
        assert seq_lens.tolist() == [61 + step, 52 + step]
        assert pages.shape == (2, 1, 2, 4)
        assert (pages[..., 0] == 0).all()  # the sink page
        own = (seq_lens - 1) // config.page_size
        assert (pages.amax(-1)[:, 0] == own[:, None]).all()
    count = len(records)
    generate(model, inputs, tokens=4)
    assert len(records) == count


def test_record_selection_of_a_model_that_was_loaded_as_unique():
    model = tiny(implementation="unique")
    with ua.record_selection(model) as records:
        generate(model, prompt(length=511), tokens=4)
    assert len(records) == 9


def test_record_selection_ends_with_an_exception():
    model = ua.enable(tiny())
    with pytest.raises(KeyError), ua.record_selection(model):
        raise KeyError
    with ua.record_selection(model) as records:
        generate(model, prompt(length=511), tokens=3)
    assert len(records) == 6  # and those of before went nowhere


def test_recordings_inside_each_other_and_of_other_models():
    model, other = ua.enable(tiny(), ALWAYS_SPARSE), ua.enable(tiny(), ALWAYS_SPARSE)
    with ua.record_selection(model) as outer:
        generate(model, prompt(), tokens=2)
        with ua.record_selection(model) as inner, ua.record_selection(other) as others:
            generate(model, prompt(), tokens=3)
        generate(other, prompt(), tokens=3)
    assert (len(outer), len(inner), len(others)) == (9, 6, 0)


# ---- Bad arguments. ----


@pytest.mark.parametrize("function", [ua.enable, ua.disable])
@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2), "llama"], ids=["none", "module", "name"])
def test_not_a_model(function, model):
    with pytest.raises(TypeError, match="model: expected a transformers model, got"):
        function(model)


def test_record_selection_refuses():
    with pytest.raises(TypeError, match="expected a transformers model"), ua.record_selection(None):
        pass
    model = tiny()
    with pytest.raises(ValueError, match="expected the attention implementation 'unique', got 'sdpa'"):
        ua.record_selection(model).__enter__()


def test_not_a_config():
    model = tiny()
    with pytest.raises(TypeError, match="config: expected a UniqueConfig or None, got dict"):
        ua.enable(model, {"budget": 64})
    assert model.config._attn_implementation == "sdpa"


def test_model_without_attention():
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="expected attention modules with a cache, got MambaForCausalLM"):
        ua.enable(transformers.MambaForCausalLM(config))


def test_a_class_that_was_made_below_the_enabled_one():
    """As by FSDP: ``disable`` cannot take it apart, so what is left behind does what stock does."""
    model = ua.enable(tiny("llama"))
    model.__class__ = type("Sharded", (type(model),), {})
    ua.disable(model)
    model.generation_config.eos_token_id = 2
    manager = model.init_continuous_batching()
    assert type(manager).__name__ == "ContinuousBatchingManager"
