"""``benchmarks serve`` without vLLM, which has an environment of its own: what engines are asked for, what is told."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from benchmarks import cli
from benchmarks.suite import serve

SHAPE = {"layers": [2], "heads": ["4/2"], "head_dim": [32], "hidden": [64], "mlp": [96], "vocab": [97], "device": "cpu"}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Settings of the engines that are made. A step of stock takes a millisecond per 1,024 tokens, ours takes one."""
    made: list[Any] = []

    def run(options: Any, wanted: Any, settings: Any, bar: Any) -> Any:
        made.append(settings)
        if settings is not None and settings["index_format"] == "compressed":
            return [{"failed": "no memory"}] * len(wanted), {"failed": "no memory"}
        steps = [1.0 if settings else o.context / 1024 for o in wanted]
        return [{"median_ms": ms, "tokens_per_s": 1e3 / ms} for ms in steps], {"vllm": "0.0", "kv_tokens": 9}

    monkeypatch.setattr(serve, "_has_vllm", lambda: True)
    monkeypatch.setattr(serve, "_in_own_process", run)
    return made


def test_every_model_has_an_engine_per_side(engines: list[Any]) -> None:
    result = cli.run("serve", **SHAPE, batch=[1, 2], context=[2048, 4096], budget=64)
    assert engines == [None, *({"budget": 64, "index_format": each} for each in ("exact", "compressed"))]
    assert [(c["options"]["batch"], c["options"]["context"]) for c in result["cases"]] == [
        (1, 2048), (1, 4096), (2, 2048), (2, 4096)
    ]  # fmt: skip
    assert [case["speedups"] for case in result["cases"]] == [{"unique_exact": x} for x in (2.0, 4.0, 2.0, 4.0)]
    assert result["peers"]["vllm"] == "0.0"
    told = serve.report(result)
    assert "no memory" in told
    assert "4.00x" in told


def test_arguments() -> None:
    assert importlib.util.find_spec("vllm") is None
    with pytest.raises(SystemExit, match="serve needs vLLM"):
        cli.run("serve", **SHAPE)


def test_contexts_have_room_for_the_answer(engines: list[Any]) -> None:
    with pytest.raises(SystemExit, match="--context: expected more than 130, got 128"):
        cli.run("serve", **SHAPE, context=[128])
    assert engines == []
