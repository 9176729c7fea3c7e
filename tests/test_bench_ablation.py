"""``benchmarks ablation``: its one forward is decoding, its scores are what they are called, its report says so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench_prefill_cases import written
from hf_helpers import VOCAB, tiny
from pictures import numbers

import unique_attn as ua
from benchmarks.cli import main
from benchmarks.measure import page_choice, texts
from benchmarks.measure.failures import excerpt, token_kl
from benchmarks.measure.page_choice import SCORES, Setting, Step, choose
from benchmarks.measure.spread_terms import head_terms, rank_correlation, spread_terms
from benchmarks.measure.tail_decode import TailBatch
from benchmarks.report import ablation as ablation_report
from benchmarks.report.summary import of_models
from benchmarks.suite import ablation
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


def test_dense_and_full_budgets_are_dense_attention(device: torch.device):
    batch = TailBatch(tiny("gemma3").to(device), some_ids(), 21, keep=5)
    assert batch.full_layers == [1, 2]
    assert batch.dense.shape == (2, 5, VOCAB)
    torch.testing.assert_close(batch.decode(None).logits, batch.dense, rtol=1e-3, atol=1e-3)
    for score in SCORES:
        found = batch.decode(Setting(score, budget=232), mass=True)
        torch.testing.assert_close(found.logits, batch.dense, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.mass[1], torch.ones_like(found.mass[1]), rtol=1e-3, atol=1e-3)


def test_16_bit_models():
    batch = TailBatch(tiny("gemma3", dtype=torch.bfloat16), some_ids(), 21)
    rows = ablation.measure_texts(batch, ablation.settings([64], [8, 16]))
    assert len(rows) == 16 + 3 + 5 + 1
    assert all(0 < row["mass"] <= 1.01 for row in rows)
    assert all(row["kl"] < 10 for row in rows)
    kept = {row["score"]: row["mass"] for row in rows if row["page_size"] == 8}
    assert kept["oracle"] == max(kept.values())
    assert len(spread_terms(batch)) == 8


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


# ---- Terms and failures. ----


def test_rank_correlation():
    a = torch.tensor([[3.0, 1.0, 2.0, 10.0], [1.0, 2.0, 3.0, 4.0]])
    assert rank_correlation(a, a.exp()).tolist() == pytest.approx([1, 1])
    assert rank_correlation(a, -a).tolist() == pytest.approx([-1, -1])
    b = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # 1 - 6 * (4 + 1 + 1) / (4 * 15)
    assert rank_correlation(a[:1], b).tolist() == pytest.approx([0.4])


def test_terms_say_what_a_score_is_made_of():
    batch = TailBatch(tiny("gemma3"), some_ids(), 21)
    rows = spread_terms(batch)
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in (1, 2) for head in range(4)]
    for row in rows:
        assert row["rank_unique_0"] == pytest.approx(row["rank_mean"], abs=1e-4)
        assert row["unique_ratio"] > 0
        assert row["mean_sd"] > 0
        # Both spreads are of the same variances: over D = 16 channels, c is at most lambda times the norms' ratio.
        assert row["equal_c"] >= 0.5 - 1e-3
    step = some_step(Setting())
    step.k[:, :, :, 1:] = 0  # keys have one channel: both spread terms are the same
    step.q[:, :, :, 1:] = 0
    found = head_terms(step)
    assert found["equal_c"].tolist() == pytest.approx([0.5] * 6, rel=1e-3)
    torch.testing.assert_close(found["unique_sd"] * 4, found["directional_sd"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["rank_unique_spread"], found["rank_directional_spread"], rtol=0, atol=0.02)


def test_kl_of_tokens_and_excerpts():
    dense = torch.randn(2, 50, 30)
    other = dense + torch.randn(2, 50, 30)
    found = token_kl(dense, other)
    wanted = torch.nn.functional.kl_div(
        other.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(found, wanted)
    text = [ord(c) for c in "one two three four five six"]
    assert excerpt(Words(), text, 12) == {"before": "one two three", "after": "four five six"}


# ---- The command. ----


class Words:
    """A tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> argparse.Namespace:
        return argparse.Namespace(input_ids=[2 + ord(c) % (VOCAB - 2) for c in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ablation")
    for name, text in (("first", texts.technical()), ("second", texts.prose())):
        (folder / f"{name}.txt").write_text(text[:600])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "load", lambda *args: (tiny(), Words()))
        argv = ["ablation", "--length", "330", "560", "--budget", "64", "128", "--page-size", "8", "16", "--tail", "24"]
        argv += ["--trials", "2", "--failure-budget", "64", "--text", *map(str, sorted(folder.glob("*.txt")))]
        return written(folder, *argv, "--device", "cpu")


def test_command(result: dict[str, Any]):
    assert result["layers"] == [0, 1, 2]
    assert [case["length"] for case in result["cases"]] == [330, 560]
    for case in result["cases"]:
        assert case["texts"] == ["first", "second"]
        assert case["rounding"] < 1e-5
        rows = {
            (row["score"], row["weight"], row["page_size"], row["index_format"], row["budget"]): row
            for row in case["rows"]
        }
        assert len(rows) == len(case["rows"]) == 2 * (16 + 3 + 5 + 1)
        for row in case["rows"]:
            assert 0 < row["mass"] <= 1
            assert row["kl"] > 0
            assert row["kl"] == pytest.approx(sum(row["kl_texts"]) / 2, abs=1e-5)
            assert row["needles"]["trials"] == 2
        base = rows["directional", 2.0, 8, "exact", 64]
        assert base["kl_more"] == 0
        assert rows["directional", 3.0, 8, "exact", 64]["kl_more"] == pytest.approx(
            rows["directional", 3.0, 8, "exact", 64]["kl"] - base["kl"], abs=1e-5
        )
        assert rows["unique", 0.0, 8, "exact", 64]["kl"] == pytest.approx(rows["mean", None, 8, "exact", 64]["kl"])
        assert base["bits"] == 8.0  # two vectors in fp32, a page of 8
        assert rows["oracle", None, 8, "exact", 128]["mass"] == max(
            row["mass"] for row in case["rows"] if row["budget"] == 128 and row["page_size"] == 8
        )
        found = case["failures"]
        assert found["remedies"]["as it is"]["all"] == pytest.approx(base["kl"], abs=1e-5)
        assert found["remedies"]["four times the budget"]["worst"] < found["remedies"]["as it is"]["worst"]
        worst = found["worst_tokens"]
        assert [row["kl"]["as it is"] for row in worst] == sorted(
            (row["kl"]["as it is"] for row in worst), reverse=True
        )
        assert len(found["dense_layers"]) == 1
        lost = [row["lost"] for row in found["worst_heads"]]
        assert lost == sorted(lost, reverse=True)
        assert lost[0] == found["head_quantiles"][-1]
    assert "directional, c = 2" in ablation.report(result)
    assert len(result["cases"][0]["spread"]) == 12
    assert "spread" not in result["cases"][1]


def test_report(result: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    case = result["cases"][1]
    block = ablation_report.block([result])
    row = case["rows"][0]
    assert row["score"] == "random"
    assert f"| random | {row['kl']:.4f}, {row['mass']:.3f}, {row['needles']['nats']:.2f} |" in block
    assert "](docs/ablation_smollm2-135m-instruct.png)" in block
    terms = ablation_report.terms_block([result])
    assert "| layer, head |" in terms
    assert f"{max(row['unique_ratio'] for row in result['cases'][0]['spread']):.2f})" in terms
    failures = ablation_report.failures_block([result])
    assert f"| as it is | {case['failures']['remedies']['as it is']['worst']:.3f} |" in failures
    (path,) = ablation_report.draw([result], tmp_path)
    drawn = numbers(path)
    assert drawn["lengths"] == [64, 128]
    assert drawn["lines"]["recent"][0] == next(row["kl"] for row in case["rows"] if row["score"] == "recent")
    on_gpu = {**result, "environment": {**result["environment"], "device": "NVIDIA H200"}}
    assert of_models([result, on_gpu], "ablation") == [on_gpu]
    assert of_models([result, {**on_gpu, "model": "Other"}], "ablation")[1] is result
    assert ablation_report.block([]) == ablation_report.terms_block([]) == ablation_report.failures_block([]) == ""
    assert ablation_report.draw([], tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tail", "1"], "--tail: expected at least 2, got 1"),
        (["--trials", "-1"], "--trials: expected at least 0, got -1"),
        (["--page-size", "8", "12"], "--page-size: expected of 4, 8, 16, 32, 64, got 12"),
        (["--budget", "8"], "--budget: expected at least 16 tokens, got 8"),
        (["--length", "512"], "four times --failure-budget, 1024 tokens, got 512"),
    ],
)
def test_bad_flags(flags: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        main(["ablation", "--device", "cpu", *flags])
