"""Who may import whom: the package is the product alone, benchmarks and examples stand on it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in ("unique_attn", "examples", "benchmarks")}


def imported(file: Path) -> Iterator[str]:
    """Full names of the modules, and of what is taken from them, that a file imports: anywhere in it, but not where
    only a type checker looks."""
    types = [
        node
        for each in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(each, ast.If) and isinstance(each.test, ast.Name) and each.test.id == "TYPE_CHECKING"
        for node in ast.walk(each)
    ]
    lines = {node.lineno for node in types if isinstance(node, (ast.Import, ast.ImportFrom))}
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import) and node.lineno not in lines:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.lineno not in lines:
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_files():
    assert all(FILES.values())


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("unique_attn", ("benchmarks", "examples", "tests")),
        ("examples", ("benchmarks", "tests")),
        ("benchmarks", ("tests",)),
    ],
)
def test_one_direction(folder: str, forbidden: tuple[str, ...]):
    for file in FILES[folder]:
        wrong = [name for name in imported(file) if name.partition(".")[0] in forbidden]
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_the_product_does_not_use_its_oracle():
    for file in FILES["unique_attn"]:
        if not file.name.startswith("reference"):
            wrong = [name for name in imported(file) if name.startswith("unique_attn.reference")]
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_only_the_backend_for_vllm_knows_it():
    for file in FILES["unique_attn"]:
        if file.parent.name != "vllm":
            wrong = [name for name in imported(file) if name.startswith(("vllm.", "unique_attn.vllm"))]
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_importing_the_package_is_light():
    heavy = {"transformers", "matplotlib", "pandas", "tabulate", "tqdm", "accelerate", "benchmarks", "examples"}
    heavy |= {"vllm", "unique_attn.vllm"}
    # torch itself brings some of these along in some versions.
    code = (
        f"import sys, torch; before = set(sys.modules); import unique_attn; print({heavy} & set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
