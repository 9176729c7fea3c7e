"""``benchmarks prefill_ablation``: its settings give the densities that are wanted, its shipped way is sparse prefill,
and its report says what was measured."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench_prefill_cases import some_layer, written
from hf_helpers import VOCAB, tiny
from pictures import numbers
from torch import Tensor

from benchmarks.cli import main
from benchmarks.measure import texts
from benchmarks.measure.block_choice import (
    PAPER,
    SHIPPED,
    Survey,
    Way,
    kept_mass,
    read,
    select,
    setting_for,
    sparse,
    survey,
    ways_of,
)
from benchmarks.measure.block_lists import Blocks, density
from benchmarks.measure.block_shares import ESTIMATES, block_shares, words
from benchmarks.measure.equal_density import Rung, at_density, standard_error
from benchmarks.measure.next_tokens import tail_logits
from benchmarks.report import prefill_ablation as ablation_report
from benchmarks.report.summary import of_models
from benchmarks.suite import prefill_ablation, prefill_quality

# ---- Choices. ----


def test_ways_by_name():
    assert ways_of(["directional:max", "pooled"]) == [SHIPPED, Way("pooled", "")]
    assert ways_of(["oracle", "oracle:mean"]) == [Way("oracle", each) for each in ("max", "rms", "mean")]
    assert ways_of(["mean:mean:top_p"]) == [PAPER]
    assert [ways_of([way.label]) for way in (PAPER, Way("pooled", "", "top_p"))] == [
        [PAPER],
        [Way("pooled", "", "top_p")],
    ]
    with pytest.raises(ValueError, match=r"expected of directional, .*, got 'nothing'"):
        ways_of(["nothing"])
    with pytest.raises(ValueError, match="pooled:max: expected an aggregate of none"):
        ways_of(["pooled:max"])
    every = ways_of(list(ESTIMATES))
    assert len(every) == 26
    rows = [{"estimate": way.estimate, "aggregate": way.aggregate, "selection": way.selection} for way in every]
    assert len({words(row) for row in rows}) == 26


def test_settings_give_the_density_that_is_wanted():
    blocks = Blocks(640)
    found = Survey(torch.empty(0), {}, [])
    ways = [SHIPPED, PAPER, Way("pooled", ""), Way("random", ""), Way("oracle", "mean")]
    layers = [some_layer(640), some_layer(640, (4, 1))]
    for way in ways:
        found.shares[way.estimate, way.aggregate] = [
            block_shares(way.estimate, layer, blocks, [way.aggregate], seed=i)[way.aggregate]
            for i, layer in enumerate(layers)
        ]
    found.truth = found.shares["oracle", "mean"]
    mass = {}
    for way in ways:
        value = setting_for(way, [found], blocks, 0.7)
        assert value is not None
        masks = [select(way, x, blocks, value) for x in found.shares[way.estimate, way.aggregate]]
        assert sum(density(blocks, mask) for mask in masks) / 2 == pytest.approx(0.7, abs=0.02)
        mass[way.estimate] = kept_mass(way, [found], blocks, value)
        assert setting_for(way, [found], blocks, 0.3) is None  # more is always kept
    assert kept_mass(SHIPPED, [found], blocks, 0.0) == pytest.approx(1, abs=1e-4)
    assert mass["oracle"] == max(mass.values())
    assert mass["random"] == min(mass.values())


def some_ids(tokens: int) -> Tensor:
    return torch.randint(2, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))


def test_everything_kept_is_dense_attention(device: torch.device):
    model, ids = tiny("gemma3").to(device), some_ids(300).to(device)
    dense = tail_logits(model, ids, 20)
    for way in (SHIPPED, Way("oracle", "mean"), Way("random", "")):
        logits, kept = read(model, ids, 20, way, 0.0)
        torch.testing.assert_close(logits, dense, rtol=1e-3, atol=1e-3)
        assert kept == 1
    with sparse(model, Way("random", ""), 1.0) as densities:
        assert float((tail_logits(model, ids, 20) - dense).abs().max()) > 1e-2
    assert len(densities) == 2  # the layer with a sliding window is dense
    assert max(densities) < 1
    assert torch.equal(tail_logits(model, ids, 20), dense)


def test_the_shipped_way_in_a_model_is_sparse_prefill():
    model, ids = tiny(), some_ids(400)
    with prefill_quality.prefilling(model, {"method": "directional", "threshold": 0.1}) as records:
        wanted = tail_logits(model, ids, 30)
    logits, kept = read(model, ids, 30, SHIPPED, 0.1)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert kept == pytest.approx(prefill_quality.kept(records)["density"], abs=1e-4)
    found = survey(model, ids, 30, [SHIPPED, PAPER])
    assert set(found.shares) == {("directional", "max"), ("mean", "mean"), ("oracle", "mean")}
    assert [len(each) for each in found.shares.values()] == [3] * 3
    assert found.logits.shape == (30, VOCAB)


# ---- Equal density. ----


def test_between_two_settings():
    made = torch.Generator().manual_seed(0)
    low, middle, high = (torch.rand(500, generator=made) * scale for scale in (1, 0.3, 0.01))
    rungs = [Rung(0.4, high, torch.ones(500)), Rung(0.2, low, torch.zeros(500)), Rung(0.3, middle, torch.ones(500))]
    for rung in rungs:
        at = at_density(rungs, rung.density)
        assert at is not None
        assert (at.kl, at.top1) == (pytest.approx(float(rung.kl.mean())), pytest.approx(float(rung.same.mean())))
        assert standard_error(at.pull) == pytest.approx(standard_error(rung.kl), rel=1e-5)
    at = at_density(rungs, 0.25)
    assert at is not None
    assert at.kl == pytest.approx(math.sqrt(float(low.mean() * middle.mean())))
    assert at.top1 == pytest.approx(0.5)
    # What a token pulls: with one more like it.
    more = [Rung(r.density, torch.cat([r.kl, r.kl[:1]]), torch.cat([r.same, r.same[:1]])) for r in rungs]
    again = at_density(more, 0.25)
    assert again is not None
    assert (again.kl - at.kl) * 501 == pytest.approx(float(at.pull[0]), rel=0.05)
    assert at_density(rungs, 0.19) is not None
    assert at_density(rungs, 0.15) is None
    assert at_density(rungs, 0.45) is None
    assert at_density(rungs[:1], 0.4) is None


def test_differences_are_of_the_same_tokens():
    kl = torch.rand(400, generator=torch.Generator().manual_seed(0))
    other = Way("oracle", "mean")
    rungs = {
        way: [Rung(density, factor * scale * kl, torch.ones(400)) for density, scale in ((0.2, 1), (0.4, 0.1))]
        for way, factor in ((SHIPPED, 1.0), (other, 0.5))
    }
    found = prefill_ablation.compared(rungs, [0.2, 0.3, 0.9])
    assert [at["density"] for at in found[other]] == [0.2, 0.3]
    assert found[SHIPPED][0]["kl_more"] == found[SHIPPED][0]["kl_more_se"] == 0
    at = found[other][0]
    assert at["kl_more"] == pytest.approx(-0.5 * float(kl.mean()), abs=1e-5)
    assert at["kl_more_se"] == pytest.approx(0.5 * standard_error(kl), abs=1e-5)
    assert "kl_more" not in prefill_ablation.compared({other: rungs[other]}, [0.2])[other][0]


# ---- The command. ----


class Words:
    """A tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> argparse.Namespace:
        return argparse.Namespace(input_ids=[2 + ord(c) % (VOCAB - 2) for c in text])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("prefill_ablation")
    for name, text in (("first", texts.technical()), ("second", texts.prose())):
        (folder / f"{name}.txt").write_text(text[:800])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_ablation, "load", lambda *args: (tiny(), Words()))
        argv = ["prefill_ablation", "--length", "640", "768", "--tail", "64", "--trials", "2"]
        argv += ["--density", "0.2", "0.55", "0.7", "--estimators", "directional", "oracle:mean", "mean:mean:top_p"]
        argv += ["random", "--text", *map(str, sorted(folder.glob("*.txt")))]
        return written(folder, *argv, "--device", "cpu")


