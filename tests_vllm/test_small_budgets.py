"""With small budgets, the backend selects what the Hugging Face drop-in selects: greedy tokens are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests_vllm.support import answers, counted, dropped_in, engine, prompts, sampling, sparse
from tests_vllm.test_full_budget import DRAFTS, MIXED, repeated
from unique_attn import ops

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


def test_after_prefix_hits_and_chunks(llama: Path):
    """The index of blocks that are shared, or filled in chunks, is that of the keys."""
    shared = prompts(640, seed=1)[0]
    asked = [shared] + [shared + tail for tail in prompts(3, 200, 77, seed=2)]
    expected = dropped_in(llama, asked, NEW, budget=64)
    with engine(llama, max_num_batched_tokens=512, **sparse(budget=64)) as llm:
        found = answers(llm, asked[:1], sampling(NEW)) + answers(llm, asked[1:], sampling(NEW))
        assert counted(llm, "prefix_cache_hits") >= 3 * 512
    assert [each.tokens for each in found] == expected


def assert_index_is_that_of_the_keys(llm: Any) -> int:
    """Of the blocks of all running requests and layers, bit for bit. Returns how many requests those are."""
    core = llm.llm_engine.engine_core.engine_core
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    for request in core.scheduler.running:
        (blocks,) = core.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        length = request.num_computed_tokens
        lens = torch.tensor([length], dtype=torch.int32)
        table = torch.tensor([blocks], dtype=torch.int32)
        for layer in layers:
            views, config = layer.impl._blocks(layer.kv_cache), layer.impl.config
            paging = {"rule": config.rule, "page_size": config.page_size}
            fresh = ops.new_index(views.k, **paging)
            ops.page_index(views.k, fresh, table, 0 * lens, lens, max_new_tokens=length, **paging)
            pages = -(-length // config.page_size)
            stored, expected = (index[blocks].transpose(1, 2).flatten(0, 1)[:pages] for index in (views.index, fresh))
            assert torch.equal(stored, expected)
    return len(core.scheduler.running)


def test_the_index_after_preemption(llama: Path):
    """Tokens are computed again as part of a prompt, which differs; the index of their keys must not."""
    few = {"num_gpu_blocks_override": 16, "max_model_len": 1024, "max_num_batched_tokens": 512}
    checked = 0
    with engine(llama, **few, **sparse(budget=64)) as llm:
        for i, prompt in enumerate(prompts(400, 500, 380, 300, seed=4)):
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling(150))
        step = 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            step += 1
            if step % 20 == 0:
                checked += assert_index_is_that_of_the_keys(llm)
        assert counted(llm, "num_preemptions") > 0
    assert checked > 10


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
