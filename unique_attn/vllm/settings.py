"""The settings of the backend: ``additional_config={"unique_attn": {...}}``, the fields of ``UniqueConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unique_attn.config import UniqueConfig
from unique_attn.rules import MAX_PAGES

#: The key in vLLM's ``additional_config``.
KEY = "unique_attn"
MISSPELT = (KEY, KEY.replace("_", ""), "unique_attention", "unique")
#: Fields of ``UniqueConfig`` that vLLM decides, and how it is told.
DECIDED_BY_VLLM = {
    "block_size": "vLLM's own argument block_size",
    "graphs": "vLLM's compilation_config, or enforce_eager",
    "max_decode_tokens": "speculative_config: a row of one token and its drafts is a decode step",
}


def read_settings(additional_config: Any, num_layers: int | None = None) -> UniqueConfig:
    """The settings in vLLM's ``additional_config``; the defaults if it has none.

    Args:
        additional_config: a mapping, or an object of another plugin, which has none of ours.
        num_layers: of the model, to check ``dense_layers`` against.

    Raises:
        TypeError: the settings are no mapping, or a field has the wrong type.
        ValueError: an unknown field, one that vLLM decides, or a value that is not allowed.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    name = f"additional_config[{KEY!r}]"
    if given is None:
        for key in additional_config if isinstance(additional_config, Mapping) else ():
            if str(key).lower().replace("-", "_") in MISSPELT:
                raise ValueError(f"additional_config: expected the settings under {KEY!r}, got {key!r}")
        given = {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected a mapping of fields of UniqueConfig, got {given!r}")
    for field, instead in DECIDED_BY_VLLM.items():
        if field in given:
            raise ValueError(f"{name}[{field!r}]: expected {instead}, got {given[field]!r} here")
    try:
        config = UniqueConfig.from_dict({**given, "max_decode_tokens": 1})  # how many it is, the engine says
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if num_pages(config) > MAX_PAGES:
        raise ValueError(
            f"{name}['dense_below']: expected at most {MAX_PAGES} pages of {config.page_size} tokens, "
            f"got {config.dense_below}"
        )
    if num_layers is not None and config.dense_layers and config.dense_layers[-1] >= num_layers:
        raise ValueError(
            f"{name}['dense_layers']: expected layers from 0 to {num_layers - 1}, got {config.dense_layers[-1]}"
        )
    return config


def num_pages(config: UniqueConfig) -> int:
    """Pages that a row of a decode step reads at most: the budget, or all that a context below ``dense_below`` has."""
    below = -(-max(config.dense_limit - 1, 0) // config.page_size)
    return max(config.num_pages, below)
