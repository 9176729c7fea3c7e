"""``benchmarks ablation --per-layer``: budgets of layers are read as they are chosen, and counted as they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench_prefill_cases import written
from hf_helpers import tiny
from test_bench_ablation import Words, some_ids

from benchmarks.cli import main
from benchmarks.measure import texts
from benchmarks.measure.layer_budgets import DENSE, GUARDED, LADDER, allocate, bytes_at, losses_of, with_budgets
from benchmarks.measure.page_choice import Setting, Step
from benchmarks.measure.tail_decode import TailBatch
from benchmarks.report import ablation as ablation_report
from benchmarks.report import layer_budgets as report
from benchmarks.suite import ablation
from unique_attn import ops

BASE = Setting("directional", 2.0, budget=64)


# ---- The mechanism. ----


def test_each_layer_reads_its_own_budget():
    batch = TailBatch(tiny("llama"), some_ids(), 21)
    seen: dict[int, int] = {}

    def see(layer: int, step: Step) -> None:
        seen[layer] = step.setting.budget

    mixed = with_budgets(BASE, {0: 32, 1: None, 2: 128})
    assert (mixed.dense_layers, mixed.layer_budgets) == ((1,), ((0, 32), (2, 128)))
    found = batch.decode(mixed, mass=True, see=see)
    assert (seen[0], seen[2], sorted(found.mass)) == (32, 128, [0, 2])
    first = batch.decode(replace(BASE, budget=32), mass=True)
    torch.testing.assert_close(found.mass[0], first.mass[0])  # nothing below it differs
    alone = batch.decode(replace(BASE, budget=128, dense_layers=(0, 1)), mass=True)
    other = batch.decode(with_budgets(BASE, {0: None, 1: None, 2: 128}), mass=True)
    assert torch.equal(alone.logits, other.logits)
    equal = batch.decode(with_budgets(BASE, dict.fromkeys(range(3), 64)))
    assert torch.equal(equal.logits, batch.decode(BASE).logits)


def test_layers_of_a_window_have_no_budget():
    batch = TailBatch(tiny("gemma3"), some_ids(), 21)
    assert sorted(batch.decode(with_budgets(BASE, {1: 32, 2: 64}), mass=True).mass) == [1, 2]


def test_bytes_are_those_of_tokens_and_entries():
    batch = TailBatch(tiny("llama"), some_ids(), 21)
    config = tiny("llama").config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    entry = ops.index_entry_bytes("directional", size, torch.float32, "exact")
    mixed = with_budgets(BASE, {0: 32, 1: None, 2: 512})
    assert batch.bytes_read(mixed, 0) == (32 * heads * 2 * size * 4, 29 * heads * entry)  # 230 tokens: 29 pages
    assert batch.bytes_read(mixed, 1) == batch.bytes_read(None, 1) == (230 * heads * 2 * size * 4, 0)
    assert batch.bytes_read(mixed, 2)[0] == batch.bytes_read(None, 2)[0]
    with pytest.raises(ValueError, match="setting: expected a score with an index, got oracle"):
        batch.bytes_read(Setting("oracle"), 0)


# ---- Choosing. ----


def test_allocate_is_the_best_of_all_choices_on_convex_losses():
    costs = {0: [1, 2, 3], 1: [1, 2, 3], 2: [1, 2, 3]}
    losses = {0: [9.0, 5.0, 2.0], 1: [3.0, 1.0, 0.5], 2: [1.0, 0.9, 0.8]}
    for total in range(3, 10):
        taken = allocate(losses, costs, total)
        every = torch.cartesian_prod(*(torch.arange(3) for _ in range(3))).tolist()
        best = min(sum(losses[i][x] for i, x in enumerate(one)) for one in every if sum(one) + 3 <= total)
        assert sum(costs[layer][choice] for layer, choice in taken.items()) <= total
        assert sum(losses[layer][choice] for layer, choice in taken.items()) == pytest.approx(best)
    jump = allocate({0: [4.0, 4.0, 0.0]}, {0: [1, 2, 3]}, 3)  # the first step alone gains nothing
    assert jump == {0: 2}
    with pytest.raises(ValueError, match="total: expected at least 3, what the least budgets cost, got 2"):
        allocate(losses, costs, 2)


def test_losses():
    assert losses_of("mass", [0.5, 0.2, 0.0], 0.01, 0.2) == [0.5, 0.2, 0.0]
    assert losses_of("sensitivity", [0.5, 0.2, 0.0], 0.01, 0.2) == pytest.approx([0.025, 0.01, 0.0])
    assert losses_of("squared", [0.4, 0.2, 0.0], 0.01, 0.2) == pytest.approx([0.04, 0.01, 0.0])


def test_bytes_at_equal_kl():
    curve = [(100.0, 1.0), (200.0, 0.01), (300.0, 0.02), (400.0, 0.001)]
    assert bytes_at(curve, 0.1) == pytest.approx(150)  # halfway between the logarithms
    assert bytes_at(curve, 0.01) == pytest.approx(200)
    assert bytes_at(curve, 2.0) == 100
    assert bytes_at(curve, 1e-6) == 400


# ---- The command. ----


def files(folder: Path) -> list[str]:
    made = {"first": texts.technical()[:700], "second": texts.prose()[:700]}
    for name, text in made.items():
        (folder / f"{name}.txt").write_text(text)
    return [str(folder / f"{name}.txt") for name in made]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "load", lambda *args: (tiny(), Words()))
        argv = ["ablation", "--per-layer", "--length", "600", "--tail", "24", "--text", *files(folder)]
        return written(folder, *argv, "--device", "cpu")


def test_command(result: dict[str, Any]):
    assert (result["cases"], result["layers"]) == ([], [0, 1, 2])
    (found,) = result["budgets"]
    assert found["rounding"] < 1e-5
    ladder = found["ladder"]
    assert ladder == [budget for budget in LADDER if budget <= 512]  # 768 tokens are more than all 600
    uniform = {row["budget"]: row for row in found["uniform"]}
    assert [row["bytes"] for row in found["uniform"]] == sorted(row["bytes"] for row in found["uniform"])
    assert uniform[512]["bytes"] < found["dense_bytes"]
    assert uniform[512]["kl"] < uniform[32]["kl"]
    assert len(found["curves"]) == 6
    for curve in found["curves"]:
        assert curve["lost"][0] > curve["lost"][-1] > 0
        assert curve["kl_alone"] > 0
    assert {row["total"] for row in found["rows"]} == {128, 256, 384, 512}
    for row in found["rows"]:
        most = uniform[row["total"]]
        assert most["bytes"] * 0.7 < row["bytes"] <= most["bytes"]
        others = [row["chosen_on"]["first"]["kl_texts"][1], row["chosen_on"]["second"]["kl_texts"][0]]
        assert row["held_out"]["kl"] == pytest.approx(sum(others) / 2, abs=1e-5)
        assert row["held_out"]["kl_more"] == pytest.approx(row["held_out"]["kl"] - most["kl"], abs=1e-5)
        for each in row["chosen_on"].values():
            assert len(each["budgets"]) == 3
            if row["method"] == GUARDED:
                assert all(budget is None or budget >= row["total"] // 2 for budget in each["budgets"])
            if row["method"] == DENSE:
                assert 1 <= each["budgets"].count(None) <= 2
    for method, of in found["saved"].items():
        rows = [row for row in found["rows"] if row["method"] == method]
        points = [(row["bytes"], row["kl"]) for row in found["uniform"]]
        wanted = [1 - row["bytes"] / bytes_at(points, row["held_out"]["kl"]) for row in rows]
        assert of["held_out"]["totals"] == pytest.approx(wanted, abs=2e-4)
        assert of["held_out"]["mean"] == pytest.approx(sum(wanted) / len(wanted), abs=2e-4)
        assert of["held_out"]["low"] <= of["held_out"]["high"]
    assert "sensitivity" in ablation.report(result)


def test_report(result: dict[str, Any]):
    block = report.block([result])
    (found,) = result["budgets"]
    row = next(row for row in found["rows"] if (row["method"], row["total"]) == ("mass", 256))
    saved = found["saved"]["mass"]["held_out"]["totals"][1]
    assert (
        f"| 256 tokens | {found['uniform'][5]['kl']:.4f} | {row['held_out']['kl']:.4f}, {100 * saved:+.0f}% |" in block
    )
    assert report.verdict(found) in block
    on_gpu = {**result, "environment": {**result["environment"], "device": "NVIDIA H200"}}
    assert report.chosen([result, on_gpu, {"bench": "decode"}]) == [on_gpu]
    assert report.block([]) == ""
    assert ablation_report.block([result]) == ablation_report.failures_block([result]) == ""


def test_verdict_goes_by_the_noise(result: dict[str, Any]):
    def of(mean: float, low: float) -> str:
        held_out = {"mean": mean, "low": low}
        return report.verdict({"saved": {"mass": {"held_out": held_out}, "squared": {"held_out": {}}}})

    assert "saves 20% of the bytes on the texts that the budgets were not chosen on: more than the 15%" in of(0.2, 0.16)
    assert ": more than, within the noise, the 15%" in of(0.2, 0.1)
    assert "saves 3% of the bytes" in of(0.03, -0.1)
    assert ": less than the 15%" in of(0.03, -0.1)
    assert "Even the best, by attention lost, reads 3% more bytes" in of(-0.03, -0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length", "512"], "--length: expected more than --tail and 512 tokens for --per-layer, got 512"),
        (["--length", "600", "--text", "FIRST"], "--text: expected two of 600 tokens or more for --per-layer"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablation, "load", lambda *args: (tiny(), Words()))
    first = files(tmp_path)[0]
    with pytest.raises(SystemExit, match=message):
        main(["ablation", "--per-layer", "--device", "cpu", *(first if flag == "FIRST" else flag for flag in flags)])
