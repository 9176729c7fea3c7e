"""Models whose layers are of several kinds: full attention is sparse, sliding windows keep vLLM's own backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests_vllm.support import FULL, answers, assert_close, dropped_in, engine, prompts, sampling

LENGTHS = (50, 333, 1200, 700)


def hybrid(**settings: Any) -> dict[str, Any]:
    return {
        "attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}},
        "additional_config": {"unique_attn": settings},
    }


def backends(llm: Any) -> list[str]:
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return [layer.attn_backend.get_name() for layer in layers]


def test_full_budget(gemma: Path):
    with engine(gemma) as llm:
        expected = answers(llm, prompts(*LENGTHS), sampling(16, logprobs=0))
    with engine(gemma, **hybrid(budget=FULL)) as llm:
        assert backends(llm) == ["CPU_ATTN", "CPU_ATTN", "CUSTOM", "CPU_ATTN"]
        assert_close(answers(llm, prompts(*LENGTHS), sampling(16, logprobs=0)), expected)


def test_small_budget(gemma: Path):
    expected = dropped_in(gemma, prompts(*LENGTHS), 16, budget=64)
    with engine(gemma, **hybrid(budget=64)) as llm:
        assert [each.tokens for each in answers(llm, prompts(*LENGTHS), sampling(16))] == expected


def test_one_backend_for_all_kinds_is_refused(gemma: Path):
    options = hybrid() | {"attention_config": {"backend": "CUSTOM"}}
    with pytest.raises(ValueError, match="sliding window not supported"), engine(gemma, **options):
        pass
