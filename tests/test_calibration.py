"""Calibration: rows say what decoding says, the recommendation follows from them, the model is left as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_helpers import VOCAB, tiny

import unique_attn as ua
from unique_attn import __main__ as command_line
from unique_attn.calibration import Calibration, Row, distance, make_needle
from unique_attn.calibration.command import main
from unique_attn.hf.hooks import MassRecord, attention_modules, hook_of, recording

QUICK: dict[str, Any] = {"tail": 20, "needles": 0, "progress": False, "rules": ["directional"], "page_sizes": [8]}


def ids(length: int = 260, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def letters(text: str, **kwargs: Any) -> Any:
    """A tokenizer of the tiny models' vocabulary."""
    return SimpleNamespace(input_ids=[2 + ord(c) % (VOCAB - 2) for c in text])


def handmade(model: Any, text: torch.Tensor, config: ua.UniqueConfig | None, tail: int) -> torch.Tensor:
    """Logits of the last tokens, decoded one by one behind a dense prompt."""
    if config is not None:
        model = ua.enable(model, config)
    out = []
    with torch.no_grad():
        cache = model(text[None, :-tail], use_cache=True).past_key_values
        for token in text[-tail:]:
            out.append(model(token[None, None], past_key_values=cache).logits[0])
    return torch.cat(out)


def test_rows_are_those_of_decoding_by_hand():
    texts = [ids(), ids(300, 1)]
    result = ua.calibrate(tiny(), texts, budgets=[32, 64], **QUICK)
    assert [row.config.budget for row in result.rows if not row.config.dense_layers] == [32, 64]
    for row in result.rows:
        found = []
        for text in texts:
            dense = handmade(tiny(), text, None, 20)
            sparse = handmade(tiny(), text, replace(row.config, dense_below=0), 20)
            found.append(distance(dense, sparse, text[-19:]))
        assert row.kl == pytest.approx(sum(each.kl for each in found) / 2, rel=1e-3)
        assert row.top1 == pytest.approx(sum(each.top1 for each in found) / 2)
        assert row.perplexity == pytest.approx(math.exp(sum(each.nll for each in found) / 2), rel=1e-4)
    assert result.dense.kl == 0
    assert result.dense.top1 == 1


