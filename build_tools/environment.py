"""What the build needs from outside: torch's headers, compilers, CUDA, pybind11, ninja.

Every function either returns what it found or raises :class:`BuildError` with one sentence that says what to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 10)
MIN_CUDA = (12, 0)
# Machine code for 8.x and 9.0, and PTX (8.0) that the driver compiles for anything newer.
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"


class BuildError(Exception):
    """The environment lacks something that the build needs."""


@dataclass(frozen=True)
class Torch:
    path: Path
    version: str


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    version: str
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]
    gencode: tuple[str, ...]  # flags
    archs: tuple[str, ...]  # sm_80, compute_80 (PTX), sm_90a


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _torch_candidates() -> Iterator[Path]:
    paths = sysconfig.get_paths()
    yield from (Path(paths[key]) / "torch" for key in ("purelib", "platlib"))
    yield from (Path(folder) / "torch" for folder in [*site.getsitepackages(), site.getusersitepackages()])
    spec = importlib.util.find_spec("torch")  # locates a top-level package without importing it
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    if "VIRTUAL_ENV" in os.environ:
        yield from Path(os.environ["VIRTUAL_ENV"]).glob("lib/python*/site-packages/torch")


def find_torch() -> Torch:
    """The torch package of the target environment, by path."""
    override = os.environ.get("UNIQUE_ATTN_TORCH_DIR")
    for path in [Path(override)] if override else _torch_candidates():
        header = path / "include" / "torch" / "csrc" / "stable" / "library.h"
        version_file = path / "version.py"
        if not header.is_file() or not version_file.is_file():
            continue
        match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", version_file.read_text(), re.MULTILINE)
        version = match.group(1) if match else "0.0"
        if _version_tuple(version) < MIN_TORCH:
            raise BuildError(f"unique_attn needs torch >= 2.10, but {path} holds {version}: upgrade torch first")
        return Torch(path.resolve(), version)
    if override:
        raise BuildError(
            f"UNIQUE_ATTN_TORCH_DIR={override} is not the folder of a torch >= 2.10 package: "
            "set it to the folder that holds torch's __init__.py, or unset it"
        )
    raise BuildError(
        "no torch >= 2.10 was found in this environment: install torch first and add --no-build-isolation to the "
        "install command (--no-isolation for `python -m build`), or set UNIQUE_ATTN_TORCH_DIR to the folder of an "
        "installed torch package"
    )


def find_cxx() -> str:
    """The C++ compiler: $CXX, else c++, g++ or clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler was found: install g++ or clang++, or set CXX")


def find_ninja() -> str:
    """PyPI's ninja if it is installed, else the one on PATH."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found: `pip install ninja`")
    return found


def find_pybind11() -> tuple[str, str]:
    """(include folder, version) of pybind11: the Python package, else the copy inside torch's headers."""
    spec = importlib.util.find_spec("pybind11")
    if spec is not None:
        import pybind11

        return pybind11.get_include(), pybind11.__version__
    with contextlib.suppress(BuildError):
        torch = find_torch()
        if (torch.path / "include" / "pybind11" / "pybind11.h").is_file():
            return str(torch.path / "include"), f"of torch {torch.version}"
    raise BuildError("pybind11 was not found: `pip install pybind11`")


def _find_nvcc() -> Path | None:
    explicit = os.environ.get("UNIQUE_ATTN_NVCC")
    if explicit:
        found = shutil.which(explicit)
        if found is None:
            raise BuildError(f"UNIQUE_ATTN_NVCC={explicit} is not an executable: set it to nvcc's path, or unset it")
        return Path(found)
    home = os.environ.get("CUDA_HOME")
    if home and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
        return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    return Path(found) if found else None


def _parse_archs(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    gencode: list[str] = []
    archs: list[str] = []
    for item in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None or (match[3] and match[4]):
            raise BuildError(
                f"UNIQUE_ATTN_CUDA_ARCHS={text}: {item!r} is not an architecture; expected a list such as "
                f"{DEFAULT_CUDA_ARCHS!r} (PTX of an 'a' or 'f' architecture runs nowhere else)"
            )
        name = match[1] + match[2] + match[3]
        for code in [f"sm_{name}"] + ([f"compute_{name}"] if match[4] else []):
            gencode += ["-gencode", f"arch=compute_{name},code={code}"]
            archs.append(code)
    return tuple(gencode), tuple(archs)


def find_cuda() -> Cuda | None:
    """The CUDA toolkit to build with, or None: UNIQUE_ATTN_CUDA is auto (the default), 0 or 1."""
    mode = os.environ.get("UNIQUE_ATTN_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        raise BuildError(f"UNIQUE_ATTN_CUDA={mode}: expected auto, 0 or 1")
    if mode == "0":
        return None
    nvcc = _find_nvcc()
    if nvcc is None:
        if mode == "1":
            raise BuildError(
                "UNIQUE_ATTN_CUDA=1, but nvcc was not found: put it on PATH, or set CUDA_HOME or UNIQUE_ATTN_NVCC"
            )
        return None
    # nvcc itself knows where its headers and libraries are: folders differ between distributions, and the
    # nvcc on PATH may be a wrapper script.
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", release)
    version = match.group(1) if match else "0.0"
    if _version_tuple(version) < MIN_CUDA:
        if mode == "1":
            raise BuildError(f"UNIQUE_ATTN_CUDA=1 needs CUDA >= 12.0, but {nvcc} is {version}")
        print(f"unique_attn: {nvcc} is CUDA {version}; 12.0 or newer is needed, so only the CPU is built")
        return None

    def folders(variable: str, flag: str) -> tuple[str, ...]:
        line = re.search(rf"^#\$ {variable}=(.*)$", dry, re.MULTILINE)
        found = [Path(each) for each in re.findall(rf'"{flag}([^"]+)"', line.group(1))] if line else []
        # nvcc from PyPI (nvidia-cuda-nvcc) says lib64, its packages have lib.
        found = [each if each.is_dir() or each.name != "lib64" else each.with_name("lib") for each in found]
        return tuple(os.path.realpath(folder) for folder in found if folder.name != "stubs")

    gencode, archs = _parse_archs(os.environ.get("UNIQUE_ATTN_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS)
    return Cuda(nvcc, version, folders("INCLUDES", "-I"), folders("LIBRARIES", "-L"), gencode, archs)


def cpu_variants() -> dict[str, list[str]]:
    """Instruction sets that every ``*_cpu.cpp`` is compiled for, and their flags; the choice is made at run time."""
    variants: dict[str, list[str]] = {"baseline": []}
    if platform.machine() in ("x86_64", "AMD64"):
        variants["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
        variants["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    return variants


def python_include_dirs() -> list[str]:
    paths = sysconfig.get_paths()
    folders = list(dict.fromkeys(paths[key] for key in ("include", "platinclude")))
    if not any((Path(folder) / "Python.h").is_file() for folder in folders):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BuildError(f"Python.h was not found: install the headers of Python {version} (python3-dev)")
    return folders
