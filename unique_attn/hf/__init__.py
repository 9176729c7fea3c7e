"""The Hugging Face drop-in. Importing this package does not import transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unique_attn.hf.callback import SparsityCallback
    from unique_attn.hf.training import TrainState, train_state

__all__ = ["SparsityCallback", "TrainState", "train_state"]

_LAZY = {
    "SparsityCallback": "unique_attn.hf.callback",
    "TrainState": "unique_attn.hf.training",
    "train_state": "unique_attn.hf.training",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
