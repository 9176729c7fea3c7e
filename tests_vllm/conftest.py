"""Models made here, engines in this process, and the Hugging Face drop-in to compare with. Offline, on the CPU."""

from __future__ import annotations

import os

# Before vLLM is imported, which reads them. One thread: threads that wait for each other take longer on a busy machine.
os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    NUMBA_DISABLE_JIT="1",  # vLLM's n-gram proposer would be compiled in every engine, for half a minute
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
)

from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests_vllm.support import VOCAB

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,  # scores differ enough to select by, and fp32 rounds log-probabilities to 3e-6
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session", autouse=True)
def _found_by_vllm() -> None:
    """Without its entry point, vLLM's CPU platform would run its own backend, and many a test would pass."""
    found = entry_points(group="vllm.general_plugins", name="unique_attn")
    assert [each.value for each in found][:1] == ["unique_attn.vllm.plugin:register"], "vLLM does not find the plugin"
    assert "VLLM_PLUGINS" not in os.environ


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers with 8 query and 2 KV heads, fp32; its words are ``w0``, ``w1`` and so on."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=3)).float().save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 whose layers 0, 1 and 3 have a window of 256 tokens, fp32."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models") / "gemma"
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **SHAPE, num_hidden_layers=4, layer_types=kinds[:4], sliding_window=256, query_pre_attn_scalar=64
    )
    Gemma3ForCausalLM(config).float().save_pretrained(path)
    return path
