"""What is refused when an engine starts, what the plugin leaves alone, and what vLLM is told of the size of a block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests_vllm.support import answers, engine, prompts, sampling, sparse

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (sparse(budget=100), "UniqueConfig.budget: expected a multiple of page_size = 8, got 100"),
        (sparse(dense_layers=[7]), "['dense_layers']: expected layers from 0 to 2, got 7"),
        ({**sparse(), "kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({**sparse(), "block_size": 8}, "block_size not supported"),
        ({**sparse(), "kv_cache_dtype": "bfloat16"}, "keys and values stored as bfloat16 for a model of torch.float32"),
        (
            {**sparse(), "additional_config": {"unique-attn": {"budget": 64}}},
            "additional_config: expected the settings under 'unique_attn', got 'unique-attn'",
        ),
    ],
    ids=["budget", "layers", "fp8", "block size", "another dtype", "another key"],
)
def test_an_engine_says_at_its_start_what_is_wrong(llama: Path, options: dict[str, Any], message: str):
    with pytest.raises((TypeError, ValueError)) as raised, engine(llama, **options):
        pass
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("feature", "options"),
    [
        ("ALiBi", {"alibi_slopes": [0.5] * 8}),
        ("a logit softcap", {"logits_soft_cap": 30.0}),
        ("a sliding window", {"sliding_window": 128}),
        ("layers that share keys and values", {"kv_sharing_target_layer_name": "model.layers.0"}),
        ("the attention argument sinks", {"sinks": torch.zeros(8)}),
        ("more than 16 query heads per KV head", {"num_heads": 34}),
    ],
)
def test_a_layer_with_another_feature_is_refused_by_name(feature: str, options: dict[str, Any]):
    from vllm.config import VllmConfig, set_current_vllm_config

    from unique_attn.vllm.backend import UniqueAttention

    shape = {"num_heads": 8, "head_size": 64, "scale": 0.125, "num_kv_heads": 2}
    with set_current_vllm_config(VllmConfig()), pytest.raises(NotImplementedError, match=feature):
        UniqueAttention(**shape | options)


def test_a_drafter_that_stores_keys_itself_is_refused():
    from unique_attn.vllm import versions

    draft, target = SimpleNamespace(), SimpleNamespace()
    speculative = SimpleNamespace(method="dflash", draft_model_config=draft)
    assert versions.stores_keys_itself(SimpleNamespace(speculative_config=speculative, model_config=draft))
    assert not versions.stores_keys_itself(SimpleNamespace(speculative_config=speculative, model_config=target))
    assert not versions.stores_keys_itself(SimpleNamespace(speculative_config=None, model_config=draft))
    speculative.method = "eagle"
    assert not versions.stores_keys_itself(SimpleNamespace(speculative_config=speculative, model_config=draft))


def test_more_drafts_than_the_ops_take_are_refused():
    from vllm.config import VllmConfig

    from unique_attn.vllm.backend import UniqueMetadataBuilder

    config = VllmConfig()
    drafts = SimpleNamespace(num_speculative_tokens=16, parallel_drafting=False)
    object.__setattr__(config, "speculative_config", drafts)
    with pytest.raises(ValueError, match=r"speculative_config: expected .* at most 16 tokens, got rows of 17"):
        UniqueMetadataBuilder(SimpleNamespace(block_size=64), [], config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"head_size": 60}, "head_size not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
        ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"use_adaptive_verification": True}, "device-cpu query lens mismatch not supported"),
    ],
)
def test_the_backend_declares_what_it_cannot_do(option: dict[str, Any], reason: str):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from unique_attn.vllm.backend import UniqueBackend

    plain = AttentionSelectorConfig(64, torch.bfloat16, "auto", None)
    assert UniqueBackend.validate_configuration(device_capability=None, **plain._asdict()) == []
    reasons = UniqueBackend.validate_configuration(device_capability=None, **plain._replace(**option)._asdict())
    assert any(each.startswith(reason) for each in reasons)


def test_the_index_is_in_vllms_budget_of_memory(llama: Path):
    """At D=64, fp32 and pages of 8, an exact entry of two vectors is an eighth of keys and values."""
    with engine(llama) as llm:
        dense = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    with engine(llama, **sparse()) as llm:
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == pytest.approx(dense / 1.125, rel=1e-3)


def test_engines_that_do_not_ask_have_their_own_backend(llama: Path):
    """Beside the settings, and after an engine that asked."""
    with engine(llama, **sparse(budget=64)) as llm:
        sparse_answers = answers(llm, prompts(500), sampling(16))
    with engine(llama, additional_config={"unique_attn": {"budget": 64}}) as llm:
        own = answers(llm, prompts(500), sampling(16))
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        assert {layer.attn_backend.get_name() for layer in layers} == {"CPU_ATTN"}
    assert own != sparse_answers


def test_the_plugin_imports_no_device_and_no_backend():
    code = """
import sys
import vllm.platforms
from vllm.plugins import load_general_plugins
load_general_plugins()
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print(AttentionBackendEnum.CUSTOM.get_path(), torch.cuda.is_initialized(), "unique_attn.vllm.backend" in sys.modules,
      "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-4:-1] == ["unique_attn.vllm.backend.UniqueBackend", "False", "False"]


def test_another_plugin_keeps_the_name(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    from vllm.v1.attention.backends import registry

    from unique_attn.vllm.plugin import register

    theirs = {registry.AttentionBackendEnum.CUSTOM: "their.Backend"}
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", theirs)
    register()
    assert theirs == {registry.AttentionBackendEnum.CUSTOM: "their.Backend"}
    assert "the attention backend CUSTOM of vLLM is their.Backend already" in caplog.text