def test_command(result: dict[str, Any]):
    assert [case["length"] for case in result["cases"]] == [640, 768]
    for case in result["cases"]:
        assert case["texts"] == ["first", "second"]
        kinds = [(way["estimate"], way["aggregate"], way["selection"]) for way in case["ways"]]
        assert kinds == [
            ("directional", "max", "threshold"), ("directional", "rms", "threshold"),
            ("directional", "mean", "threshold"), ("oracle", "mean", "threshold"), ("mean", "mean", "top_p"),
            ("random", "", "threshold"),
        ]  # fmt: skip
        for way in case["ways"]:
            rows = way["settings"]
            assert len(rows) == 2  # 0.2 is less than what is always kept
            assert [row["density"] for row in rows] == sorted(row["density"] for row in rows)
            for row in rows:
                assert row["kl"] == pytest.approx(sum(row["kl_texts"]) / 2, abs=1e-5)
                assert row["kl_se"] > 0
                assert 0 < row["mass"] <= 1
                assert row["needles"]["trials"] == 2
                assert 0 < row["needles"]["density"] < 1
            for at in way["at"]:
                assert at["density"] in (0.55, 0.7)
                assert ("kl_more" in at) == any(x["density"] == at["density"] for x in case["ways"][0]["at"])
        assert case["ways"][0]["at"]
        assert all(at["kl_more"] == 0 for at in case["ways"][0]["at"])
        assert case["needles"]["trials"] == 2
    assert "`directional`, 8 queries, rms" in prefill_ablation.report(result)


