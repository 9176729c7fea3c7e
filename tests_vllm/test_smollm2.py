"""A real model: SmolLM2-135M-Instruct over a real text, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.support import DOCUMENT
from examples.support.models import ModelFetchError, smollm2_path
from tests_vllm.support import FULL, answers, dropped_in, engine, sampling, sparse

NEW = 16
LENGTHS = (1500, 700, 40)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return smollm2_path(quiet=True)
    except ModelFetchError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture(scope="module")
def asked(smollm2: Path) -> list[list[int]]:
    """Parts of the demo's document."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2)(DOCUMENT.read_text("utf-8")).input_ids
    return [ids[1000 * i : 1000 * i + length] for i, length in enumerate(LENGTHS)]


def test_full_budget(smollm2: Path, asked: list[list[int]]):
    """Stock's tokens; log-probabilities are as near as two fp32 kernels are over 30 layers."""
    params = sampling(NEW, logprobs=0)
    with engine(smollm2) as llm:
        stock = answers(llm, asked, params)
    with engine(smollm2, **sparse(budget=FULL)) as llm:
        ours = answers(llm, asked, params)
    assert [each.tokens for each in ours] == [each.tokens for each in stock]
    for mine, theirs in zip(ours, stock):
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), atol=1e-4, rtol=0)


def test_small_budget(smollm2: Path, asked: list[list[int]]):
    """The tokens of the Hugging Face drop-in, which are not those of dense attention."""
    settings = {"budget": 64, "index_format": "compressed"}
    expected = dropped_in(smollm2, asked, NEW, **settings)
    assert expected != dropped_in(smollm2, asked, NEW, budget=FULL)
    with engine(smollm2, **sparse(**settings)) as llm:
        assert [each.tokens for each in answers(llm, asked, sampling(NEW))] == expected
