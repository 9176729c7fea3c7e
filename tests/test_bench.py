"""The benchmarks run, count bytes right, and write JSON that says where it was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import cli, report
from benchmarks.cli import main
from benchmarks.measure import ceiling, harness
from benchmarks.measure.harness import Timing
from benchmarks.suite import soft_mask

SMALL = ["--context", "1024", "--heads", "4/2", "--head-dim", "32", "--budget", "128", "--repeats", "2"]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch):
    """Timing is not what is tested here."""
    monkeypatch.setattr(harness.ColdCache, "flush", lambda self: None)
    monkeypatch.setattr(ceiling, "SIZES", {"cpu": 1 << 20, "cuda": 1 << 20})


def test_every_benchmark_has_the_parts():
    assert "decode" in cli.names()
    for name in cli.names():
        module = importlib.import_module(f"benchmarks.suite.{name}")
        assert module.__doc__
        assert all(callable(getattr(module, part)) for part in ("add_arguments", "run", "report"))


@pytest.mark.parametrize("rule", ["mean", "unique", "directional", "minmax"])
def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture, device, rule: str):
    path = tmp_path / "deep" / "decode.json"
    argv = ["decode", *SMALL, "--rule", rule, "--device", str(device), "--dtype", "fp32", "--out", str(path)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "x faster" in printed
    assert str(path) in printed
    result = json.loads(path.read_text())
    assert result["options"]["rule"] == rule
    assert result["max_error_against_fp32"] < 1e-5
    rows, pages, entry = 2, 128, {"mean": 128, "unique": 128 + 16, "directional": 256, "minmax": 256}[rule]
    assert result["bytes"]["index"] == rows * pages * entry
    assert result["bytes"]["selected_kv"] == rows * 128 * 2 * 128
    assert result["bytes"]["dense"] == rows * 1024 * 2 * 128
    assert result["sdpa"]["bytes"] == result["bytes"]["dense"]
    assert result["unique_decode"]["bytes"] == result["bytes"]["index"] + result["bytes"]["selected_kv"]
    best = result["sdpa_ways"][result["sdpa"]["way"]]["median_ms"]
    assert best == min(way["median_ms"] for way in result["sdpa_ways"].values() if "median_ms" in way)
    assert result["speedups"]["sdpa"] == pytest.approx(best / result["unique_decode"]["median_ms"], rel=0.02, abs=0.01)
    assert result["speedup"] == result["speedups"][result["peer"]] <= result["speedups"]["sdpa"]
    assert set(result["parts"]) == {"page_index", "page_scores", "topk_pages", "sparse_decode"}
    assert main([*argv[:-1], str(path), "--table", "4096"]) == 0  # room for more changes no result
    wide = json.loads(path.read_text())
    assert wide["options"]["table"] == 4096
    assert wide["bytes"] == result["bytes"]
    assert wide["max_error_against_fp32"] < 1e-5
    environment = result["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert str(Path.home()) not in path.read_text()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--heads", "32"], "--heads: expected QUERY/KV"),
        (["--context", "1000"], "--context: expected a multiple of the block size 64, got 1000"),
        (["--budget", "100"], "--budget: expected a multiple of the page size 8, got 100"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
    ],
)
def test_bad_options(argv: list[str], complaint: str):
    with pytest.raises(SystemExit, match=complaint):
        main(["decode", *argv])


def test_timing():
    timing = Timing.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert timing == Timing(median=6.0, p10=2.0, p90=10.0, best=1.0, rounds=11)
    assert timing.to_json()["median_ms"] == 6000.0


def test_measure_takes_turns():
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = harness.measure(runs, torch.device("cpu"), rounds=3, warmup=1)
    assert calls == list("abababab")
    assert all(timing.rounds == 3 for timing in timings.values())


def test_soft_mask(tmp_path: Path, capsys: pytest.CaptureFixture, device):
    path = tmp_path / "soft_mask.json"
    shape = ["--tokens", "192", "96", "96", "--heads", "4/2", "--head-dim", "32", "--budget", "32", "--repeats", "1"]
    dtype = "bf16" if device.type == "cuda" else "fp32"  # what SDPA's flash kernels take
    assert main(["soft_mask", *shape, "--device", str(device), "--dtype", dtype, "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["options"]["tokens"] == [96, 192] == [each["tokens"] for each in result["lengths"]]
    assert result["environment"]["torch"] == torch.__version__
    for each in result["lengths"]:
        sides = each["sides"]
        assert {"soft", "hard", "dense", "sdpa_flash_attention"} <= set(sides)
        assert sides["sdpa_flash_attention"]["times_peer"]["step"] == 1
        for side in sides.values():
            forward, step = side["forward"]["median_ms"], side["step"]["median_ms"]
            assert forward > 0
            assert side["backward_ms"] == pytest.approx(step - forward, abs=1e-4)
            work = 2 * each["tokens"] ** 2 * 32 * 4
            assert side["tflops"]["forward"] == pytest.approx(work / forward / 1e9, rel=1e-3)
            assert side["tflops"]["step"] == pytest.approx(3.5 * work / step / 1e9, rel=1e-3)
            assert (side["memory"] is None) == (device.type == "cpu")
        assert set(each["parts"]) == {"index", "boundary", "selection"}
        assert each["largest_error"] < (0.05 if dtype == "bf16" else 1e-4)
    assert (result["bytes_per_token"] is None) == (device.type == "cpu")
    assert "sdpa_flash_attention" in capsys.readouterr().out
    text = report.training.block([result])
    assert "| 96 |" in text
    assert "| 192 |" in text
    assert str(Path.home()) not in path.read_text()


def test_bytes_per_token():
    lengths, line = [8, 16, 32], [100 + 3 * n for n in (8, 16, 32)]
    assert soft_mask.slope(lengths, line) == pytest.approx(3)
    assert soft_mask.slope(lengths, [5, 5, 5]) == pytest.approx(0)
    assert soft_mask.slope([1, 2, 3], [1, 2, 4]) == pytest.approx(1.5)
    sides = [{"soft": {"memory": {"forward_bytes": n, "backward_bytes": 2 * n + 7}}} for n in line]
    found = soft_mask._bytes_per_token([{"tokens": n, "sides": side} for n, side in zip(lengths, sides)])
    assert found == {"soft": {"forward": 3, "backward": 6}}
    assert soft_mask._bytes_per_token([{"tokens": 8, "sides": sides[0]}]) is None


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--heads", "32"], "--heads: expected QUERY/KV"),
        (["--tokens", "0", "8"], "--tokens: expected at least 1, got 0"),
        (["--budget", "100"], "--budget: expected a multiple of the page size 8, got 100"),
    ],
)
def test_bad_options_of_soft_mask(argv: list[str], complaint: str):
    with pytest.raises(SystemExit, match=complaint):
        main(["soft_mask", "--device", "cpu", *argv])
