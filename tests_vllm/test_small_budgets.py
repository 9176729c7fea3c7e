"""With small budgets, the backend selects what the Hugging Face drop-in selects: greedy tokens are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests_vllm.support import answers, counted, dropped_in, engine, prompts, sampling, sparse
from tests_vllm.test_full_budget import DRAFTS, MIXED, repeated

KINDS = {
    "directional": {"budget": 64},
    "compressed": {"budget": 64, "index_format": "compressed"},
    "unique": {"budget": 128, "rule": "unique", "page_size": 16, "sink_pages": 2},
    "minmax": {"budget": 64, "rule": "minmax", "page_size": 4, "recent_pages": 3},
    "mean": {"budget": 96, "rule": "mean", "dense_layers": [1]},
    "below": {"budget": 64, "dense_below": 700},
}
NEW = 20


@pytest.fixture(scope="module")
def dense(llama: Path) -> list[list[int]]:
    return dropped_in(llama, prompts(*MIXED), NEW, budget=4096)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens(llama: Path, dense: list[list[int]], kind: str):
    asked, settings = prompts(*MIXED), KINDS[kind]
    expected = dropped_in(llama, asked, NEW, **settings)
    assert sum(a != b for a, b in zip(expected, dense)) >= 3  # the budget matters here
    with engine(llama, **sparse(**settings)) as llm:
        assert [each.tokens for each in answers(llm, asked, sampling(NEW))] == expected


def test_after_prefix_hits_chunks_and_preemption(llama: Path):
    """The index of blocks that are shared, filled in chunks or computed again is that of the keys.

    What a request has generated before vLLM throws it out comes again as part of its prompt: from there on, it goes on
    like the drop-in that is given all that as a prompt.
    """
    shared, new = prompts(640, seed=1)[0], 60
    asked = [shared] + [shared + tail for tail in prompts(3, 200, 77, seed=2)]
    expected = dropped_in(llama, asked, new, budget=64)
    few = {"num_gpu_blocks_override": 11, "max_model_len": 1024, "max_num_batched_tokens": 512, "max_num_seqs": 4}
    with engine(llama, **few, **sparse(budget=64)) as llm:
        answered = answers(llm, asked[:1], sampling(new)) + answers(llm, asked[1:], sampling(new))
        assert counted(llm, "prefix_cache_hits") >= 3 * 512
        assert counted(llm, "num_preemptions") > 0
    found = [each.tokens for each in answered]
    others = [row for row in range(len(asked)) if found[row] != expected[row]]
    assert len(others) < len(asked) - 1
    for row in others:
        same = next(i for i in range(new) if found[row][i] != expected[row][i])
        resumed = (
            dropped_in(llama, [asked[row] + found[row][:begin]], new - begin, budget=64)[0] == found[row][begin:]
            for begin in range(same, 0, -1)
        )
        assert any(resumed)


def test_ragged_drafts(llama: Path):
    """A draft has its own selection, as if it had been the only new token."""
    asked = repeated(40, 75, 130, 9) + prompts(200)
    expected = dropped_in(llama, asked, 40, budget=64)
    with engine(llama, own_process=True, speculative_config=DRAFTS, **sparse(budget=64)) as llm:
        assert [each.tokens for each in answers(llm, asked, sampling(40))] == expected
        drafted, accepted = (counted(llm, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    assert 0 < accepted < drafted


@pytest.mark.parametrize("method", ["directional", "unisparse"])
def test_sparse_prompts(llama: Path, method: str):
    """Prompts of one chunk, some above and some below ``prefill_above``."""
    settings = {"budget": 64, "prefill": method, "prefill_above": 600, "threshold": 0.08}
    asked = prompts(*MIXED)
    expected = dropped_in(llama, asked, NEW, **settings)
    assert expected != dropped_in(llama, asked, NEW, budget=64)
    with engine(llama, max_num_batched_tokens=4096, **sparse(**settings)) as llm:
        assert [each.tokens for each in answers(llm, asked, sampling(NEW))] == expected
