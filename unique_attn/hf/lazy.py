"""Register with transformers when it is imported, so that ``import unique_attn`` need not import it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

TRIGGER = "transformers.modeling_utils"  # defines AttentionInterface; every model file imports it


def register() -> None:
    """Put ``"unique"`` into transformers' registries of attention and mask functions, unless it is there already."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for interface, name, function in (
        (AttentionInterface, "unique", _attention),
        (AttentionInterface, "paged|unique", _continuous_batching),
        (AttentionMaskInterface, "unique", _mask),
    ):
        if name not in interface._global_mapping:
            interface.register(name, function)


# The functions themselves are imported at their first call: transformers may be in the middle of being imported by
# one of our own modules when it registers us.


def _attention(*args: Any, **kwargs: Any) -> Any:
    from unique_attn.hf.attention import unique_attention_forward

    return unique_attention_forward(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    from unique_attn.hf.attention import unique_mask

    return unique_mask(*args, **kwargs)


def _continuous_batching(*args: Any, **kwargs: Any) -> Any:
    """What continuous batching asks for up to transformers 5.22, also of models that were not enabled."""
    from unique_attn.hf.reasons import refuse_continuous_batching

    refuse_continuous_batching()


def register_when_imported() -> None:
    """:func:`register` now if transformers' models are loaded already, else right after they are."""
    if TRIGGER in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds :data:`TRIGGER` as everybody else would, once, but has :func:`register` run after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if it had been imported without us.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        try:
            register()
        except ImportError as error:  # a transformers too old for us must stay usable
            warnings.warn(f'unique_attn: "unique" is not registered: {error}', UserWarning, stacklevel=2)
