"""The build, tried on a small project of the same shape: real compiler and ninja, stand-ins for torch and nvcc."""

from __future__ import annotations

import ast
import ctypes
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from build_project import EXT_SUFFIX, FAKE_NVCC, ROOT, Project, compiled, write

from build_tools import environment

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not in a checkout")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has been built once; tests that change it make their own copy."""
    project = Project(tmp_path_factory.mktemp("built"))
    project.build()
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_a_build_makes_both_files(built: Project):
    assert built.call("get_answer") == "42"
    assert '"version": "1.2.3"' in built.call("facts", ctypes.c_char_p)
    result = built.python("-c", "from unique_attn import _runtime; print(_runtime.version)")
    assert result.stdout.strip() == "1.2.3", result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instruction sets")
def test_cpu_sources_are_compiled_for_every_instruction_set(built: Project):
    levels = {isa: built.call(f"get_{isa}") for isa in ("baseline", "avx2", "avx512")}
    assert levels == {"baseline": "0", "avx2": "256", "avx512": "512"}


def test_library_needs_torch_and_neither_python_nor_a_path(built: Project):
    dynamic = subprocess.run(["readelf", "-d", built.library], capture_output=True, text=True).stdout
    assert "[libtorch.so]" in dynamic
    assert "python" not in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    symbols = subprocess.run(["nm", "-D", "--defined-only", built.library], capture_output=True, text=True).stdout
    assert "get_answer" in symbols
    assert "hidden" not in symbols


def test_second_build_does_nothing(built: Project):
    before = [file.stat().st_mtime_ns for file in (built.library, built.module)]
    output = built.build()
    assert "no work to do" in output
    assert [file.stat().st_mtime_ns for file in (built.library, built.module)] == before


def test_only_what_changed_is_rebuilt(project: Project):
    project.build()
    write(project.root, {"csrc/core/answer.h": "#pragma once\n#define ANSWER 43\n"})
    assert compiled(project.build()) == {"plain.cpp.o", "libunique_attn.so"}
    assert project.call("get_answer") == "43"

    # New files need no registration; deleted ones leave the library.
    write(
        project.root,
        {"csrc/ops/more.cpp": 'extern "C" __attribute__((visibility("default"))) int more() { return 5; }'},
    )
    assert compiled(project.build()) == {"more.cpp.o", "libunique_attn.so"}
    assert project.call("more") == "5"
    (project.root / "csrc/ops/more.cpp").unlink()
    assert compiled(project.build()) == {"libunique_attn.so"}
    assert project.call("more") == ""

    # Another torch is another set of headers for the ops, and nothing to the kernels.
    write(project.torch, {"version.py": "__version__ = '2.11.0'\n"})
    assert compiled(project.build()) == {"ops.cpp.o", "libunique_attn.so"}


def test_one_target(project: Project):
    project.build("runtime", UNIQUE_ATTN_TORCH_DIR="/nowhere")
    assert project.module.is_file()
    assert not project.library.exists()
    result = project.python("setup.py", "-q", "build_ext", "--inplace", UNIQUE_ATTN_ONLY="ops")
    assert result.returncode == 0, result.stderr
    assert project.library.is_file()
    assert "UNIQUE_ATTN_ONLY=x: expected one of ops, runtime" in project.error(UNIQUE_ATTN_ONLY="x")


def test_compiler_errors_are_shown(project: Project):
    write(project.root, {"csrc/core/plain.cpp": "#error broken on purpose\n"})
    result = project.python("-m", "build_tools")
    assert result.returncode == 1
    assert "broken on purpose" in result.stdout
    assert "error: the native build failed" in result.stderr


