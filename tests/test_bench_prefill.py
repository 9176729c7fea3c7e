"""``benchmarks prefill`` and ``ttft``: lists are as full as they say, wrong outputs are noticed, the JSON is what was
measured, and the report says it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_prefill_cases import CPU, LAYER, MODEL, TINY, options, prompt, run_prefill, written
from pictures import numbers

from benchmarks import cli
from benchmarks.cli import main
from benchmarks.measure import block_lists, ceiling, harness, prefill_peers, prefill_sides
from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.prompts import Expected
from benchmarks.report import prefill as prefill_report
from benchmarks.suite import prefill, ttft
from unique_attn import ops


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch):
    """Timing is not what is tested here."""
    monkeypatch.setattr(harness.ColdCache, "flush", lambda self: None)
    monkeypatch.setattr(ceiling, "SIZES", {"cpu": 1 << 20, "cuda": 1 << 20})


# ---- Lists of blocks. ----


@pytest.mark.parametrize("tokens", [1, 100, 128, 129, 700])
def test_blocks_are_those_of_the_ops(tmp_path: Path, tokens: int):
    """A mask of all forced blocks is what selecting nothing leaves, one of all blocks is as dense as can be."""
    blocks = Blocks(tokens)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    shares = torch.zeros(blocks.slots, 2, blocks.keys)
    least, _ = ops.select_blocks(shares, bounds, bounds, threshold=1.0)
    assert torch.equal(
        ops.unpack_block_mask(least, blocks.keys)[: blocks.queries], blocks.forced()[:, None].expand(-1, 2, -1)
    )
    every, _ = ops.select_blocks(shares, bounds, bounds, threshold=0.0)
    assert block_lists.density(blocks, every) == 1
    assert block_lists.density(blocks, least) == pytest.approx(float(blocks.forced().sum() / blocks.seen().sum()))


@pytest.mark.parametrize("density", [0.06, 0.25, 1.0])
def test_random_lists(density: float):
    blocks = Blocks(8192)
    kept = block_lists.random_lists(blocks, 3, density, torch.Generator().manual_seed(0))
    assert kept.shape == (65, 3, 128)
    assert not kept[64:].any()
    rows = kept[:64]
    assert (rows >= blocks.forced()[:, None]).all()
    assert (rows <= blocks.seen()[:, None]).all()
    found = block_lists.density(blocks, ops.pack_block_mask(kept))
    assert found == pytest.approx(density, rel=0.02, abs=0.03 if density < 0.1 else 0)  # the forced ones are more
    assert density == 1 or not torch.equal(rows[:, 0], rows[:, 1])


def test_a_setting_is_found():
    x, found = block_lists.find_setting(0.3, lambda x: x * x)
    assert x == pytest.approx(math.sqrt(0.3), rel=1e-3)
    assert found == x * x
    assert block_lists.find_setting(0.3, lambda x: 0.5 if x > 0.9 else 0.1)[1] in (0.1, 0.5)  # what is closest


def test_inputs_are_uneven():
    made = prompt(2048)
    bounds = made.cu_seqlens
    shares = ops.composite_blocks(*made.sets[0][:2], bounds, bounds, 2048, 2048)
    best = shares.sort(-1, descending=True).values[8:16]
    few = (best[..., :4].sum(-1) / best.sum(-1)).mean(0)  # of 18 to 32 blocks, by head
    assert few.mean() > 0.4
    assert few[3] > few[0]


@pytest.mark.parametrize("mask_heads", [0, 1, 2, 4])
def test_the_oracle_on_slices_is_the_oracle(mask_heads: int):
    """0: dense attention."""
    made, generator = prompt(700), torch.Generator().manual_seed(1)
    kept = block_lists.random_lists(made.blocks, max(1, mask_heads), 0.5 if mask_heads else 1.0, generator)
    mask = ops.pack_block_mask(kept)
    bounds = made.cu_seqlens
    out, lse = ops.block_sparse_attention(*made.sets[0], bounds, bounds, 700, mask)
    expected = Expected(made, 0, mask if mask_heads else None)
    assert len(expected.parts) == 4
    expected.check(out, lse)
    with pytest.raises(AssertionError, match="out: relative error"):
        expected.check(out * 1.01, lse)
    with pytest.raises(AssertionError, match="lse: relative error"):
        expected.check(out, lse + 1)
    out[3, 1, 2] = math.nan  # anywhere
    with pytest.raises(AssertionError, match="out: NaN"):
        expected.check(out, lse)


# ---- FlexAttention. ----


@pytest.mark.slow
def test_flex_attends_to_the_same_blocks(device: torch.device):
    """Compiled: without, it goes by its mask function alone."""
    made = prompt(512, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    kept = block_lists.random_lists(made.blocks, 4, 0.4, made.generator)
    flex = prefill_peers.Flex({"default": {}})
    for merged in (False, True):
        flex.option, flex.merged = "default", merged
        listed = flex.lists(made.blocks, kept)
        assert torch.equal(listed, kept) is not merged
        assert (listed >= kept).all()
        out = flex.attend(made.rows[0], flex.mask(made.blocks, kept))
        Expected(made, 0, ops.pack_block_mask(listed)).check(out[0].transpose(0, 1))


@pytest.mark.parametrize("tokens", [256, 700])
def test_masks_of_flex(tokens: int):
    made = prompt(tokens)
    kept = block_lists.random_lists(made.blocks, 4, 0.5, made.generator)
    mask = prefill_peers.flex_mask(made.blocks, kept)
    assert torch.equal(mask.to_dense()[0].bool(), kept[: made.blocks.queries].transpose(0, 1))
    whole = mask.full_kv_num_blocks[0, :, 1]  # of the queries 128 to 255, whose diagonal begins at key 128
    assert torch.equal(whole, kept[1, :, :2].sum(-1).int())


def test_ways_to_call_flex(monkeypatch: pytest.MonkeyPatch):
    made = prompt(256)
    kept = block_lists.random_lists(made.blocks, 4, 1.0, made.generator)
    flex = prefill_peers.Flex({"good": {}, "bad": {}}, compiled=False)
    attend = flex.attend

    def some(rows: Any, mask: Any, option: str | None = None) -> torch.Tensor:
        if option == "bad" or not flex.merged:
            raise ValueError("Q and KV block size must be divisible")
        return attend(rows, mask, option)

    monkeypatch.setattr(flex, "attend", some)
    flex.prepare(made.rows[0], made.blocks, kept)
    assert (flex.option, flex.merged, flex.broken) == ("good", True, "")
    assert set(flex.failed) == {"good", "bad", "bad, pairs of key blocks"}
    assert flex.described()["block_size"] == [128, 128]

    broken = prefill_peers.Flex({"good": {}}, compiled=False)
    monkeypatch.setattr(broken, "attend", lambda *args: 1 / 0)
    broken.prepare(made.rows[0], made.blocks, kept)
    assert "ZeroDivisionError" in broken.broken
    side = prefill_sides.Sparse(options(), made, 50, broken)
    assert side.flex_side() is None


# ---- prefill. ----


def test_prefill(tmp_path: Path, capsys: pytest.CaptureFixture):
    result = run_prefill(tmp_path, "--method", "directional", "unisparse")
    assert [(case["tokens"], case["density"]) for case in result["cases"]] == [
        (n, density) for n in (512, 1024) for density in (60, 40)
    ]
    assert result["peers"]["flashinfer"].startswith("not measured")
    assert result["targets"]["speedups"] == {"40": {"sdpa_flash_attention": 1.5}}
    for case in result["cases"]:
        sides = case["sides"]
        parts = [
            f"{method}_{part}" for method in prefill_sides.SELECTIONS for part in ("call", "selection", "attention")
        ]
        assert set(sides) == {"sdpa_flash_attention", "lists", *parts}
        assert all("median_ms" in side for side in sides.values()), sides
        forced = Blocks(case["tokens"]).forced().sum() / Blocks(case["tokens"]).seen().sum()
        wanted = max(case["density"] / 100, float(forced))
        assert case["lists"]["density"] == pytest.approx(wanted, abs=0.1)
        for method, name in prefill_sides.SELECTIONS.items():
            call = case["calls"][method]
            assert call["density"] == pytest.approx(wanted, abs=0.05)
            assert 0 <= call["setting"][name] <= 1
            assert 0 < call["kept"] <= 1
            assert call["extra_bytes"] is None
            dense, ours = sides["sdpa_flash_attention"]["median_ms"], sides[f"{method}_call"]["median_ms"]
            assert call["speedups"]["sdpa_flash_attention"] == pytest.approx(dense / ours, rel=0.01, abs=0.001)
    assert "(1.5x)" in capsys.readouterr().out
    block = prefill_report.block([result])
    assert "`unique_prefill` with `directional` and `unisparse`, threshold or top-p chosen" in block
    assert block.count("| 1K | 40% |") == 2
    assert "faster than SDPA" in block
    assert prefill_report.figures([result]) == {}  # of a CPU


def test_both_kernels_and_all_peers_are_in_the_table(tmp_path: Path):
    """A result of a GPU, made of one of a CPU."""
    result = run_prefill(tmp_path)
    result["environment"]["device"] = "NVIDIA H100 80GB HBM3"
    result["bytes_per_token_and_head"] = {"directional": 41.0}
    for case in result["cases"]:
        case["sides"] |= dict.fromkeys(("dense", "sdpa_cudnn", "flex"), case["sides"]["lists"])
        case["lists"]["percent_of_dense_per_block"] = 87.5
        case["calls"]["directional"]["speedups"] |= {"sdpa_cudnn": 2.5, "dense": 2.4, "sdpa_flash_attention": 5.0}
    block = prefill_report.block([result])
    head = (
        "| tokens | density | FlashAttention-2 | cuDNN | our dense kernel | given lists | FlexAttention, same lists "
        "| whole call | selection | faster than FlashAttention-2 | faster than cuDNN |"
    )
    assert head in block
    assert "88% a block" in block
    assert "**5.00x** | **2.50x** |" in block
    assert "41 bytes per token and query head" in block
    assert "the same for FlexAttention" in block
    assert prefill_report.figures([result]) == {
        "60% of the blocks": {512: 2.4, 1024: 2.4}, "40% of the blocks": {512: 2.4, 1024: 2.4}
    }  # fmt: skip
    assert "](docs/prefill_speed.png)" in block
    pytest.importorskip("matplotlib")
    (path,) = prefill_report.draw([result], tmp_path)
    assert numbers(path)["lines"]["40% of the blocks"] == {"512": 2.4, "1024": 2.4}


def test_a_call_that_is_not_the_three_ops_is_reported_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    call = ops.unique_prefill

    def other_mask(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        out, lse, mask, kept = call(*args, **kwargs)
        return out, lse, mask | 1 << 3, kept

    monkeypatch.setattr(ops, "unique_prefill", other_mask)
    case = run_prefill(tmp_path, "--tokens", "512")["cases"][0]
    assert "the mask is not that of the ops by hand" in case["sides"]["directional_call"]["failed"]
    assert case["calls"]["directional"]["speedups"] == {"sdpa_flash_attention": None}
    assert "median_ms" in case["sides"]["directional_attention"]
    assert "the mask is not" in capsys.readouterr().out

    monkeypatch.setattr(ops, "unique_prefill", call)
    monkeypatch.setattr(ops, "composite_blocks", lambda *args, **kwargs: 1 / 0)
    case = run_prefill(tmp_path, "--tokens", "512")["cases"][0]
    assert "ZeroDivisionError" in case["calls"]["directional"]["failed"]
    assert "median_ms" in case["sides"]["lists"]
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert "| - |" in prefill_report.block([{**run_prefill(tmp_path, "--tokens", "512")}])


def test_dense_kernels_are_checked():
    sides = prefill_sides.dense_sides(prompt(300), ours=True)
    assert set(sides) == {"dense", "sdpa_flash_attention"}
    found = harness.compare(sides, CPU, rounds=1)
    assert not found.failed
    out, lse = sides["dense"].calls[0]()
    with pytest.raises(AssertionError, match="relative error"):
        sides["dense"].check(0, (out.roll(1, 0), lse))


def test_what_does_not_fit_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefill, "free_bytes", lambda device: prefill.needed(parsed(), 1024) - 1)
    small, _, large, _ = run_prefill(tmp_path)["cases"]
    assert "sides" in small
    assert large["skipped"].startswith("needs ")


def parsed(*argv: str) -> argparse.Namespace:
    return cli.parser().parse_args(["prefill", *LAYER, *argv])


def test_memory_of_lengths():
    def case(tokens: int, **sizes: int) -> dict[str, Any]:
        return {"tokens": tokens, "calls": {method: {"extra_bytes": size} for method, size in sizes.items()}}

    cases = [case(1000, a=32_000, b=5), case(1000, a=36_000), case(2000, a=68_000), {"tokens": 4000, "skipped": "x"}]
    assert prefill.bytes_per_token_and_head(cases, 8) == {"a": 4.0}
    assert prefill.bytes_per_token_and_head([{"tokens": 8, "calls": {"a": {"failed": "x"}}}], 8) == {}


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["prefill", "--density", "0"], "--density: expected more than 0 and at most 100 percent, got 0"),
        (["prefill", "--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["prefill", "--heads", "32"], "--heads: expected QUERY/KV"),
        (["ttft", "--density", "120"], "--density: expected more than 0 and at most 100 percent, got 120"),
        (["prefill_quality", "--length", "100"], "--length: expected more than the 1024 tokens of --tail, got 100"),
        (["prefill_quality", "--threshold", "--top-p"], "--threshold, --top-p: expected a value"),
        (["prefill_quality", "--trials", "-1"], "--trials: expected at least 0, got -1"),
    ],
)
def test_bad_options(argv: list[str], complaint: str):
    with pytest.raises(SystemExit, match=complaint):
        main([*argv, "--device", "cpu"])


def test_committed_commands():
    assert ["prefill"] in cli.committed("cuda")
    found = [cli.parser().parse_args(command) for command in cli.committed("cuda") if command[0] == "ttft"]
    from benchmarks.measure.sweep import shapes

    shown = {(o.layers, o.context) for o in shapes(found[0], ttft.FIELDS, ttft.PRESETS)}
    assert shown == {(layers, n << 10) for layers in (16, 32) for n in (32, 64, 128)}


# ---- ttft. ----


def test_ttft(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("transformers")
    argv = ["ttft", *TINY, "--context", "1024", "--density", "60", "--repeats", "1", "--device", "cpu"]
    result = written(tmp_path, *argv)
    (case,) = result["cases"]
    assert set(case["sides"]) == {"sdpa", "dense", "sparse_60"}
    for name, side in case["sides"].items():
        assert side["median_ms"] > 0, name
        assert side["next_ms"] > 0
        assert side["peak_bytes"] is None
        assert side.get("logits_error", 0) < 1e-4
    sparse = case["sides"]["sparse_60"]
    assert sparse["density"] == pytest.approx(0.6, rel=0.2)
    for peer in ("sdpa", "dense"):
        ratio = case["sides"][peer]["median_ms"] / sparse["median_ms"]
        assert case["speedups"]["sparse_60"][peer] == pytest.approx(ratio, rel=0.01, abs=0.001)
    assert "x sdpa" in capsys.readouterr().out
    assert prefill_report.block([result]) == ""  # of a CPU
    result["environment"]["device"] = "NVIDIA H200"
    result["peers"]["transformers"] = "5.99"
    block = prefill_report.block([result])
    assert "transformers 5.99" in block
    assert "| model | tokens | `sdpa` | `dense` | sparse, 60% |" in block
    assert f"({100 * sparse['density']:.1f}%), **{case['speedups']['sparse_60']['sdpa']:.2f}x** |" in block


def test_sides_of_ttft_that_fail(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    call = ops.unique_prefill
    monkeypatch.setattr(ops, "unique_prefill", lambda q, *args, **kwargs: call(q * 3, *args, **kwargs))
    result = cli.run("ttft", **MODEL, context=512, density=50, repeats=1, device="cpu")
    sides = result["cases"][0]["sides"]
    assert "logits differ by" in sides["sparse_50"]["failed"]
    assert "median_ms" in sides["dense"]
    assert "logits differ by" in ttft.report(result)


def test_top_p_is_adjusted():
    asked: list[float] = []

    def density(p: float) -> float:
        asked.append(p)
        return 0.8 * p

    p, found = ttft.find_top_p(0.25, density)
    assert asked == [0.25, pytest.approx(0.3125)]
    assert found == pytest.approx(0.25)
    assert p == asked[-1]
    assert ttft.find_top_p(0.1, lambda p: 0.3) == (0.1, 0.3)  # as good as it gets
