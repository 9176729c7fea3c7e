"""Tiny random models of the families that the Hugging Face tests run, and how they are decoded there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import PreTrainedModel

import unique_attn as ua

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # far from uniform attention
}
WINDOW = 24
HYBRID = ["sliding_attention", "full_attention", "full_attention"]
ALWAYS_SPARSE = ua.UniqueConfig(budget=512, dense_below=0, block_size=16)  # more than any context here
SMALL = ua.UniqueConfig(budget=32, dense_below=0, block_size=16)


def _config(name: str, **kwargs: Any) -> Any:
    return getattr(transformers, name)(**{**SHAPE, **kwargs})


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("LlamaConfig", num_hidden_layers=3),
    "llama-mha": lambda: _config("LlamaConfig", num_key_value_heads=4),
    "qwen2": lambda: _config("Qwen2Config", num_attention_heads=6, hidden_size=96, num_key_value_heads=2),
    "qwen2-window": lambda: _config(
        "Qwen2Config", num_hidden_layers=3, use_sliding_window=True, sliding_window=WINDOW, layer_types=HYBRID
    ),
    "qwen3": lambda: _config("Qwen3Config", head_dim=32),
    "mistral": lambda: _config("MistralConfig", sliding_window=None),
    "mistral-window": lambda: _config("MistralConfig", sliding_window=WINDOW),
    "gemma2": lambda: _config("Gemma2Config", head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW),
    "gemma3": lambda: _config(
        "Gemma3TextConfig",
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=HYBRID,
    ),
    "gpt-oss": lambda: _config(
        "GptOssConfig",
        num_hidden_layers=3,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=HYBRID,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "mixtral": lambda: _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3-moe": lambda: _config(
        "Qwen3MoeConfig", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}
NO_SDPA = {"gemma2", "gpt-oss"}  # their stock reference is eager attention


def tiny(
    family: str = "llama", implementation: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model, the same at every call, by default with the implementation that transformers would take."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    implementation = implementation or ("eager" if family in NO_SDPA else "sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.eval().to(dtype)


def prompt(
    batch: int = 2, length: int = 40, padding: list[int] | None = None, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Random ``input_ids`` and ``attention_mask`` with ``padding[b]`` tokens hidden at the left of row b."""
    ids = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding or []):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int = 12, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**settings, **kwargs})


def logits(output: Any) -> torch.Tensor:
    """``[steps, B, vocabulary]``"""
    return torch.stack(output.logits)


def assert_same(output: Any, expected: Any, tolerance: float = 2e-4) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(logits(output), logits(expected), rtol=tolerance, atol=tolerance)


def layers_on_pages(cache: Any) -> list[bool]:
    return [getattr(layer, "on_pages", False) for layer in cache.layers]


def run_and_collect(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of ``run`` and the library's warnings during it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(each.message) for each in caught if "unique_attn" in str(each.message)]
