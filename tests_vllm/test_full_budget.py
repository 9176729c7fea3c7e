"""With a budget that covers the context, the backend computes what vLLM's own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests_vllm.support import FULL, Answer, answers, assert_close, counted, engine, prompts, sampling, sparse

MIXED = (50, 333, 1200, 2000, 64, 65, 127, 700)
GREEDY = {"logprobs": 0}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
KINDS = {
    "exact": {"budget": FULL},
    "compressed": {"budget": FULL, "index_format": "compressed"},
    "small pages": {"budget": FULL, "page_size": 4},
    "below": {"budget": 64, "dense_below": FULL},
    "dense layers": {"budget": 64, "dense_layers": [0, 1, 2]},
}


def repeated(*lengths: int) -> list[list[int]]:
    """Prompts that n-gram speculation finds something in: a passage again and again."""
    return [(prompt * 8)[: len(prompt) * 4 + i] for i, prompt in enumerate(prompts(*lengths, seed=5))]


def abort_one(llm: Any) -> list[list[int]]:
    """Tokens of three requests, of which the second is aborted after five steps."""
    inner = llm.llm_engine
    for i, prompt in enumerate(prompts(300, 900, 500, seed=8)):
        inner.add_request(str(i), {"prompt_token_ids": prompt}, sampling(12))
    tokens: dict[str, list[int]] = {}
    for step in range(200):
        if step == 5:
            inner.abort_request(["1"])
        for output in inner.step():
            tokens[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
        if not inner.has_unfinished_requests():
            break
    else:
        raise AssertionError("the engine does not come to an end")
    assert len(tokens["1"]) < 12
    return [tokens["0"], tokens["2"]]


def asked_for(llm: Any) -> dict[str, list[Answer]]:
    """What one engine answers, case by case."""
    shared = prompts(640, seed=1)[0]
    found = {
        "mixed": answers(llm, prompts(*MIXED), sampling(16, **GREEDY)),
        "prefix": answers(llm, [shared], sampling(4, **GREEDY)),
        "hits": answers(llm, [shared + tail for tail in prompts(3, 200, 77, seed=2)], sampling(16, **GREEDY)),
        "seeds": answers(
            llm,
            prompts(100, 300, 500, seed=3),  # in one step: vLLM cannot chunk seeded requests on a CPU
            [sampling(24, temperature=0.8, top_p=0.9, seed=seed, **GREEDY) for seed in (1, 2, 3)],
        ),
    }
    assert counted(llm, "prefix_cache_hits") >= 3 * 512  # whole blocks of the prompt before
    return found


@pytest.fixture(scope="module")
def stock(llama: Path) -> dict[str, list[Answer]]:
    with engine(llama) as llm:
        return asked_for(llm) | {"abort": [Answer(tokens, []) for tokens in abort_one(llm)]}


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batches_prefix_hits_seeds_and_aborts(llama: Path, stock: dict[str, list[Answer]], kind: str):
    with engine(llama, **sparse(**KINDS[kind])) as llm:
        found = asked_for(llm)
        for case, ours in found.items():
            assert_close(ours, stock[case])
        assert abort_one(llm) == [each.tokens for each in stock["abort"]]


def test_blocks_of_64_and_chunks_of_512(llama: Path, stock: dict[str, list[Answer]]):
    with engine(llama, block_size=64, max_num_batched_tokens=512, **sparse(budget=FULL)) as llm:
        assert_close(answers(llm, prompts(*MIXED), sampling(16, **GREEDY)), stock["mixed"])


def test_preemption(llama: Path):
    """Few blocks: requests are thrown out in the middle and computed again."""
    few = {"num_gpu_blocks_override": 16, "max_model_len": 1024, "enable_prefix_caching": False}
    asked, params = prompts(400, 500, 380, 300, seed=4), sampling(150, **GREEDY)
    with engine(llama, **few) as llm:
        expected = answers(llm, asked, params)
    with engine(llama, **few, **sparse(budget=FULL)) as llm:
        assert_close(answers(llm, asked, params), expected)
        assert counted(llm, "num_preemptions") > 0


def test_ngram_speculation_with_ragged_drafts(llama: Path):
    """Rows have from none to four drafts; what is rejected leaves no trace. vLLM's own answers are those without."""
    asked, params = repeated(40, 75, 130, 9) + prompts(200), sampling(40, **GREEDY)
    with engine(llama) as llm:
        expected = answers(llm, asked, params)
    with engine(llama, own_process=True, speculative_config=DRAFTS, **sparse(budget=FULL)) as llm:
        assert_close(answers(llm, asked, params), expected)
        drafted, accepted = (counted(llm, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    assert 0 < accepted < drafted


def test_a_compiled_model(llama: Path, stock: dict[str, list[Answer]]):
    """As vLLM runs it by default: attention is an opaque op in a compiled graph."""
    with engine(llama, enforce_eager=False, compilation_config={"backend": "eager"}, **sparse(budget=FULL)) as llm:
        assert_close(answers(llm, prompts(*MIXED), sampling(16, **GREEDY)), stock["mixed"])
