"""Page-sparse attention for PyTorch and Hugging Face: one page index for decoding and training.

Importing the package loads the ops and registers the attention implementation ``"unique"`` with transformers (as soon
as that is imported, if it is). It changes nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unique_attn import ops
from unique_attn._version import __version__
from unique_attn.config import UniqueConfig
from unique_attn.hf.lazy import register_when_imported
from unique_attn.train_config import TrainConfig

if TYPE_CHECKING:
    from unique_attn import hf, reference, reference_index, train, viz
    from unique_attn._runtime import PagePool, PoolFullError
    from unique_attn.calibration.result import Calibration
    from unique_attn.calibration.run import calibrate
    from unique_attn.hf.cache import UniqueCache
    from unique_attn.hf.callback import SparsityCallback
    from unique_attn.hf.graphed import GraphedDecoder
    from unique_attn.hf.hooks import SelectionRecord
    from unique_attn.hf.model import disable, enable, record_prefill, record_selection
    from unique_attn.prefill import PrefillRecord

__all__ = [
    "Calibration",
    "GraphedDecoder",
    "PagePool",
    "PoolFullError",
    "PrefillRecord",
    "SelectionRecord",
    "SparsityCallback",
    "TrainConfig",
    "UniqueCache",
    "UniqueConfig",
    "__version__",
    "calibrate",
    "disable",
    "enable",
    "hf",
    "ops",
    "record_prefill",
    "record_selection",
    "reference",
    "reference_index",
    "train",
    "viz",
]

# Imported at first use: transformers takes seconds, and not everybody has it.
_LAZY = {
    "Calibration": "unique_attn.calibration.result",
    "GraphedDecoder": "unique_attn.hf.graphed",
    "PagePool": "unique_attn._runtime",
    "PoolFullError": "unique_attn._runtime",
    "PrefillRecord": "unique_attn.prefill",
    "SelectionRecord": "unique_attn.hf.hooks",
    "SparsityCallback": "unique_attn.hf.callback",
    "UniqueCache": "unique_attn.hf.cache",
    "calibrate": "unique_attn.calibration.run",
    "disable": "unique_attn.hf.model",
    "enable": "unique_attn.hf.model",
    "record_prefill": "unique_attn.hf.model",
    "record_selection": "unique_attn.hf.model",
}
_SUBMODULES = ("hf", "reference", "reference_index", "train", "viz")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"unique_attn.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
