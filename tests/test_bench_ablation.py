"""``benchmarks ablation``: its one forward is decoding, its scores are what they are called, its report says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_helpers import VOCAB, tiny

import unique_attn as ua
from benchmarks.measure.page_choice import SCORES, Setting, Step, choose
from benchmarks.measure.tail_decode import TailBatch
from unique_attn import ops
from unique_attn.hf.hooks import MassRecord, attention_modules, hook_of, recording


def some_ids(samples: int = 2, length: int = 230, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (samples, length), generator=torch.Generator().manual_seed(seed))


# ---- One forward is decoding. ----


def step_by_step(model: Any, ids: torch.Tensor, tail: int, config: ua.UniqueConfig | None) -> tuple[torch.Tensor, Any]:
    """Logits ``[tail, vocabulary]`` of tokens that are decoded one by one behind a dense prompt, and the mass kept."""
    if config is not None:
        model = ua.enable(model, config)
    hooks = [hook for module in attention_modules(model) if (hook := hook_of(module)) is not None]
    logits = []
    with torch.no_grad(), recording(hooks, MassRecord) as records:
        cache = model(ids[None, :-tail], use_cache=True).past_key_values
        for token in ids[-tail:]:
            logits.append(model(token[None, None], past_key_values=cache).logits[0])
    mass: dict[int, list[torch.Tensor]] = {}
    for record in records:
        mass.setdefault(record.layer_idx, []).append(record.mass[0])
    return torch.cat(logits), {layer: torch.cat(parts) for layer, parts in mass.items()}


CASES: list[tuple[str, Setting, dict[str, Any]]] = [
    ("llama", Setting(budget=32), {"budget": 32}),
    ("llama", Setting("unique", 0.25, 4, budget=40), {"rule": "unique", "lambda_": 0.25, "page_size": 4, "budget": 40}),
    ("qwen2", Setting("minmax", page_size=16, budget=64), {"rule": "minmax", "page_size": 16, "budget": 64}),
    ("gemma3", Setting("directional", 1.0, budget=48), {"c": 1.0, "budget": 48}),
    ("qwen2-window", Setting(budget=32), {"budget": 32}),
    ("qwen3", Setting("mean", index_format="compressed", budget=32),
     {"rule": "mean", "index_format": "compressed", "budget": 32}),
    ("llama", Setting(budget=32, dense_layers=(1,)), {"budget": 32, "dense_layers": (1,)}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "setting", "config"), CASES)
def test_one_forward_is_step_by_step_decoding(family: str, setting: Setting, config: dict[str, Any]):
    ids, tail = some_ids(), 21
    batch = TailBatch(tiny(family), ids, tail)
    found = batch.decode(setting, mass=True)
    for sample, each in enumerate(ids):
        model = tiny(family)
        dense, _ = step_by_step(model, each, tail, None)
        torch.testing.assert_close(batch.dense[sample], dense, rtol=1e-4, atol=1e-4)
        wanted, mass = step_by_step(model, each, tail, ua.UniqueConfig(dense_below=0, **config))
        torch.testing.assert_close(found.logits[sample], wanted, rtol=1e-4, atol=1e-4)
        assert sorted(mass) == sorted(found.mass)
        for layer, of_layer in mass.items():
            torch.testing.assert_close(found.mass[layer][sample], of_layer, rtol=1e-4, atol=1e-5)
    if found.mass:
        assert float((found.logits - batch.dense).abs().max()) > 1e-2  # something was dropped


def test_dense_and_full_budgets_are_dense_attention():
    ids = some_ids()
    batch = TailBatch(tiny("gemma3"), ids, 21, keep=5)
    assert batch.full_layers == [1, 2]
    assert batch.dense.shape == (2, 5, VOCAB)
    torch.testing.assert_close(batch.decode(None).logits, batch.dense, rtol=1e-4, atol=1e-4)
    for score in SCORES:
        found = batch.decode(Setting(score, budget=232), mass=True)
        torch.testing.assert_close(found.logits, batch.dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mass[1], torch.ones_like(found.mass[1]), rtol=1e-4, atol=1e-4)


def test_bad_tails():
    with pytest.raises(ValueError, match="tail: expected 1 to 229 tokens of texts of 230, got 230"):
        TailBatch(tiny(), some_ids(), 230)
    with pytest.raises(ValueError, match="keep: expected 1 to 20 of the last tokens, got 21"):
        TailBatch(tiny(), some_ids(), 20, keep=21)


# ---- Scores. ----


def some_step(setting: Setting, samples: int = 2, tokens: int = 200, tail: int = 9) -> Step:
    made = torch.Generator().manual_seed(1)
    q = torch.randn(samples, tail, 6, 32, generator=made) * 2
    k, v = torch.zeros(2, samples, 256, 2, 32)
    topics = torch.randn(samples, 32, 2, 32, generator=made).repeat_interleave(8, 1)[:, :tokens]
    k[:, :tokens] = topics + torch.randn(samples, tokens, 2, 32, generator=made)
    return Step(q, k, v, tokens, 32**-0.5, setting, torch.Generator().manual_seed(0))


def test_directional_in_pytorch_is_the_shipped_rule():
    from benchmarks.measure import page_choice

    for form in ("exact", "compressed"):
        step = some_step(Setting("directional", 1.5, 8, form))
        wanted = SCORES["directional"].of(step)
        found = page_choice._directional(step).amax(2)
        pages = (200 - 9) // 8
        torch.testing.assert_close(found[..., :pages], wanted[..., :pages], rtol=1e-4, atol=1e-4)


def test_second_order_is_the_log_of_the_mean_exponential_of_small_logits_and_capped():
    step = some_step(Setting("second order"))
    step.q *= 0.1
    means = step.k.unflatten(1, (-1, 8)).mean(2, keepdim=True).expand(-1, -1, 8, -1, -1).flatten(1, 2).clone()
    means[..., 3] += torch.randn(256)[:, None]  # keys of a page differ in one channel: its variance is that of q . k
    step.k = means
    found = SCORES["second order"].of(step)[..., :23]
    keys = step.k[:, : 23 * 8].unflatten(1, (23, 8))
    logits = torch.einsum("sthgd,spjhd->shgtpj", step.q.unflatten(2, (2, 3)), keys) * step.scale
    wanted = (logits.exp().mean(-1).log() / step.scale).amax(2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3 * float(wanted.abs().max()))
    large = some_step(Setting("second order"))
    large.q *= 100
    mean, variance = large.terms()
    capped = (mean + 7**0.5 * variance.sqrt()).amax(2)[..., :23]
    torch.testing.assert_close(SCORES["second order"].of(large)[..., :23], capped)


def test_oracle_keeps_most_and_normalizing_changes_no_single_head():
    kept = {}
    for score in SCORES:
        step = some_step(Setting(score, budget=48))
        pages = choose(step)
        assert pages.shape == (18, 1, 2, 6)
        assert bool((pages[..., 0] == 0).all())  # the sink
        _, lse = ops.sparse_decode(
            step.row_queries, step.paged(step.k), step.paged(step.v), pages, **step.rows, page_size=8, scale=step.scale
        )
        kept[score] = float((lse.unflatten(0, (2, -1))[:, :, 0] - step.lse).exp().mean())
    assert kept["oracle"] == max(kept.values())
    assert max(kept["random"], kept["recent"]) < min(kept["mean"], kept["directional"])
    single = some_step(Setting("directional", 2.0, budget=48))
    single.q = single.q[:, :, ::3].contiguous()  # one query head for each KV head
    again = Step(single.q, single.k, single.v, 200, single.scale, Setting("directional, normalized", 2.0, budget=48))
    assert torch.equal(choose(single), choose(again))


def test_recent_reads_the_sink_and_the_last_pages():
    step = some_step(Setting("recent", budget=32), samples=1, tail=1)
    assert choose(step).flatten().tolist()[:4] == [0, 22, 23, 24]
    assert choose(step)[0, 0].tolist() == [[0, 22, 23, 24]] * 2
