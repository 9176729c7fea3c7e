"""16-bit models, on the platform that vLLM finds: on CUDA also in graphs. Rounding may swap tokens that are nearly
equally likely, so answers are compared up to the first of those."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests_vllm.support import FULL, engine, prompts, sampling, sparse

LENGTHS = (50, 333, 1200, 2000, 64, 65, 127, 700)
NEW = 24
TIE = 0.05  # of log-probabilities
HALF = {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}
KINDS = {
    "exact": {"budget": FULL},
    "compressed, one layer dense": {"budget": FULL, "index_format": "compressed", "dense_layers": [1]},
    "below": {"budget": 64, "dense_below": FULL},
}


class Steps(NamedTuple):
    tokens: list[int]
    tops: list[dict[int, float]]  # the most likely tokens of each step, with their log-probabilities


def on_cuda() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def steps(llm: Any) -> list[Steps]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(*LENGTHS)]
    outputs = [output.outputs[0] for output in llm.generate(asked, sampling(NEW, logprobs=4), use_tqdm=False)]
    return [Steps(list(o.token_ids), [{t: p.logprob for t, p in top.items()} for top in o.logprobs]) for o in outputs]


def assert_same_up_to_ties(ours: list[Steps], theirs: list[Steps], least: float = 0.5) -> None:
    """``least``: the share of the tokens that must come before a tie, so that something was compared."""
    compared = 0
    for mine, other in zip(ours, theirs, strict=True):
        for step in range(NEW):
            token, expected = mine.tokens[step], other.tokens[step]
            top = other.tops[step]
            assert mine.tops[step][token] == pytest.approx(top.get(token, float("-inf")), abs=TIE)
            compared += 1
            if token != expected:
                assert top[token] > top[expected] - TIE
                break
    assert compared >= least * NEW * len(ours)


@pytest.fixture(scope="module")
def stock(llama: Path) -> list[Steps]:
    with engine(llama, **HALF) as llm:
        return steps(llm)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_budget(llama: Path, stock: list[Steps], kind: str, eager: bool):
    if not eager and not on_cuda():
        pytest.skip("no CUDA device on this machine")
    with engine(llama, enforce_eager=eager, **HALF, **sparse(**KINDS[kind])) as llm:
        assert_same_up_to_ties(steps(llm), stock)


def test_small_budget_in_graphs(llama: Path):
    """Captured steps are given tables and lengths that grow; they select what eager ones do."""
    if not on_cuda():
        pytest.skip("no CUDA device on this machine")
    found = []
    for eager in (True, False):
        with engine(llama, enforce_eager=eager, **HALF, **sparse(budget=64, dense_layers=[1])) as llm:
            found.append(steps(llm))
    assert_same_up_to_ties(*found, least=0.3)