def test_wheel(built: Project, tmp_path: Path):
    objects = {file: file.stat().st_mtime_ns for file in (built.root / "build" / "native").rglob("*.o")}
    stale = built.root / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "unique_attn"
    write(stale, {"deleted.py": ""})
    result = built.python("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), ".")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name == f"unique_attn-1.2.3-{python}-{python}-linux_{platform.machine()}.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read("unique_attn-1.2.3.dist-info/METADATA").decode()
    assert files == {  # the product alone: no benchmarks, examples, tests
        "unique_attn/__init__.py",
        "unique_attn/_version.py",
        f"unique_attn/_runtime{EXT_SUFFIX}",
        "unique_attn/lib/libunique_attn.so",
        "unique_attn/py.typed",
    }
    assert "Requires-Dist: torch>=2.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    # The build folder of the checkout was used: nothing was compiled again.
    assert {file: file.stat().st_mtime_ns for file in objects} == objects


def test_sdist_holds_the_sources_and_nothing_built(built: Project, tmp_path: Path):
    result = built.python("setup.py", "-q", "sdist", "-d", str(tmp_path), UNIQUE_ATTN_TORCH_DIR="/nowhere")
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / "unique_attn-1.2.3.tar.gz") as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "build_tools/native.py", "csrc/core/kernel.cu", "csrc/core/answer.h", "LICENSE"} <= files
    assert {"csrc/ops/ops.cpp", "csrc/runtime/module.cpp", "unique_attn/py.typed"} <= files
    assert {"benchmarks/suite/decode.py", "benchmarks/results/decode-cpu.json", "tests/test_small.py"} <= files
    assert {"examples/demo.py", "examples/support/document.txt"} <= files
    assert not [name for name in files if name.endswith((".so", ".o", ".ninja"))]


# ---- CUDA ----


@pytest.fixture
def nvcc(project: Project, tmp_path: Path) -> Path:
    folder = tmp_path / "toolkit"
    write(folder, {"bin/nvcc": FAKE_NVCC.format(folder=folder, release="13.0"), "include/cuda.h": "", "calls": ""})
    (folder / "lib").mkdir()
    (folder / "bin/nvcc").chmod(0o755)
    subprocess.run(["ar", "rc", folder / "lib" / "libcudart_static.a"], check=True)
    return folder / "bin/nvcc"


def test_cuda_against_a_cpu_torch(project: Project, nvcc: Path):
    output = project.build(UNIQUE_ATTN_CUDA="auto", CUDA_HOME=str(nvcc.parent.parent))
    assert "CUDA 13.0 for sm_80 compute_80 sm_90a" in output
    assert project.call("get_kernel") == "7"
    call = (nvcc.parent.parent / "calls").read_text().splitlines()[-1]
    for code in ("arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80", "arch=compute_90a,code=sm_90a"):
        assert f"-gencode {code}" in call
    assert "-DUNIQUE_ATTN_SM90A" in call
    # Without CUDA again: only what includes its headers is compiled anew.
    assert compiled(project.build()) == {"ops.cpp.o", "libunique_attn.so"}
    assert project.call("get_kernel") == ""


def test_nvcc_from_pypi(project: Project, nvcc: Path):
    """Its profile names the folder lib64, and the libraries are in lib."""
    text = nvcc.read_text()
    nvcc.write_text(text.replace("/lib/stubs", "/lib64/stubs").replace('/lib"', '/lib64"'))
    assert nvcc.read_text() != text
    project.build("ops", UNIQUE_ATTN_CUDA="1", UNIQUE_ATTN_NVCC=str(nvcc))
    assert project.call("get_kernel") == "7"


def test_cuda_sources_alone(project: Project, nvcc: Path):
    env = {"UNIQUE_ATTN_CUDA": "1", "UNIQUE_ATTN_NVCC": str(nvcc), "UNIQUE_ATTN_CUDA_ARCHS": "9.0+PTX"}
    env["UNIQUE_ATTN_NVCC_FLAGS"] = "-DONE -DTWO"
    assert "1 CUDA sources compile" in project.build("cuda", **env)
    assert not project.library.exists()
    calls = (nvcc.parent.parent / "calls").read_text()
    assert "code=compute_90" in calls
    assert "-DONE -DTWO" in calls
    assert "SM90A" not in calls  # plain 9.0 lacks the instructions of the Hopper kernels


