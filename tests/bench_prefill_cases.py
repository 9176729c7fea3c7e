"""What the tests of the prefill benchmarks share: a tiny prompt and model, and commands whose JSON is read back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.cli import main
from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.next_tokens import Layer
from benchmarks.measure.prompts import Prompt

CPU = torch.device("cpu")
LAYER = ["--heads", "4/2", "--head-dim", "32", "--dtype", "fp32"]
MODEL = {"layers": 2, "hidden": 64, "mlp": 96, "vocab": 97, "heads": "4/2", "head_dim": 32, "dtype": "fp32"}
TINY = ["--layers", "2", "--hidden", "64", "--mlp", "96", "--vocab", "97", *LAYER]


def written(tmp_path: Path, *argv: str) -> dict[str, Any]:
    path = tmp_path / "result.json"
    assert main([*argv, "--out", str(path)]) == 0
    assert str(Path.home()) not in path.read_text()
    result = json.loads(path.read_text())
    assert {"date", "commit", "device", "torch", "cpu"} <= set(result["environment"])
    return result


def prompt(tokens: int = 512, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Prompt:
    return Prompt(Blocks(tokens), (4, 2), 32, dtype, device)


def options(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"method": ["directional"], "pool_q": 8, "pool_k": 8, **changed})


def run_prefill(tmp_path: Path, *argv: str) -> dict[str, Any]:
    flags = ["--tokens", "512", "1024", "--density", "60", "40", *LAYER, "--repeats", "2", "--device", "cpu", *argv]
    return written(tmp_path, "prefill", *flags)


def some_layer(tokens: int, heads: tuple[int, int] = (4, 2), device: torch.device | None = None) -> Layer:
    """Keys that change slowly, queries that are alike for a while: some blocks matter more than others."""
    made = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(tokens, count, 32, generator=made) for count in (heads[0], heads[1], heads[1]))
    topics = torch.randn(-(-tokens // 32), heads[1], 32, generator=made).repeat_interleave(32, 0)[:tokens]
    q, k = q + 2 * topics.repeat_interleave(heads[0] // heads[1], 1).roll(64, 0), k + topics
    return Layer(*(x.to(device) for x in (q, k, v)), 0.3)
