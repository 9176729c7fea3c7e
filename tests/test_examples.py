"""Each example runs as a person would run it, and its own checks pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "generate.py": "tokens agree under the small budget",
    "kv_cache_ops.py": "both agree within rounding",
    "transcribe.py": "4 of 4 layers on pages",
}


def test_every_example_is_tested():
    others = {"__init__.py", "finetune.py", "demo.py"}  # by test_finetune.py and test_demo.py
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, *others}


@pytest.mark.parametrize("name", ["demo", "finetune"])
@pytest.mark.parametrize("how", ["file", "module"])
def test_commands_start_as_a_file_and_as_a_module(name: str, how: str):
    pytest.importorskip("transformers")
    argv = ["-m", f"examples.{name}"] if how == "module" else [f"examples/{name}.py"]
    done = subprocess.run(
        [sys.executable, *argv, "--help"],
        cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, device):
    if name != "kv_cache_ops.py":
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--device", str(device)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
