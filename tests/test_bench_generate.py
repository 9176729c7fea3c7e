"""``benchmarks generate``: sides decode the same prompts, wrong tokens are noticed, the JSON is what was printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import cli
from benchmarks.cli import main
from benchmarks.measure import ceiling, harness
from benchmarks.suite import generate

TINY = {
    "layers": 2, "hidden": 64, "mlp": 96, "vocab": 97, "heads": "4/2", "head_dim": 16, "page_size": 8,
    "block_size": 32, "budget": 64, "rule": "directional", "dtype": "fp32", "repeats": 1, "device": "cpu",
}  # fmt: skip
SIDES = ["sdpa", "off_exact", "unique_exact", "unique_compressed", "step_exact", "step_compressed"]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing is not what is tested here."""
    monkeypatch.setattr(harness.ColdCache, "flush", lambda self: None)
    monkeypatch.setattr(ceiling, "SIZES", {"cpu": 1 << 20, "cuda": 1 << 20})


@pytest.mark.parametrize("batch", [1, 2])
def test_sides_are_timed(batch: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    file = tmp_path / "result.json"
    static = ["static", "unique-static_exact", "unique-static_compressed"] if batch == 1 else []
    more = ["--batch", str(batch), "--context", "256", "--new-tokens", "80", "--out", str(file)]
    more += ["--static"] if static else []
    assert main(["generate", *argv, *more]) == 0
    (case,) = json.loads(file.read_text("utf-8"))["cases"]
    calls = [*SIDES[:4], *static]
    assert list(case["sides"]) == [*calls, *SIDES[4:]]
    assert all(side["median_ms"] > 0 for side in case["sides"].values())
    assert set(case["speedups"]) == {"off_exact", "unique_exact", "unique_compressed", *static[1:]}
    assert set(case["over_step"]) == {"unique_exact", "unique_compressed"}
    for name in calls:
        side = case["sides"][name]
        assert "tokens" not in side
        assert side["first_ms"] > 0
        assert side["slowest_ms"] >= 0.9 * side["median_ms"]
        assert side["spread_ms"][0] <= side["median_ms"] <= side["spread_ms"][1]
    printed = capsys.readouterr().out
    assert f"batch {batch}, 256 tokens" in printed
    assert all(name in printed for name in SIDES)


def test_other_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = generate.generate

    def wrong(model: Any, ids: torch.Tensor, tokens: int, more: Any) -> Any:
        out, begin, arrivals = call(model, ids, tokens, more)
        off = getattr(model.config, "unique_attn", {}).get("graphs") == "off"
        return out - out * off, begin, arrivals

    monkeypatch.setattr(generate, "generate", wrong)
    (case,) = cli.run("generate", **TINY, batch=1, context=256, new_tokens=80)["cases"]
    assert case["sides"]["unique_exact"] == {"failed": "captured steps give other tokens"}
    assert "unique_exact" not in case["speedups"]


def test_a_side_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    use = generate.use

    def failing(model: Any, side: Any) -> Any:
        if side.config is not None and side.config.index_format == "compressed":
            raise RuntimeError("not today")
        return use(model, side)

    monkeypatch.setattr(generate, "use", failing)
    result = cli.run("generate", **TINY, batch=1, context=256, new_tokens=80)
    (case,) = result["cases"]
    assert "not today" in case["sides"]["unique_compressed"]["failed"]
    assert "unique_compressed" not in case["speedups"]
    assert "not today" in generate.report(result)


def test_too_few_new_tokens() -> None:
    with pytest.raises(SystemExit, match="--new-tokens: expected more than 72, got 60"):
        cli.run("generate", **TINY, batch=1, context=256, new_tokens=60)


def test_committed_shapes_are_presets() -> None:
    found = [cli.parser().parse_args(command) for command in cli.committed("cuda") if command[0] == "generate"]
    assert [each.preset for each in found] == ["16_layers", "32_layers", "static"]
