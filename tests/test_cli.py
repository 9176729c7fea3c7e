"""The commands of the package and of a checkout: what goes wrong is one line on stderr and an exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unique_attn import __main__ as cli
from unique_attn import _load
from unique_attn._version import __version__

PACKAGE = Path(cli.__file__).parent
ENVIRONMENT = {
    "PYTHONPATH": str(PACKAGE.parent),
    "HF_HUB_OFFLINE": "1",
    "UNIQUE_ATTN_LIBRARY": str(_load.library_path()),
}


def start(*argv: str, flags: tuple[str, ...] = (), **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *flags, "-m", *argv],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        | {"env": {**os.environ, **ENVIRONMENT, **options.pop("env", {})}, **options},
    )


def run(*argv: str, **options: object) -> tuple[int, str, str]:
    process = start(*argv, **options)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("argv", "status", "complaint"),
    [
        pytest.param("examples.demo --device cuda", 2, "argument --device: cuda is not there: ", marks=without_cuda),
        pytest.param(
            "benchmarks topk --device cuda:0", 2, "argument --device: cuda:0 is not there", marks=without_cuda
        ),
        ("benchmarks topk --device gpu", 2, "argument --device: expected cpu, cuda or cuda:N, got 'gpu'; see `python"),
        ("benchmarks everything", 2, "argument NAME: invalid choice: 'everything'"),
        ("benchmarks scores --tokens 0 --device cpu", 1, "--tokens: expected at least 1, got 0"),
        ("benchmarks report --results /nowhere", 1, "there are no benchmark results in /nowhere: name their folder"),
        ("examples.demo --budgets 3", 2, "unrecognized arguments: --budgets 3; see `python -m examples.demo --help`"),
        ("examples.demo --model no/such --device cpu --quiet", 1, "cannot load 'no/such' as a local folder or a Hugg"),
        ("examples.finetune --steps 0 --device cpu", 1, "--steps: expected at least 1, got 0"),
        (
            "unique_attn calibrate --model no/such --file README.md --device gpu",
            1,
            "--device: expected one that torch has, got 'gpu' (",
        ),
        (
            "unique_attn calibrate --model no/such --file docs/tasks.png",
            1,
            "--file: expected UTF-8 text, got 'docs/tasks.png' (",
        ),
        ("unique_attn info --yaml", 2, "unrecognized arguments: --yaml; see `python -m unique_attn info --help`"),
        ("unique_attn everything", 2, "no command 'everything': expected one of calibrate, info"),
        ("unique_attn bench", 2, "'bench' is no part of the package: in a checkout, `python -m benchmarks`"),
        (
            "unique_attn bench decode --context 8192",
            2,
            "'bench' is no part of the package: in a checkout, `python -m benchmarks decode --context 8192`",
        ),
        ("unique_attn demo", 2, "'demo' is no part of the package: in a checkout, `python -m examples.demo`"),
        ("unique_attn report", 2, "'report' is no part of the package: in a checkout, `python -m benchmarks report`"),
    ],
)
def test_one_line_says_what_is_wrong(argv: str, status: int, complaint: str):
    if "finetune" in argv or "--model" in argv:
        pytest.importorskip("transformers")
    returned, output, errors = run(*argv.split())
    assert (returned, output) == (status, "")
    assert errors.startswith(f"error: {complaint}"), errors
    assert errors.count("\n") == 1


def test_version():
    assert run("unique_attn", "--version") == (0, f"unique_attn {__version__}\n", "")


def test_a_reader_who_leaves():
    """As in ``python -m unique_attn info --json | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    status, _, errors = run("unique_attn", "info", "--json", stdout=writing)
    os.close(writing)
    assert (status, errors) == (128 + signal.SIGPIPE, "")


def test_control_c(tmp_path: Path):
    """While the demo waits for its document."""
    document = tmp_path / "pipe"
    os.mkfifo(document)
    interruptible = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = start("examples.demo", "--file", str(document), **interruptible)
    deadline, opened = time.monotonic() + 120, None
    while opened is None and time.monotonic() < deadline and process.poll() is None:
        try:
            opened = os.open(document, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert opened is not None
    os.close(opened)
    assert (process.returncode, errors) == (128 + signal.SIGINT, "interrupted\n")


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def fails(argv: list[str]) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("unique_attn.info.main", fails)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(["info"])
    status, _, errors = run("benchmarks", "report", "--results", "/nowhere", flags=("-X", "dev", "-W", "ignore"))
    assert status == 1
    assert "Traceback" in errors
