"""What is installed is what was locked: exact versions of everything but torch, for every supported Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
PYTHONS = ("3.10.12", "3.11.9", "3.12.4", "3.13.1")
VLLM = ("vllm.txt", "vllm-locked.txt", "vllm-oldest.txt")
NOT_LOCKED = re.compile(r"torch$|triton|nvidia-|cuda-")  # torch, and what its CUDA builds bring along

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not in a checkout")


def requirements(name: str) -> list[Requirement]:
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in (FOLDER / name).read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


def extras() -> list[Requirement]:
    """Everything in pyproject.toml that is installed, with the package's own extras left out."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    listed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    listed += [each for extra in project["project"]["optional-dependencies"].values() for each in extra]
    return [r for r in map(Requirement, listed) if canonicalize_name(r.name) != project["project"]["name"]]


def locked(python: str) -> dict[str, str]:
    """The versions that a Python on Linux gets."""
    where = {"python_full_version": python, "python_version": python.rpartition(".")[0], "sys_platform": "linux"}
    where |= {"os_name": "posix", "platform_system": "Linux", "platform_machine": "x86_64"}
    found: dict[str, str] = {}
    for line in requirements("lock.txt"):
        if line.marker is None or line.marker.evaluate(where):
            assert line.name not in found, f"{line.name} is there twice for Python {python}"
            (pin,) = line.specifier
            found[canonicalize_name(line.name)] = pin.version
    return found


@pytest.mark.parametrize("name", ["lock.txt", "torch.txt", "cuda-tools.txt", "cuda-toolkit.txt", "release.txt", *VLLM])
def test_every_line_is_an_exact_version(name: str):
    for line in requirements(name):
        assert re.fullmatch(r"==[^*,]+", str(line.specifier)), line


def test_nothing_in_the_lock_brings_a_torch_or_cuda():
    """`--no-deps` installs these lines and no others."""
    assert not [line.name for line in requirements("lock.txt") if NOT_LOCKED.match(line.name)]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_covers_what_is_asked_for(python: str):
    versions = locked(python)
    for asked in [*requirements("dev.in"), *extras()]:
        if asked.name != "torch":
            assert asked.specifier.contains(versions[canonicalize_name(asked.name)]), asked
    for asked in ("sympy", "networkx", "jinja2", "fsspec", "filelock", "typing-extensions"):  # torch's
        assert asked in versions


def test_the_environments_of_transformers_can_be_told_apart():
    (oldest, *_) = requirements("transformers-oldest.txt")
    (newest,) = requirements("transformers-newest.txt")
    assert (oldest.name, newest.name, str(newest.specifier)) == ("transformers", "transformers", "")
    assert all(not oldest.specifier.contains(locked(python)["transformers"]) for python in PYTHONS)
