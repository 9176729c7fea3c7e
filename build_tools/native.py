"""Build the two native files of the package with ninja, in parallel and incrementally.

    unique_attn/lib/libunique_attn.so   operators and kernels: LibTorch's stable ABI, no Python
    unique_attn/_runtime.<abi>.so       host-side objects: pybind11, one per CPython

Objects live in ``build/native`` of the checkout, whichever command asked for them (pip, build, make), so that
nothing is compiled twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from build_tools import environment as env

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("ops", "runtime")

OP_LIBRARY = "lib/libunique_attn.so"
RUNTIME_MODULE = "_runtime" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
# Host-only parts of the core that the Python module binds.
RUNTIME_CORE_SOURCES = ("csrc/core/decode/split_plan.cpp",)

# The stable ABI of torch 2.10 (run with 2.11 and 2.13).
TORCH_TARGET_VERSION = "0x020a000000000000"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
# Symbols of static libraries (the CUDA runtime) stay private: torch has a CUDA runtime of its own.
LINK_FLAGS = ["-shared", "-Wl,--exclude-libs,ALL"]

RULES = """\
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  description = $cxx $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  description = nvcc $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $in $flags -o $out
  description = link $out
"""


def package_version() -> str:
    match = re.search(r'__version__ = "([^"]+)"', (ROOT / "unique_attn" / "_version.py").read_text())
    assert match is not None
    return match.group(1)


def _quote(arguments: Sequence[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def _system(folders: Sequence[str]) -> list[str]:
    return [flag for folder in folders for flag in ("-isystem", folder)]


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class NativeBuild:
    """One build.ninja for the targets asked for."""

    def __init__(self, targets: Sequence[str] = TARGETS) -> None:
        self.targets = tuple(targets)
        self.folder = Path("build") / "native" / sysconfig.get_platform()  # relative to ROOT, as all sources
        self.statements: list[str] = []
        self.artefacts: dict[str, Path] = {}  # path inside the package: file in the build folder
        self.cuda_objects: list[str] = []
        self.cxx = env.find_cxx()
        self.cxx_flags = CXX_FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        self.link_flags = LINK_FLAGS + shlex.split(os.environ.get("LDFLAGS", ""))
        self.cuda = env.find_cuda() if "ops" in self.targets else None
        if "ops" in self.targets:
            self._add_op_library(env.find_torch())
        if "runtime" in self.targets:
            self._add_runtime_module()

    def _object(self, source: str, group: str, rule: str, flags: Sequence[str], needs: str = "") -> str:
        """One compilation; returns its object. ``group`` keeps objects with other flags apart."""
        output = (self.folder / group / source).as_posix() + ".o"
        self.statements.append(f"build {output}: {rule} {source}{' | ' if needs else ''}{needs}")
        self.statements.append(f"  flags = {_quote(flags)}")
        return output

    def _link(self, name: str, group: str, objects: Sequence[str], flags: Sequence[str]) -> None:
        output = self.folder / group / Path(name).name
        self.statements.append(f"build {output.as_posix()}: link {' '.join(objects)}")
        self.statements.append(f"  flags = {_quote([*self.link_flags, *flags])}")
        self.artefacts[name] = ROOT / output

    def _add_op_library(self, torch: env.Torch) -> None:
        ops = _sources("csrc/ops/*.cpp")
        core = _sources("csrc/core/**/*.cpp")
        variants = env.cpu_variants()
        self._write_build_config(torch, list(variants))

        torch_flags = [*self.cxx_flags, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        torch_flags += [f"-I{(self.folder / 'ops').as_posix()}", *_system([str(torch.path / "include")])]
        if self.cuda is not None:
            # USE_CUDA makes torch's shim header declare the current CUDA stream.
            torch_flags += ["-DUNIQUE_ATTN_WITH_CUDA", "-DUSE_CUDA", *_system(self.cuda.include_dirs)]
        torch_stamp = str(torch.path / "version.py").replace(" ", "$ ")
        objects = [self._object(source, "ops", "cxx", torch_flags, torch_stamp) for source in ops]
        objects += [self._object(s, "ops", "cxx", self.cxx_flags) for s in core if not s.endswith("_cpu.cpp")]
        # Baseline first: of an inline function that several objects hold, the linker keeps the first copy.
        for isa, isa_flags in variants.items():
            flags = [*self.cxx_flags, f"-DUA_ISA={isa}", *isa_flags]
            objects += [self._object(s, f"ops-{isa}", "cxx", flags) for s in core if s.endswith("_cpu.cpp")]

        # --no-as-needed: libtorch.so brings libtorch_cuda.so into scope where torch has CUDA. Torch is loaded
        # before this library, so no rpath is needed.
        link = [f"-L{torch.path / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-lpthread"]
        if self.cuda is not None:
            more = os.environ.get("UNIQUE_ATTN_NVCC_FLAGS", "").split()
            flags = [*NVCC_FLAGS, "-DUNIQUE_ATTN_WITH_CUDA", *self.cuda.gencode, *more]
            if "sm_90a" in self.cuda.archs:  # else the kernels for Hopper are empty and must not be launched
                flags.append("-DUNIQUE_ATTN_SM90A")
            self.cuda_objects = [self._object(s, "ops", "nvcc", flags) for s in _sources("csrc/core/**/*.cu")]
            objects += self.cuda_objects
            link += [f"-L{folder}" for folder in self.cuda.library_dirs]
            link += ["-Wl,--as-needed", "-lcudart_static", "-ldl", "-lrt"]
        if self.cuda_objects:
            self.statements.append(f"build cuda: phony {' '.join(self.cuda_objects)}")
        if ops:
            self._link(OP_LIBRARY, "ops", objects, link)
        else:
            print("unique_attn: csrc/ops holds no source, the operator library is not built")

    def _write_build_config(self, torch: env.Torch, variants: list[str]) -> None:
        """build_config.h: what the library was built with, as the inside of a JSON object in a C string."""
        facts = {
            "version": package_version(),
            "torch": torch.version,
            "cpu_isas": variants,
            "cuda": self.cuda.version if self.cuda else None,
            "cuda_archs": list(self.cuda.archs) if self.cuda else [],
        }
        literal = json.dumps(json.dumps(facts)[1:-1])
        text = f"#pragma once\n#define UA_BUILD_FACTS {literal}\n"
        _write_if_changed(ROOT / self.folder / "ops" / "build_config.h", text)

    def _add_runtime_module(self) -> None:
        include, version = env.find_pybind11()
        # Through a link, because pip's isolated environments move with every build.
        link = self.folder / "include" / "pybind11"
        (ROOT / link).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / link).unlink(missing_ok=True)
        (ROOT / link).symlink_to(Path(include) / "pybind11")
        flags = [*self.cxx_flags, f'-DUA_VERSION="{package_version()}"', f'-DUA_PYBIND11_VERSION="{version}"']
        flags += _system([link.parent.as_posix(), *env.python_include_dirs()])
        sources = [*_sources("csrc/runtime/*.cpp"), *(s for s in RUNTIME_CORE_SOURCES if (ROOT / s).is_file())]
        group = f"runtime-{sysconfig.get_config_var('SOABI')}"
        self._link(RUNTIME_MODULE, group, [self._object(s, group, "cxx", flags) for s in sources], [])

    def summary(self) -> str:
        parts = [f"targets {' '.join(self.targets)}"]
        if "ops" in self.targets:
            parts.append(f"CPU {' '.join(env.cpu_variants())}")
            cuda = self.cuda
            parts.append(f"CUDA {cuda.version} for {' '.join(cuda.archs)}" if cuda else "no CUDA")
        return "unique_attn: " + ", ".join(parts)

    def run(self, goals: Sequence[str] = ()) -> None:
        """Run ninja for ``goals`` (default: everything)."""
        build_file = ROOT / self.folder / f"{'-'.join(self.targets)}.ninja"
        head = [f"builddir = {self.folder.as_posix()}", f"cxx = {self.cxx}"]
        head += [f"nvcc = {self.cuda.nvcc}"] if self.cuda else []
        _write_if_changed(build_file, "\n".join([*head, RULES, *self.statements]) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [env.find_ninja(), "-f", str(build_file.relative_to(ROOT)), "-j", jobs, *goals]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise env.BuildError("the native build failed: the compiler's messages are above")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
        yield


def _install(source: Path, destination: Path) -> None:
    """Copy if different, by rename: a process that has the old file mapped keeps it."""
    if destination.is_file() and filecmp.cmp(source, destination, shallow=False):
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.copy2(source, temporary)
    temporary.replace(destination)


def build(package: Path, targets: Sequence[str] = TARGETS) -> list[str]:
    """Build ``targets`` and put the files into the folder ``package``; returns their paths inside it."""
    only = os.environ.get("UNIQUE_ATTN_ONLY")
    if only:
        if only not in TARGETS:
            raise env.BuildError(f"UNIQUE_ATTN_ONLY={only}: expected one of {', '.join(TARGETS)}")
        targets = (only,)
    with _locked(ROOT / "build" / "native"):
        native = NativeBuild(targets)
        print(native.summary(), flush=True)
        native.run()
        for name, file in native.artefacts.items():
            _install(file, package / name)
    return list(native.artefacts)


def compile_cuda() -> list[str]:
    """Compile every CUDA source without linking; returns the objects."""
    with _locked(ROOT / "build" / "native"):
        native = NativeBuild(("ops",))
        if native.cuda_objects:
            print(native.summary(), flush=True)
            native.run(["cuda"])
    return native.cuda_objects