def test_given_thresholds_and_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(prefill_ablation, "load", lambda *args: (tiny(), Words()))
    argv = [
        "prefill_ablation",
        "--device",
        "cpu",
        "--length",
        "512",
        "--tail",
        "64",
        "--trials",
        "0",
        "--text",
        "prose",
    ]
    argv += ["--estimators", "directional:max", "mean:mean:top_p"]
    found = written(tmp_path, *argv, "--thresholds", "0.05", "0.2", "--density", "0.6")
    first, second = found["cases"][0]["ways"]
    assert [row["threshold"] for row in first["settings"]] == [0.2, 0.05]
    assert len(second["settings"]) == 1
    assert "needles" not in found["cases"][0]
    assert len(written(tmp_path, *argv, "--minutes", "1e-9")["cases"][0]["ways"]) == 0


def test_report(result: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    moved = json.loads(json.dumps(result))
    moved["options"]["densities"] = [0.2, 0.3, 0.4]
    way = moved["cases"][1]["ways"][3]
    way["at"] = [{"density": 0.3, "kl": 0.0123, "kl_se": 0.001, "kl_more": -0.002, "kl_more_se": 0.0003, "top1": 0.98}]
    block = ablation_report.block([moved])
    assert "| oracle: true attention, mean | - | 0.0123 | - | -0.0020 ± 0.0003 | - | 98.0% |" in block
    assert "| **`directional`, 8 queries, max** | - | - | - | - | - | - |" in block
    setting = way["settings"][0]
    assert f"| {setting['kl']:.4f} ± {setting['kl_se']:.4f} |" in block
    assert f"{setting['needles']['nats']:.3f}, 0 of 2 |" in block
    assert f"Dense attention on hidden codes: {moved['cases'][1]['needles']['nats']:.3f}, 0 of 2." in block
    (path,) = ablation_report.draw([moved], tmp_path)
    assert f"](docs/{path.name})" in block
    panels = numbers(path)["panels"]["SmolLM2-135M-Instruct, 768 tokens"]
    assert list(panels["estimates"]) == ["directional max", "random"]
    assert panels["aggregates, selection"]["oracle mean"][0] == [setting["density"], setting["kl"]]
    on_gpu = {**result, "environment": {**result["environment"], "device": "NVIDIA H200"}}
    assert of_models([result, on_gpu], "prefill_ablation") == [on_gpu]
    assert ablation_report.block([]) == ""
    assert ablation_report.draw([], tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tail", "1"], "--tail: expected at least 2, got 1"),
        (["--trials", "-1"], "--trials: expected at least 0, got -1"),
        (["--length", "200"], "--length: expected more than the 256 tokens of --tail, got 200"),
        (["--estimators", "x"], "--estimators: expected of directional, .*, got 'x'"),
        (["--density", "1.5"], "--density: expected 0 to 1, got 1.5"),
        (["--thresholds", "-0.1"], "--thresholds: expected 0 to 1, got -0.1"),
    ],
)
def test_bad_flags(flags: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        main(["prefill_ablation", "--device", "cpu", *flags])
