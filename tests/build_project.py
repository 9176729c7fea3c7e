"""A small project of the same shape for the build tests: the real build scripts, stand-ins for torch and nvcc."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

SOURCES = {
    "unique_attn/__init__.py": "",
    "unique_attn/_version.py": '__version__ = "1.2.3"\n',
    "unique_attn/py.typed": "",
    "README.md": "# small\n",
    "benchmarks/__init__.py": "",
    "benchmarks/suite/decode.py": "",
    "benchmarks/results/decode-cpu.json": "{}\n",
    "examples/demo.py": "",
    "examples/support/document.txt": "",
    "tests/test_small.py": "",
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


def compiled(output: str) -> set[str]:
    """Names of the files that a build made."""
    return {Path(name).name for name in re.findall(r"^\[\d+/\d+\] \S+ (\S+)$", output, re.MULTILINE)}
