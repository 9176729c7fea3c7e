"""The library of this checkout: its version, how it is found and loaded, what it exports, and `unique_attn info`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import native
from unique_attn import __main__ as cli
from unique_attn import _load


def test_version_is_in_one_place():
    from unique_attn import _runtime
    from unique_attn._version import __version__

    assert native.package_version() == __version__
    assert _runtime.build_info()["version"] == __version__


def test_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(_load, "_loaded", None)
    monkeypatch.setenv("UNIQUE_ATTN_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ImportError, match=r"none\.so does not exist; .*run `make build` there"):
        _load.load_library()
    (tmp_path / "none.so").write_text("no library")
    with pytest.raises(ImportError, match="does not load"):
        _load.load_library()
    monkeypatch.setattr(_load.torch, "__version__", "2.9.0")
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, but this environment has 2\.9\.0"):
        _load.load_library()


@pytest.mark.skipif(not _load.library_path().is_file(), reason="the operator library is not built")
def test_own_library_exports_nothing_that_could_clash():
    """In particular not the CUDA runtime that is linked in: torch brings its own."""
    command = ["nm", "-D", "--defined-only", _load.library_path()]
    symbols = subprocess.run(command, capture_output=True, text=True).stdout
    assert not re.findall(r"\bcuda[A-Z]\w+", symbols)
    dynamic = subprocess.run(["readelf", "-d", _load.library_path()], capture_output=True, text=True).stdout
    assert "libcudart" not in dynamic
    assert "python" not in dynamic
    assert "RUNPATH" not in dynamic


def test_info(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    library = facts["library"]
    assert library["path"] == str(_load.library_path())
    assert library["version"] == facts["runtime"]["version"] == facts["unique_attn"]
    assert library["cpu_isa"] in library["cpu_isas"]
    assert facts["cuda_kernels_run_here"].partition(":")[0] in ("yes", "no")
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out
    assert f"{library['cpu_isa']} in use here" in lines
    assert str(_load.library_path()) in lines


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nowhere/lib.so", "/nowhere/lib.so does not exist"),
        ("/tmp", "/tmp is no file"),
        ("libm.so.6", "holds none of its ops"),
    ],
)
def test_info_without_the_library(path: str, reason: str):
    """The package cannot be imported then: the reason is the last line."""
    if path == "libm.so.6":
        found = next(
            (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if path in line), None
        )
        if found is None:
            pytest.skip("no libm here")
        path = found
    environment = {**os.environ, "UNIQUE_ATTN_LIBRARY": path}
    argv = [sys.executable, "-m", "unique_attn", "info"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert reason in done.stderr.strip().splitlines()[-1]


def test_unknown_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["nonsense"]) == 2
    error = capsys.readouterr().err
    assert "no command 'nonsense'" in error
    assert "info" in error
    assert cli.main(["--help"]) == 0