@pytest.fixture
def path_without_nvcc(tmp_path: Path) -> str:
    """A PATH with the compiler and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("c++", "ld", "as", "sh"):
        (folder / name).symlink_to(shutil.which(name) or pytest.fail(f"{name} not found"))
    return str(folder)


def test_no_nvcc(project: Project, path_without_nvcc: str):
    error = project.error(UNIQUE_ATTN_CUDA="1", PATH=path_without_nvcc)
    assert error == (
        "error: UNIQUE_ATTN_CUDA=1, but nvcc was not found: put it on PATH, or set CUDA_HOME or UNIQUE_ATTN_NVCC\n"
    )
    result = project.python("setup.py", "-q", "build_ext", UNIQUE_ATTN_CUDA="1", PATH=path_without_nvcc)
    assert result.returncode == 1
    assert "error: UNIQUE_ATTN_CUDA=1, but nvcc was not found" in result.stderr
    assert "Traceback" not in result.stderr
    assert "no CUDA" in project.build("ops", UNIQUE_ATTN_CUDA="auto", PATH=path_without_nvcc)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"UNIQUE_ATTN_CUDA": "yes"}, "UNIQUE_ATTN_CUDA=yes: expected auto, 0 or 1"),
        ({"UNIQUE_ATTN_NVCC": "/nowhere/nvcc"}, "UNIQUE_ATTN_NVCC=/nowhere/nvcc is not an executable"),
        ({"UNIQUE_ATTN_CUDA_ARCHS": "sm_80"}, "UNIQUE_ATTN_CUDA_ARCHS=sm_80: 'sm_80' is not an architecture"),
        ({"UNIQUE_ATTN_CUDA_ARCHS": "8.0;9.0a+PTX"}, "'9.0a+PTX' is not an architecture"),
    ],
)
def test_bad_cuda_settings(project: Project, nvcc: Path, env: dict[str, str], message: str):
    assert message in project.error(**{"UNIQUE_ATTN_CUDA": "1", "UNIQUE_ATTN_NVCC": str(nvcc)} | env)


def test_old_cuda(project: Project, nvcc: Path):
    nvcc.write_text(FAKE_NVCC.format(folder=nvcc.parent.parent, release="11.8"))
    assert "needs CUDA >= 12.0" in project.error(UNIQUE_ATTN_CUDA="1", UNIQUE_ATTN_NVCC=str(nvcc))
    assert "only the CPU is built" in project.build(UNIQUE_ATTN_CUDA="auto", UNIQUE_ATTN_NVCC=str(nvcc))


# ---- Torch is found, never imported, never required ----


def test_build_scripts_do_not_import_torch():
    for script in [ROOT / "setup.py", *(ROOT / "build_tools").glob("*.py")]:
        for node in ast.walk(ast.parse(script.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] == "torch"], script


def test_torch_is_no_build_requirement():
    section = re.search(r"\[build-system\].*?\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert section is not None
    requires = re.search(r"requires = \[(.*)\]", section.group())
    assert requires is not None
    assert "setuptools" in requires.group(1)
    assert "torch" not in requires.group(1)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without torch: empty folders wherever one is looked for."""
    for variable in ("UNIQUE_ATTN_TORCH_DIR", "VIRTUAL_ENV"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path), "platlib": str(tmp_path)})
    monkeypatch.setattr(environment.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(environment.site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def test_missing_torch_says_what_to_do(no_torch: Path):
    with pytest.raises(environment.BuildError, match="install torch first and add --no-build-isolation") as error:
        environment.find_torch()
    assert "UNIQUE_ATTN_TORCH_DIR" in str(error.value)


@pytest.mark.parametrize("place", ["purelib", "virtual environment", "variable"])
def test_torch_is_found(no_torch: Path, built: Project, monkeypatch: pytest.MonkeyPatch, place: str):
    torch = no_torch / "torch"
    if place == "virtual environment":
        torch = no_torch / "venv" / "lib" / "python3.99" / "site-packages" / "torch"
        monkeypatch.setenv("VIRTUAL_ENV", str(no_torch / "venv"))
    elif place == "variable":
        torch = no_torch / "anywhere" / "torch"
        monkeypatch.setenv("UNIQUE_ATTN_TORCH_DIR", str(torch))
    shutil.copytree(built.torch, torch)
    assert environment.find_torch() == environment.Torch(torch, "2.10.1+cpu")


def test_wrong_torch_folder(project: Project):
    error = project.error("ops", UNIQUE_ATTN_TORCH_DIR="/nowhere")
    assert "UNIQUE_ATTN_TORCH_DIR=/nowhere is not the folder of a torch >= 2.10 package" in error
    result = project.python("setup.py", "-q", "build_ext", UNIQUE_ATTN_TORCH_DIR="/nowhere")
    assert result.returncode == 1
    assert "error: UNIQUE_ATTN_TORCH_DIR=/nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_old_torch(project: Project):
    write(project.torch, {"version.py": "__version__ = '2.9.1'\n"})
    assert "needs torch >= 2.10, but" in project.error("ops")
