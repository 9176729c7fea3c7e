"""Sweeps over shapes: bytes, floors and ratios are what the JSON says, wrong sides are reported and not timed."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cli
from benchmarks.cli import main
from benchmarks.measure import ceiling, checks, harness, inputs, machine, peers, sweep
from benchmarks.measure.harness import Side, compare
from benchmarks.suite import topk

SWEEPS = ("attention", "decode", "index", "scores", "topk")
HEADS = ["--heads", "4/2", "--head-dim", "32", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch):
    """Timing is not what is tested here."""
    monkeypatch.setattr(harness.ColdCache, "flush", lambda self: None)
    monkeypatch.setattr(ceiling, "SIZES", {"cpu": 1 << 20, "cuda": 1 << 20})


def results(tmp_path: Path, device: torch.device, name: str, *argv: str) -> dict[str, Any]:
    path = tmp_path / "result.json"
    assert main([name, *argv, "--device", str(device), "--repeats", "2", "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["bench"] == name
    assert {"date", "commit", "device", "torch", "cpu"} <= set(result["environment"])
    assert result["ceiling"]["gb_per_s"] == max(result["ceiling"]["all"].values()) > 0
    assert str(Path.home()) not in path.read_text()
    return result


def assert_row(row: dict[str, Any], size: int, ceiling: dict[str, Any]) -> None:
    assert "failed" not in row, row
    assert row["bytes"] == size
    assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    floor = size / ceiling["gb_per_s"] / 1e6
    assert row["floor_ms"] == pytest.approx(floor, abs=1e-5)
    assert row["percent_of_ceiling"] == pytest.approx(100 * floor / row["median_ms"], rel=0.01, abs=0.06)


def test_scores(tmp_path: Path, device):
    sweep = ["--batch", "2", "--context", "512", "1024", "--tokens", "1", "3", "--rule", "unique", "minmax"]
    result = results(tmp_path, device, "scores", *sweep, *HEADS)
    assert [(c["options"]["context"], c["options"]["tokens"], c["options"]["rule"]) for c in result["cases"]] == [
        (n, t, rule) for n in (512, 1024) for t in (1, 3) for rule in ("unique", "minmax")
    ]
    for case in result["cases"]:
        o = case["options"]
        pages = 2 * 2 * o["context"] // 8
        assert_row(case["ours"], pages * {"unique": 128 + 16, "minmax": 256}[o["rule"]], result["ceiling"])
        assert case["written_bytes"] == pages * o["tokens"] * 4


def test_attention(tmp_path: Path, device, capsys: pytest.CaptureFixture):
    sweep = ["--batch", "2", "--context", "2048", "--tokens", "1", "4", "--page-size", "4", "16", "--budget", "128"]
    result = results(tmp_path, device, "attention", *sweep, *HEADS)
    assert set(result["chunk_ceilings"]) == {"512", "2048"}  # 4 and 16 tokens of 32 channels of 4 bytes
    for case in result["cases"]:
        o = case["options"]
        one = 2 * 2 * 128 * 2 * 128
        ceiling = result["chunk_ceilings"][str(o["page_size"] * 128)]
        assert case["chunk_bytes"] == o["page_size"] * 128
        if o["tokens"] == 1:
            assert_row(case["ours"], one, ceiling)
        else:  # pages that several tokens selected are read once
            assert one < case["ours"]["bytes"] < 4 * one
            assert_row(case["ours"], case["ours"]["bytes"], ceiling)
    assert "randomly placed chunks" in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["mean", "unique", "directional", "minmax"])
def test_index(tmp_path: Path, device, rule: str):
    sweep = ["--batch", "3", "--context", "1024", "--new", "0", "1", "9", "--rule", rule]
    result = results(tmp_path, device, "index", *sweep, *HEADS)
    entry = {"mean": 128, "unique": 128 + 16, "directional": 256, "minmax": 256}[rule]
    for case, pages in zip(result["cases"], (128, 1, 2), strict=True):
        assert_row(case["ours"], 3 * 2 * pages * (8 * 128 + entry), result["ceiling"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("forced", ["0", "1"])
def test_topk(tmp_path: Path, device, dtype: str, forced: str):
    sweep = ["--rows", "6", "--pages", "300", "--k", "17", "--values", *topk.VALUES, "--dtype", dtype]
    result = results(tmp_path, device, "topk", *sweep, "--sink-pages", forced, "--recent-pages", forced)
    assert [case["options"]["values"] for case in result["cases"]] == list(topk.VALUES)
    for case in result["cases"]:
        ours, peer = case["ours"], case["peers"]["torch"]
        assert_row(ours, 6 * 300 * (2 if dtype == "bf16" else 4), result["ceiling"])
        assert peer["median_ms"] == min(way["median_ms"] for way in peer["ways"].values())
        assert peer["ratio"] == pytest.approx(peer["median_ms"] / ours["median_ms"], rel=0.01, abs=0.001)
        assert ("launched" in ours) == (device.type == "cuda")
        if device.type == "cuda":
            launched = peer["launched"]["median_ms"] / ours["launched"]["median_ms"]
            assert peer["launched_ratio"] == pytest.approx(launched, rel=0.01, abs=0.001)


def test_decode_over_shapes(tmp_path: Path, device, capsys: pytest.CaptureFixture):
    sweep = ["--batch", "1", "2", "--context", "1024", "--page-size", "4", "16", "--budget", "128"]
    result = results(tmp_path, device, "decode", *sweep, *HEADS)
    assert len(result["cases"]) == 4
    for case in result["cases"]:
        o, dense = case["options"], case[case["peer"]]
        index = o["batch"] * 2 * 1024 // o["page_size"] * 256
        assert_row(case["unique_decode"], index + o["batch"] * 2 * 128 * 256, result["ceiling"])
        assert_row(dense, o["batch"] * 2 * 1024 * 256, result["ceiling"])
        expected = dense["median_ms"] / case["unique_decode"]["median_ms"]
        assert case["speedup"] == pytest.approx(expected, rel=0.01, abs=0.01)
        assert case["max_error_against_fp32"] < 1e-5
    printed = capsys.readouterr().out
    if device.type == "cpu":
        assert result["peers"]["flashinfer"] == "absent: needs CUDA"
        assert "flashinfer absent: needs CUDA" in printed
        assert "flashinfer" not in result["cases"][0]


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "topk"])
def test_what_does_not_fit_is_skipped(tmp_path: Path, name: str, capsys: pytest.CaptureFixture):
    argv = ["--context", "65536", "128", "--memory", "0.3"]
    argv += ["--batch", "16", "--head-dim", "8", "--heads", "64/64"]
    if name in ("attention", "decode"):
        argv += ["--budget", "64"]
    result = results(tmp_path, torch.device("cpu"), name, *argv)
    large, small = result["cases"]
    assert "needs" in large["skipped"]
    assert "0.3 GiB are free" in large["skipped"]
    assert "skipped" not in small
    assert large["skipped"] in capsys.readouterr().out


@pytest.mark.parametrize("reached", [0, 2])
def test_a_run_that_is_stopped_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, reached: int):
    """Ctrl-C, or the SIGTERM of a time limit."""
    measured: list[int] = []

    def measure_shape(shape: sweep.Shape, *_: object) -> dict[str, Any]:
        if len(measured) == reached:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        measured.append(shape.batch)
        return {"found": shape.batch}

    options = cli.parser().parse_args(["decode", "--batch", "1", "2", "3", "4"])
    run = partial(sweep.run_sweep, "decode", options, ("batch",), {}, lambda _: 0, measure_shape)
    if reached == 0:
        with pytest.raises(KeyboardInterrupt):
            run()
        return
    cases = run()["cases"]
    assert [case.get("found") for case in cases] == [1, 2, None, None]
    assert all(case["skipped"] == "the run was stopped" for case in cases[2:])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_decode_without_a_peer(tmp_path: Path):
    shape = ["--context", "512", "--budget", "64", "--peers"]
    result = results(tmp_path, torch.device("cpu"), "decode", *shape, *HEADS)
    assert result["peer"] is None
    assert result["speedup"] is None
    assert "sdpa" not in result
    assert result["unique_decode"]["median_ms"] > 0


# ---- The harness. ----


def test_a_wrong_side_is_reported_and_not_timed(device):
    x = torch.arange(8.0, device=device)

    def check(i: int, out: torch.Tensor) -> None:
        assert torch.equal(out, x + 1), "the sum is wrong"

    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    sides = {"right": [lambda: x + 1] * 3, "wrong": [lambda: x + 2], "broken": [broken]}
    found = compare({name: Side(calls, 64, check) for name, calls in sides.items()}, device, rounds=3)
    assert set(found.timings) == {"right"}
    assert found.timings["right"].rounds == 3
    assert "the sum is wrong" in found.failed["wrong"]
    assert found.failed["broken"] == "RuntimeError: no kernel for this"
    assert "failed" in harness.outcome(found, "wrong", 64, {"gb_per_s": 1.0})
    best = harness.best_of(found, ["wrong", "right"], 64, {"gb_per_s": 1.0})
    assert best["way"] == "right"
    assert harness.ratio(best, {"failed": "x"}) is None


def test_outputs_that_are_not_written_are_noticed(device):
    x = torch.ones(1 << 12, device=device)

    def half() -> torch.Tensor:
        out = torch.empty_like(x)
        out[: len(out) // 2] = 1
        return out

    def check(i: int, out: torch.Tensor) -> None:
        assert torch.equal(out, x), "values were not written"

    for _ in range(2):  # the second time over memory that holds the right values
        found = compare({"half": Side([half], 8, check)}, device, rounds=1)
        assert "values were not written" in found.failed["half"]
        del found
        x.clone()
    assert not torch.are_deterministic_algorithms_enabled()


def test_poison():
    tensors = (torch.zeros(3), [torch.zeros(3, dtype=torch.int32)], torch.zeros(3, dtype=torch.uint8), None)
    harness.poison(tensors)
    assert tensors[0].isnan().all()
    assert (tensors[1][0] == -77).all()
    assert (tensors[2] == 255).all()


@pytest.mark.parametrize("size", [512, 48, 4096])
def test_ceilings(device, size: int):
    ceilings = ceiling.Ceilings(device, rounds=1)
    found = ceilings.chunks(size)
    assert found["gb_per_s"] > 0
    assert ceilings.chunks(size) is found
    assert list(ceilings.measured_chunks()) == [str(size)]
    assert ceilings.sequential["way"] in ceilings.sequential["all"]


def test_ceilings_of_odd_chunks():
    with pytest.raises(ValueError, match="a multiple of 16 bytes"):
        ceiling.Ceilings(torch.device("cpu"), rounds=1).chunks(24)


# ---- Inputs and checks. ----


def test_values_of_scores():
    random = inputs.Random(torch.device("cpu"), torch.bfloat16)
    made = {name: make(random, 5, 200, 16) for name, make in topk.VALUES.items()}
    assert all(x.shape == (5, 200) and x.dtype == torch.bfloat16 for x in made.values())
    assert made["random"].unique().numel() > 100
    assert made["equal"].unique().numel() == 1
    assert made["two"].unique().numel() == 2
    assert (made["sorted"].diff() >= 0).all()
    assert (made["infinite"].isfinite().sum(-1) == 16).all()


def test_random_pages():
    pages = inputs.Random(torch.device("cpu"), torch.float32).pages((3, 2, 4), 50, 20)
    assert pages.shape == (3, 2, 4, 20)
    assert (pages.diff() > 0).all()
    assert pages.min() >= 0
    assert pages.max() < 50
    assert pages.unique().numel() == 50  # anywhere in the context


def test_checks_of_a_decode_step_catch_what_is_wrong():
    decode = importlib.import_module("benchmarks.suite.decode")
    shape = argparse.Namespace(
        batch=2, context=512, table=0, heads="4/2", head_dim=32, page_size=8, block_size=64, budget=64,
        rule="directional", index_format="exact", dtype="fp32",
    )  # fmt: skip
    step = decode.Step(shape, torch.device("cpu"))
    out, lse, pages = step.unique(0)
    assert step.check(0, (out, lse, pages)) < 1e-5
    for wrong in (torch.full_like(out, torch.nan), out * 1.1):
        with pytest.raises(AssertionError):
            step.check(0, (wrong, lse, pages))
    with pytest.raises(AssertionError, match="lse"):
        step.check(0, (out, lse + 1, pages))
    left_out = torch.tensor([p for p in range(64) if p not in pages[0, 0, 0].tolist()][-1], dtype=torch.int32)
    worse = pages.clone()
    worse[0, 0, 0, 3] = left_out
    worse = worse.sort(-1).values
    with pytest.raises(AssertionError, match="a larger score was left out"):
        step.check(0, (out, lse, worse))
    without_first = pages.clone()
    without_first[0, 0, 0, 0] = left_out
    with pytest.raises(AssertionError, match="first page is missing"):
        step.check(0, (out, lse, without_first.sort(-1).values))
    with pytest.raises(AssertionError, match="not ascending"):
        step.check(0, (out, lse, pages.flip(-1)))


def test_infinities_must_be_in_place():
    expected = torch.tensor([1.0, -torch.inf])
    assert checks.close("x", expected.clone(), expected, 1e-6) == 0
    with pytest.raises(AssertionError, match="infinities"):
        checks.close("x", torch.tensor([-torch.inf, 1.0]), expected, 1e-6)


# ---- Shapes, peers, files. ----


@pytest.mark.parametrize("name", SWEEPS)
def test_presets(name: str):
    module = importlib.import_module(f"benchmarks.suite.{name}")
    for preset in module.PRESETS:
        options = cli.parser().parse_args([name, "--preset", preset])
        found = sweep.shapes(options, module.FIELDS, module.PRESETS)
        assert found
        assert len({str(shape) for shape in found}) == len(found)
    every = [vars(s) for s in sweep.shapes(options, module.FIELDS, module.PRESETS)]
    assert preset == "table"

    def has(**wanted: Any) -> bool:
        return any(wanted.items() <= shape.items() for shape in every)

    if name == "scores":
        assert all(has(batch=b, context=n) for b in (1, 8, 32, 80) for n in (8192, 131072))
        assert all(has(head_dim=d, page_size=s) for d in (64, 128) for s in (4, 8, 16, 32))
        assert has(tokens=16)
    if name == "topk":
        assert all(has(rows=256, k=64, pages=n << 10) for n in (1, 2, 4, 8, 16, 32, 64, 128))
        assert all(has(rows=r, pages=p) for r, p in ((640, 4096), (8, 16384), (8, 131072)))
    if name == "decode":
        assert all(has(batch=b, head_dim=d, context=8192, budget=512) for b in (80, 32, 8, 1) for d in (64, 128))
        assert all(has(page_size=s) for s in (4, 8, 16, 32))


def test_a_preset_leaves_other_flags():
    options = cli.parser().parse_args(["scores", "--preset", "tokens", "--dtype", "fp16", "--batch", "3"])
    module = importlib.import_module("benchmarks.suite.scores")
    found = sweep.shapes(options, module.FIELDS, module.PRESETS)
    assert {(s.dtype, s.batch) for s in found} == {("fp16", 32)}


def test_committed_commands_are_valid():
    for device in ("cpu", "cuda"):
        commands = cli.committed(device)
        assert commands
        for command in commands:
            cli.parser().parse_args([*command, "--results", "x"])
    assert ["decode", "--dtype", "bf16"] in cli.committed("cpu")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["scores", "--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["index", "--new", "-1"], "--new: expected at least 0, got -1"),
        (["index", "--new", "99", "--context", "64"], "--new: expected at most the context 64, got 99"),
        (["topk", "--k", "1"], "--k: expected the pages always taken up to the 4096 pages of a row, got 1"),
        (["topk", "--k", "5000"], "--k: expected the pages always taken"),
        (["decode", "--threads", "-1"], "--threads: expected at least 0, got -1"),
    ],
)
def test_bad_options(argv: list[str], complaint: str):
    with pytest.raises(SystemExit, match=complaint):
        main([*argv, "--device", "cpu"])


def test_an_absent_flashinfer_is_a_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    peers._import_flashinfer.cache_clear()
    try:
        assert peers.flashinfer(torch.device("cuda")) is None
        versions = peers.versions(torch.device("cuda"))
        assert versions["flashinfer"].startswith("absent: ModuleNotFoundError")
        assert peers.notes(versions) == [f"flashinfer {versions['flashinfer']}"]
    finally:
        peers._import_flashinfer.cache_clear()
    ways = peers.topk_ways([torch.randn(3, 40)], 4)
    assert set(ways) == {"torch_sorted", "torch_unsorted"}


def test_a_cache_in_the_layout_of_flashinfers_examples():
    """The same tokens in the same order, in blocks of 16 tokens and with heads innermost."""
    cache = torch.randn(6, 2, 32, 8)
    table = torch.tensor([[4, 1, 0], [5, 2, 3]], dtype=torch.int32)
    copy, fine = peers.nhd(cache), peers.nhd_table(table, 32)
    assert copy.shape == (12, 16, 2, 8)
    assert fine.dtype == torch.int32
    for row in range(2):
        tokens = cache[table[row].long()].transpose(1, 2).flatten(0, 1)  # [96, H, D]
        assert torch.equal(copy[fine[row].long()].flatten(0, 1), tokens)


def test_files_name_themselves(tmp_path: Path):
    shape = ["--context", "512", "--budget", "64", *HEADS]
    argv = ["decode", *shape, "--device", "cpu", "--repeats", "1", "--results", str(tmp_path)]
    assert main(argv) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["decode-cpu-fp32.json"]
    slugs = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "cpu": "cpu"}
    assert {name: machine.slug(name) for name in slugs} == slugs


def test_from_python():
    result = cli.run("topk", rows=[2, 3], pages=128, k=8, device="cpu", repeats=1)
    assert [case["options"]["rows"] for case in result["cases"]] == [2, 3]
    assert result["peers"]["torch"] == torch.__version__
    with pytest.raises(SystemExit):
        cli.run("topk", colour="red")