@pytest.mark.parametrize("cache", ["default", "static"])
def test_mass_is_the_share_of_dense_attention(cache):
    """By the weights of dense attention in a first layer, whose queries selection does not change."""
    config = ua.UniqueConfig(budget=32, dense_below=0, block_size=16)
    text = ids()[None]
    model = ua.enable(tiny(), config)
    hooks = [hook_of(module) for module in attention_modules(model)]
    made = {"past_key_values": None}
    if cache == "static":
        from transformers import StaticCache

        made["past_key_values"] = StaticCache(config=model.config, max_cache_len=400)
        if not hasattr(made["past_key_values"].layers[0], "cumulative_length"):
            pytest.skip("transformers 4 has no pages in static caches")
    with torch.no_grad():
        past = model(text[:, :-4], use_cache=True, **made).past_key_values
        with recording(hooks, MassRecord) as masses, ua.record_selection(model) as selections:
            model(text[:, -4:], past_key_values=past)
        weights = tiny(implementation="eager")(text, output_attentions=True).attentions[0][0, :, -4:]
    assert masses[0].layer_idx == selections[0].layer_idx == 0
    pages = selections[0].pages[0]  # [T, H, k]
    group = weights.shape[0] // pages.shape[1]
    for t in range(4):
        for head in range(weights.shape[0]):
            chosen = pages[t, head // group]
            tokens = (chosen[chosen >= 0, None] * 8 + torch.arange(8)).flatten()
            share = weights[head, t, tokens[tokens < text.shape[1]]].sum()
            torch.testing.assert_close(masses[0].mass[0, t, head].float(), share, rtol=1e-3, atol=1e-4)


def test_a_budget_of_everything_is_dense():
    result = ua.calibrate(tiny(), [ids(400)], budgets=[200], config=ua.UniqueConfig(recent_pages=20), **QUICK)
    assert result.rows[0].kl > 0
    assert 0 < result.rows[0].mean_mass < 1
    assert result.rows[0].bytes_per_token < result.dense.bytes_per_token


def test_needles():
    result = ua.calibrate(tiny(), ["a text of many words " * 20], letters, budgets=[64], **{**QUICK, "needles": 3})
    assert (result.dense.needles, result.rows[0].needles) == (3, 3)
    assert 0 <= result.rows[0].found <= 3
    assert result.rows[0].needle_nll > 0
    assert "0/3" in result.table()
    needle = make_needle(letters, letters("word " * 100).input_ids, 300, 0.5, seed=1)
    assert needle.ids.shape == (1, 300)
    code = needle.ids[0, -needle.answer :]
    fact = needle.ids[0, : -needle.question - needle.answer].unfold(0, needle.answer, 1)
    assert bool((fact == code).all(-1).any())


def row(budget: int, kl: float, read: int, found: int = 2, dense_layers: tuple[int, ...] = ()) -> Row:
    config = ua.UniqueConfig(budget=budget, dense_layers=dense_layers)
    return Row(config, kl, 0.9, 10.0, {0: 0.8, 1: 0.9}, found, 2, 0.1, read)


def calibration(*rows: Row) -> Calibration:
    return Calibration(replace(row(64, 0.0, 1000), config=None), rows, 0.02, [100], 10)


def test_the_recommendation_reads_least_within_the_tolerance():
    rows = row(512, 0.001, 600), row(128, 0.05, 200), row(256, 0.019, 400), row(256, 0.01, 390, found=1)
    assert calibration(*rows).recommended == rows[2].config
    assert calibration(rows[1]).recommended is None
    table = calibration(*rows).table().splitlines()
    assert [line.startswith("*") for line in table] == [False, False, False, False, True, False]
    assert "dense layers" not in table[0]
    assert "dense layers" in calibration(row(64, 0.1, 10, dense_layers=(1,))).table()


def test_layers_that_lose_most_are_tried_dense():
    result = ua.calibrate(tiny(), [ids()], budgets=[32], tolerance=1e-4, **QUICK)
    plain, *tried = result.rows
    worst = min(plain.mass, key=lambda layer: plain.mass[layer])
    assert tried
    assert tried[0].config.dense_layers == (worst,)
    assert worst not in tried[0].mass
    assert plain.bytes_per_token < tried[0].bytes_per_token < result.dense.bytes_per_token


def test_the_model_is_left_as_it_was():
    model = tiny()
    before = model.config._attn_implementation
    ua.calibrate(model, [ids()], budgets=[32], **QUICK)
    assert model.config._attn_implementation == before
    assert hook_of(attention_modules(model)[0]) is None
    config = ua.UniqueConfig(budget=64)
    model = ua.enable(tiny(), config).train()
    ua.calibrate(model, [ids()], budgets=[32], **QUICK)
    assert hook_of(attention_modules(model)[0]).config == config
    assert model.training


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": "a text"}, TypeError, "texts: expected a list of texts or of tokens, got str"),
        ({"texts": []}, TypeError, "texts: expected a list"),
        (
            {"texts": [ids(50)]},
            ValueError,
            r"texts: expected at least 2 \* tail \+ 128 = 168 tokens each, got 50 in text 0",
        ),
        ({"max_tokens": 160}, ValueError, r"max_tokens: expected at least 2 \* tail \+ 128 = 168, got 160"),
        ({"texts": [torch.zeros(300)]}, TypeError, "texts: expected int64 tokens"),
        ({"texts": ["words"]}, ValueError, "tokenizer: expected that of the model"),
        ({"budgets": [1024]}, ValueError, "budgets: expected some of at most half of the 260 tokens"),
        ({"budgets": [20]}, ValueError, "budgets: expected some that are multiples"),
        ({"tail": 0}, ValueError, "tail: expected an integer of at least 1, got 0"),
        ({"tolerance": 0}, ValueError, "tolerance: expected a KL above 0, got 0"),
        ({"rules": ["best"]}, ValueError, "rule: expected"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"texts": [ids()], "budgets": [32], **QUICK, **change}
    with pytest.raises(error, match=message):
        ua.calibrate(tiny(), **arguments)


def test_models_that_cannot_be_calibrated():
    with pytest.raises(ValueError, match="expected one of which some layer can be sparse"):
        ua.calibrate(tiny("mistral-window"), [ids()], budgets=[32], **QUICK)
    with pytest.raises(ValueError, match="not prepared for training"):
        ua.calibrate(ua.enable(tiny(), train=ua.TrainConfig()), [ids()], budgets=[32], **QUICK)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("unique_attn.calibration.command._load", lambda options: (tiny(), letters))
    text = tmp_path / "text.txt"
    text.write_text("a text of many words " * 20, "utf-8")
    out = tmp_path / "made" / "result.json"
    argv = ["--model", "M", "--file", str(text), "--budget", "32", "64", "--page-size", "8", "--rule", "mean"]
    assert main([*argv, "--tail", "16", "--needles", "0", "--tolerance", "1e-9", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "No setting is within a KL of 1e-09" in printed
    assert f"Wrote {out} and {out.with_suffix('.png')}" in printed
    stored = json.loads(out.read_text("utf-8"))
    assert stored["recommended"] is None
    assert [each["config"]["budget"] for each in stored["rows"]][:2] == [32, 64]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert main([*argv, "--tail", "16", "--needles", "0", "--tolerance", "100"]) == 0
    printed = capsys.readouterr().out
    assert "UniqueConfig(" in printed
    assert "rule='mean'" in printed
    assert "budget=32" in printed
    assert "dense_layers" not in printed
    for bad in (tmp_path / "result.png", Path("/proc/result.json")):  # before anything is measured
        monkeypatch.setattr("unique_attn.calibration.command._load", lambda options: pytest.fail("it was loaded"))
        with pytest.raises((ValueError, OSError)):
            main([*argv, "--out", str(bad)])
    assert "calibrate" in command_line.usage()
