"""Print versions, what the library was compiled for, and whether its CUDA kernels run here."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from unique_attn import _load, _runtime
from unique_attn._command import Parser
from unique_attn._version import __version__


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _library() -> dict[str, Any]:
    """What the operator library says of itself. It is there, or the package could not be imported."""
    facts: dict[str, Any] = json.loads(torch.ops.unique_attn.build_info())
    return {"path": str(_load.load_library()), **facts}


def _driver_version() -> str | None:
    """The newest CUDA version that the installed driver supports."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _devices() -> list[dict[str, str]]:
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": d.name, "capability": f"{d.major}.{d.minor}"} for d in devices]


def _try_kernel() -> None:
    """Append one token to a tiny cache on the GPU and read it back; raises if that does not work."""
    from unique_attn import ops

    new = torch.ones(1, 1, 8, device="cuda")
    cache = torch.zeros(1, 1, 4, 8, device="cuda")
    ops.append_kv(new, new, cache, cache.clone(), torch.tensor([2], device="cuda"))
    if cache[0, 0].sum(-1).tolist() != [0, 0, 8, 0]:
        raise RuntimeError("a kernel ran but wrote the wrong values")


def _cuda_verdict(library: dict[str, Any], devices: list[dict[str, str]]) -> str:
    if not library["cuda_archs"]:
        return "no: the library was built without CUDA"
    if not devices:
        reason = "no usable device" if torch.backends.cuda.is_built() else "this torch has no CUDA"
        return f"no: {reason}"
    try:
        _try_kernel()
    except Exception as error:
        return f"no: {error}"
    return "yes"


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as plain data."""
    library = _library()
    devices = _devices()
    return {
        "unique_attn": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "library": library,
        "runtime": {"path": _runtime.__file__, **_runtime.build_info()},
        "devices": devices,
        "driver": _driver_version(),
        "cuda_kernels_run_here": _cuda_verdict(library, devices),
    }


def report(facts: dict[str, Any]) -> str:
    library, runtime = facts["library"], facts["runtime"]
    rows = [(key, facts[key]) for key in ("unique_attn", "python", "platform", "torch", "transformers")]
    archs = library["cuda_archs"]
    built = f"toolkit {library['cuda']}, {' '.join(archs)}" if archs else "not built"
    rows += [
        ("library", library["path"]),
        ("", f"version {library['version']}, headers of torch {library['torch']}"),
        ("CPU kernels", f"{' '.join(library['cpu_isas'])}; {library['cpu_isa']} in use here"),
        ("CUDA kernels", built),
        ("runtime", runtime["path"]),
        ("", f"version {runtime['version']}, pybind11 {runtime['pybind11']}, compiler {runtime['compiler']}"),
        ("driver", f"CUDA {facts['driver']}" if facts["driver"] else "no NVIDIA driver"),
    ]
    rows += [("device", f"{d['name']}, compute capability {d['capability']}") for d in facts["devices"]]
    rows.append(("CUDA runs here", facts["cuda_kernels_run_here"]))
    return "\n".join(f"{key:<15} {value}" for key, value in rows)


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    as_json = parser.parse_args(argv).json
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else report(facts))
