"""``import unique_attn`` from the folder above a checkout and inside one finds the package or says what is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not in a checkout")


def python(cwd: Path, *argv: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)


def package(folder: Path, where: str) -> None:
    """A stand-in for the package, without torch."""
    (folder / "unique_attn").mkdir(parents=True)
    (folder / "unique_attn" / "__init__.py").write_text(f"where = {where!r}\n")
    (folder / "unique_attn" / "inner.py").write_text("from unique_attn import where\n")
    (folder / "unique_attn" / "__main__.py").write_text("from unique_attn.inner import where\nprint('runs', where)\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """``.../above/unique_attn``, with the file at a checkout's top."""
    folder = tmp_path / "above" / "unique_attn"
    package(folder, "checkout")
    shutil.copy(ROOT / "__init__.py", folder)
    return folder


@pytest.mark.parametrize("installed", [False, True])
def test_from_above_a_checkout(checkout: Path, tmp_path: Path, installed: bool):
    package(tmp_path / "site", "site")
    path, expected = (tmp_path / "site", "site") if installed else (None, "checkout")
    # -S: nothing else is installed.
    for code in ("import unique_attn; print(unique_attn.where)", "from unique_attn.inner import where; print(where)"):
        done = python(checkout.parent, "-S", "-c", code, path=path)
        assert done.stdout == f"{expected}\n", done.stderr
    done = python(checkout.parent, "-S", "-m", "unique_attn", path=path)
    assert done.stdout == f"runs {expected}\n", done.stderr


def test_inside_a_checkout(checkout: Path, tmp_path: Path):
    package(tmp_path / "site", "site")
    done = python(checkout, "-S", "-c", "import unique_attn; print(unique_attn.where)", path=tmp_path / "site")
    assert done.stdout == "checkout\n", done.stderr


def test_a_checkout_of_another_name_is_no_package(checkout: Path):
    other = checkout.rename(checkout.with_name("work"))
    done = python(other.parent, "-S", "-c", "import work; print('where' in vars(work)); import unique_attn")
    assert done.stdout == "False\n"
    assert "ModuleNotFoundError: No module named 'unique_attn'" in done.stderr


def test_a_checkout_that_is_not_built(checkout: Path):
    """From inside, which comes before everything that is installed."""
    shutil.rmtree(checkout / "unique_attn")
    ignored = shutil.ignore_patterns("lib", "_runtime*.so", "__pycache__")
    shutil.copytree(ROOT / "unique_attn", checkout / "unique_attn", ignore=ignored)
    (checkout / "setup.py").touch()
    said = python(checkout, "-c", "import unique_attn").stderr.splitlines()[-1]
    assert f"{checkout}/unique_attn/lib/libunique_attn.so does not exist" in said
    assert f"this is the checkout {checkout}, which is not built: run `make build` there" in said
