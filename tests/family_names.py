"""Which model families transformers has: every class of it that can ``generate``, found by its names alone."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers.models.auto import modeling_auto

# Where a model type is in several of these, the first names its main class.
_MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
)
_NOT_ALL_GENERATE = "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES"
_GENERATIVE = re.compile(r"^class (\w+)\([^)]*GenerationMixin\b[^)]*\):", re.MULTILINE)


class Family(NamedTuple):
    """A class that can generate, and where it comes from.

    Attributes:
        name: the model type if this is its main class, else ``model type:class`` (or ``folder:class`` for a class
            that no auto mapping has).
        model_type: key of the config, None for a class outside of the mappings: the class names its config itself.
        class_name: of the model.
        module: where the class is, None if ``transformers`` itself has it.
    """

    name: str
    model_type: str | None
    class_name: str
    module: str | None

    def model_class(self) -> Any:
        return getattr(importlib.import_module(self.module or "transformers"), self.class_name)

    def config_class(self) -> Any:
        if self.model_type is None:
            return self.model_class().config_class
        return transformers.CONFIG_MAPPING[self.model_type]


@cache
def families() -> dict[str, Family]:
    """All of the installed version by name, in alphabetical order. Imports no model."""
    found: dict[str, Family] = {}
    generative = _generative_classes()
    for mapping in _MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping, {}).items():
            for name in [names] if isinstance(names, str) else names:
                main = found.get(model_type)
                if main is not None and main.class_name == name:
                    continue
                if mapping == _NOT_ALL_GENERATE and name not in generative:
                    continue
                key = model_type if main is None else f"{model_type}:{name}"
                found[key] = Family(key, model_type, name, None)
    mapped = {family.class_name for family in found.values()}
    for name, (folder, module) in generative.items():
        if name not in mapped:
            found[f"{folder}:{name}"] = Family(f"{folder}:{name}", None, name, module)
    return dict(sorted(found.items()))


def _generative_classes() -> dict[str, tuple[str, str]]:
    """Folder and module of every class that has a ``GenerationMixin``."""
    found = {}
    package = Path(transformers.__file__).parent
    for file in sorted((package / "models").rglob("modeling_*.py")):
        module = ".".join(("transformers", *file.relative_to(package).with_suffix("").parts))
        for name in _GENERATIVE.findall(file.read_text(encoding="utf-8")):
            found[name] = (file.parent.name, module)
    return found
