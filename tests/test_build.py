"""The build, tried on a small project of the same shape: real compiler and ninja, stand-ins for torch and nvcc."""

from __future__ import annotations

import ast
import ctypes
import json
import os
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

from build_tools import environment, native
from unique_attn import __main__ as cli
from unique_attn import _load

ROOT = Path(__file__).resolve().parent.parent
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not in a checkout")

SOURCES = {
    "unique_attn/__init__.py": "",
    "unique_attn/_version.py": '__version__ = "1.2.3"\n',
    "unique_attn/py.typed": "",
    "README.md": "# small\n",
    "csrc/core/answer.h": "#pragma once\n#define ANSWER 42\n",
    "csrc/core/plain.cpp": '#include "answer.h"\nint answer() { return ANSWER; }\n',
    "csrc/core/isa_cpu.cpp": """
        #define CAT2(a, b) a##b
        #define CAT(a, b) CAT2(a, b)
        #ifdef __AVX512F__
        constexpr int kLevel = 512;
        #elif defined(__AVX2__)
        constexpr int kLevel = 256;
        #else
        constexpr int kLevel = 0;
        #endif
        int CAT(isa_, UA_ISA)() { return kLevel; }
    """,
    "csrc/core/kernel.cu": "int kernel() { return 7; }\n",
    "csrc/ops/ops.cpp": """
        #include <torch/csrc/stable/library.h>
        #include "build_config.h"
        #define VISIBLE extern "C" __attribute__((visibility("default")))
        int answer();
        int isa_baseline();
        VISIBLE int get_answer() { return answer(); }
        VISIBLE int get_baseline() { return isa_baseline(); }
        #if defined(__x86_64__)
        int isa_avx2();
        int isa_avx512();
        VISIBLE int get_avx2() { return isa_avx2(); }
        VISIBLE int get_avx512() { return isa_avx512(); }
        #endif
        #ifdef UNIQUE_ATTN_WITH_CUDA
        int kernel();
        VISIBLE int get_kernel() { return kernel(); }
        #endif
        VISIBLE const char* facts() { return UA_BUILD_FACTS; }
        int hidden() { return 0; }
    """,
    "csrc/runtime/module.cpp": """
        #include <Python.h>
        #if !__has_include(<pybind11/pybind11.h>)
        #error pybind11 is not on the include path
        #endif
        static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_runtime", nullptr, -1};
        PyMODINIT_FUNC PyInit__runtime() {
          PyObject* module = PyModule_Create(&definition);
          PyModule_AddStringConstant(module, "version", UA_VERSION);
          return module;
        }
    """,
}

# Answers the two questions that the build asks, and compiles with the host compiler.
FAKE_NVCC = """#!/bin/sh
echo "$@" >> "{folder}/calls"
[ "$1" = --dryrun ] && exec >&2
case "$1" in
  --dryrun) echo '#$ INCLUDES="-I{folder}/include"'; echo '#$ LIBRARIES= "-L{folder}/lib/stubs" "-L{folder}/lib"' ;;
  --version) echo 'Cuda compilation tools, release {release}, V0' ;;
  *) while [ $# -gt 0 ]; do
       case "$1" in -c) source=$2 ;; -o) out=$2 ;; -MF) dep=$2 ;; esac
       shift
     done
     c++ -fPIC -MMD -MF "$dep" -x c++ -c "$source" -o "$out" ;;
esac
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


class Project:
    """A small checkout with the real build scripts, and a torch that must not be imported."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.torch = folder / "site-packages" / "torch"
        write(self.root, SOURCES)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
            shutil.copy(ROOT / name, self.root)
        shutil.copytree(ROOT / "build_tools", self.root / "build_tools", ignore=shutil.ignore_patterns("__pycache__"))
        write(
            self.torch,
            {
                "__init__.py": "raise RuntimeError('the build imported torch')\n",
                "version.py": "__version__ = '2.10.1+cpu'\n",
                "include/torch/csrc/stable/library.h": "",
                "lib/empty.c": "",
            },
        )
        for name in ("torch", "torch_cpu", "c10"):
            library = self.torch / "lib" / f"lib{name}.so"
            empty = self.torch / "lib" / "empty.c"
            subprocess.run(["cc", "-shared", "-o", library, empty, f"-Wl,-soname,lib{name}.so"], check=True)
        self.env = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("UNIQUE_ATTN_", "CUDA_", "CXX", "LDFLAGS", "PYTEST_"))
        }
        self.env |= {"UNIQUE_ATTN_TORCH_DIR": str(self.torch), "UNIQUE_ATTN_CUDA": "0"}
        self.package = self.root / "unique_attn"
        self.library = self.package / "lib" / "libunique_attn.so"
        self.module = self.package / f"_runtime{EXT_SUFFIX}"

    def python(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.root, env=self.env | env, capture_output=True, text=True)

    def build(self, *arguments: str, **env: str) -> str:
        result = self.python("-m", "build_tools", *arguments, **env)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def error(self, *arguments: str, **env: str) -> str:
        result = self.python("-m", "build_tools", *arguments, **env)
        assert result.returncode == 1, result.stdout
        return result.stderr

    def call(self, function: str, restype: type = ctypes.c_int):
        """Call into the built library in another process: a library loaded here would never be reloaded."""
        code = (
            "import ctypes, sys; "
            f"[ctypes.CDLL(f'{self.torch}/lib/lib{{n}}.so', 256) for n in ('c10', 'torch_cpu', 'torch')]; "
            f"f = ctypes.CDLL('{self.library}').{function}; f.restype = ctypes.{restype.__name__}; "
            "r = f(); print(r.decode() if isinstance(r, bytes) else r)"
        )
        return self.python("-c", code).stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has been built once; tests that change it make their own copy."""
    project = Project(tmp_path_factory.mktemp("built"))
    project.build()
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def compiled(output: str) -> set[str]:
    """Names of the files that a build made."""
    return {Path(name).name for name in re.findall(r"^\[\d+/\d+\] \S+ (\S+)$", output, re.MULTILINE)}


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
        files = {name for name in archive.namelist() if name.startswith("unique_attn/")}
        metadata = archive.read("unique_attn-1.2.3.dist-info/METADATA").decode()
    assert files == {
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


def test_cuda_sources_alone(project: Project, nvcc: Path):
    env = {"UNIQUE_ATTN_CUDA": "1", "UNIQUE_ATTN_NVCC": str(nvcc), "UNIQUE_ATTN_CUDA_ARCHS": "9.0+PTX"}
    assert "1 CUDA sources compile" in project.build("cuda", **env)
    assert not project.library.exists()
    calls = (nvcc.parent.parent / "calls").read_text()
    assert "code=compute_90" in calls
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


# ---- The library of this checkout ----


def test_version_is_in_one_place():
    from unique_attn import _runtime
    from unique_attn._version import __version__

    assert native.package_version() == __version__
    assert _runtime.build_info()["version"] == __version__


def test_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(_load, "_loaded", None)
    monkeypatch.setenv("UNIQUE_ATTN_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ImportError, match=r"none\.so does not exist; build it with `make build`"):
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


def test_info_without_the_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(_load, "_loaded", None)
    monkeypatch.setenv("UNIQUE_ATTN_LIBRARY", "/nowhere/lib.so")
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out
    assert "/nowhere/lib.so does not exist" in lines
    assert "no: the operator library is missing" in lines


def test_unknown_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["nonsense"]) == 2
    error = capsys.readouterr().err
    assert "no command 'nonsense'" in error
    assert "info" in error
    assert cli.main(["--help"]) == 0
