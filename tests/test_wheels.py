"""What is released: the real source archive, and the settings of the wheels. They are tried by `.ci/wheel-smoke`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import unique_attn
from unique_attn import _load

ROOT = Path(__file__).parent.parent
# Of the repository's files, what an archive may lack: its own upkeep.
NOT_IN_SDIST = re.compile(r"\.ci/|\.github/|\.gitignore$|\.pre-commit-config\.yaml$")

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not in a repository")


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["cibuildwheel"]


def test_sdist_holds_the_repository(tmp_path: Path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip(f"git ls-files: {listed.stderr.strip()}")
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    # In a copy: setuptools also packs what an older list of files names, and writes a new one.
    for name in tracked:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "checkout" / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path / "checkout", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / f"unique_attn-{unique_attn.__version__}.tar.gz") as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in tracked - packed if not NOT_IN_SDIST.match(name)} == set()
    made = {name for name in packed - tracked if not name.startswith("unique_attn.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_a_wrong_tag_is_noticed_before_the_long_build():
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    build, smoke = workflow.split("\n  smoke:\n")
    steps = ["make sdist", "the tag is the version", "make wheels", "make wheel-hazards", "upload-artifact"]
    places = [build.index(step) for step in steps]
    assert places == sorted(places)
    assert "\npermissions:\n  contents: read\n" in build
    assert "make wheel-smoke" in smoke
    # One index for every job, as in the workflow of the tests.
    (line,) = re.findall(r"^  (PIP_EXTRA_INDEX_URL: .*)$", workflow, re.MULTILINE)
    assert line in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "PIP_EXTRA_INDEX_URL" not in smoke


def test_wheels_leave_out_what_torch_brings(settings: dict[str, Any]):
    """auditwheel would copy any other library of torch into the wheel, or fail as it does not find it."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", _load.library_path()], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    excluded = set(re.findall(r"--exclude (\S+)", settings["linux"]["repair-wheel-command"]))
    assert excluded == {name for name in needed if name.startswith(("libtorch", "libc10"))}
    assert not [name for name in needed if name.startswith(("libcu", "libnv"))]


def test_wheels_are_built_for_every_supported_python_with_what_is_locked(settings: dict[str, Any]):
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (tested,) = re.findall(r"python: \[(.*)\]", workflow)
    assert settings["build"] == [f"cp{version.replace('.', '')}-*" for version in re.findall(r"\d\.\d+", tested)]
    for file in re.findall(r"-r (\S+)", settings["linux"]["before-all"]):
        assert (ROOT / file).is_file(), file
    assert settings["linux"]["environment"]["UNIQUE_ATTN_CUDA"] == "1"
