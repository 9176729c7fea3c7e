"""What the tests of the prefill benchmarks share: a tiny model, and a command whose JSON is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.cli import main

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
