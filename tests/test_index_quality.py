"""``benchmarks index_quality``: what it compares is what the ops compute, and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import numbers

from benchmarks.cli import main
from benchmarks.measure.index_formats import FORMATS, OUTLIERS, like_compressed, shipped
from benchmarks.measure.real_keys import RealKeys, texts
from benchmarks.report import quality
from benchmarks.suite import index_quality
from unique_attn.index_format import group_channels


def random_keys(dim: int = 64, tokens: int = 333, page_size: int = 8) -> RealKeys:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 3, 16, dim, generator=random)
    topics = torch.randn(2, 2, tokens // 16 + 1, dim, generator=random).repeat_interleave(16, 2)[:, :, :tokens]
    return RealKeys.of(q, topics + torch.randn(2, 2, tokens, dim, generator=random), page_size)


def test_mass_sums_to_one_and_everything_keeps_all():
    keys = random_keys()
    torch.testing.assert_close(keys.mass.sum(-1), torch.ones(2, 2, 16))
    scores = torch.zeros_like(keys.mass)
    assert keys.kept(scores, [42 * 8]) == pytest.approx([1.0], abs=1e-6)
    assert keys.kept(keys.mass, [16, 64])[0] < keys.kept(keys.mass, [16, 64])[1] < 1


@pytest.mark.parametrize("index_format", ["exact", "compressed"])
def test_the_ops_agree_with_pytorch(index_format: str):
    """Selecting by the ops in fp32 keeps what selecting by the scores in PyTorch keeps."""
    keys, budgets = random_keys(), [64, 128]
    stored = keys.statistics() if index_format == "exact" else shipped(*keys.statistics())
    expected = keys.kept(index_quality.directional(keys, *stored), budgets)
    assert index_quality.by_ops(keys, "directional", index_format, budgets, torch.float32) == pytest.approx(expected)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_compressed_format_is_one_of_its_kind(dim: int):
    mean, std = random_keys(dim).statistics()
    for got, expected in zip(like_compressed(4, group_channels(dim))(mean, std), shipped(mean, std), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_outliers_leave_the_attention_as_it_was():
    keys = random_keys()
    for change in OUTLIERS.values():
        changed = keys.changed(change)
        assert float(changed.k.abs().max()) > 50
        again = RealKeys.of(changed.q, changed.k, 8)
        torch.testing.assert_close(again.mass, keys.mass, rtol=1e-2, atol=1e-4)


def test_sizes_and_texts():
    assert all(form.entry_bytes % 16 == 0 and form.entry_bytes * 8 >= form.bits * 64 for form in FORMATS)
    assert [form.entry_bytes for form in FORMATS if "**" in form.name] == [64]
    assert set(texts([])) == {"prose", "technical"}


def result(monkeypatch: pytest.MonkeyPatch, path: Path) -> dict[str, Any]:
    """What the benchmark writes for a model and texts that are not there."""

    class Tokens:
        input_ids = torch.zeros(1, 333, dtype=torch.long)

    keys = random_keys()
    monkeypatch.setattr(index_quality, "load_model", lambda name, quiet: (None, lambda text, return_tensors: Tokens))
    monkeypatch.setattr(index_quality, "capture", lambda model, ids, queries: (keys.q, keys.k))
    argv = [
        "index_quality",
        "--device",
        "cpu",
        "--queries",
        "16",
        "--budgets",
        "64",
        "128",
        "--out",
        str(path),
    ]
    assert main(argv) == 0
    return json.loads(path.read_text())


def test_run_and_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    found = result(monkeypatch, tmp_path / "index-quality.json")
    printed = capsys.readouterr().out
    assert "S=8" in printed
    assert "normalized per head" in printed
    assert len(found["ops"]) == 3 * 7
    entry = next(r for r in found["ops"] if (r["rule"], r["index"], r["page_size"]) == ("directional", "compressed", 8))
    assert (entry["entry_bytes"], entry["bits"]) == (64, 1.0)
    block = quality.block([found])
    assert "| S=8 `directional`, compressed | 64 | 1 |" in block
    assert "| **`compressed`** | 8.00 | 64 |" in block
    assert quality.block([]) == ""
    pytest.importorskip("matplotlib")
    (picture,) = quality.draw([found, {"bench": "demo"}], tmp_path / "docs")
    assert set(numbers(picture)["lines"]) == {f"{r['rule']}, {r['index']}" for r in found["ops"]}


def test_bad_options():
    with pytest.raises(SystemExit, match="--queries: expected a multiple of 16, got 20"):
        main(["index_quality", "--device", "cpu", "--queries", "20"])
