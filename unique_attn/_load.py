"""Find the operator library and load it into PyTorch.

The library, ``unique_attn/lib/libunique_attn.so``, holds every kernel and every ``torch.ops.unique_attn``
operator, and no Python. It targets LibTorch's stable ABI as of torch 2.10, with or without CUDA; it was run with
2.11.0+cu130 and 2.13.0.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

MIN_TORCH = (2, 10)
LIBRARY_NAME = "libunique_attn.so"

_loaded: Path | None = None


class LibraryError(ImportError):
    """The operator library is missing or does not load."""


def library_path() -> Path:
    """Where the operator library is expected: ``UNIQUE_ATTN_LIBRARY`` if set, else inside the package."""
    override = os.environ.get("UNIQUE_ATTN_LIBRARY")
    return Path(override) if override else Path(__file__).parent / "lib" / LIBRARY_NAME


def _advice() -> str:
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").is_file():
        return "install the package again, by `pip install .` in a checkout"
    return (
        f"this is the checkout {root}, which is not built: run `make build` there (an installed unique_attn is found "
        "from other folders than a checkout)"
    )


def load_library() -> Path:
    """Load the operator library once per process and return its path.

    Raises:
        LibraryError: torch is too old, the file is missing, or the dynamic linker refuses it.
    """
    global _loaded
    if _loaded is not None:
        return _loaded
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        raise LibraryError(f"unique_attn needs torch >= 2.10, but this environment has {torch.__version__}")
    path = library_path()
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise LibraryError(f"the operator library of unique_attn is missing: {path} {what}; {_advice()}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise LibraryError(
            f"the operator library of unique_attn does not load ({error}); it was built for another platform "
            "or is damaged: rebuild it with `make build`, or reinstall the package"
        ) from error
    if not hasattr(torch.ops.unique_attn, "build_info"):
        raise LibraryError(f"the operator library of unique_attn is missing: {path} holds none of its ops; {_advice()}")
    _loaded = path
    return path
