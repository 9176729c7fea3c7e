"""Where transformers 4.57 to 5.x differ. Nothing else in the package asks which version is installed."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

try:
    import transformers
    from transformers import GenerationMixin
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        StaticCache,
    )
    from transformers.cache_utils import StaticLayer as StockStaticLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
except ImportError as error:
    raise ImportError(
        f"the Hugging Face part of unique_attn needs transformers >= 4.57 ({error}): pip install 'transformers>=4.57'"
    ) from error

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "DummyLayer",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMixin",
    "LinearAttentionLayer",
    "PreTrainedModel",
    "StaticCache",
    "StockStaticLayer",
    "cache_argument",
    "config_family",
    "cropped_length",
    "eager_attention",
    "eager_mask",
    "family_of",
    "is_plain_causal_step",
    "sdpa_attention_forward",
    "sdpa_mask",
    "shares_kv",
    "warn_once",
]

try:  # transformers 5
    from transformers.cache_utils import LinearAttentionLayer
except ImportError:
    LinearAttentionLayer = None  # type: ignore[assignment,misc]
try:  # of layers without attention, in some 5.x
    from transformers.cache_utils import DummyLayer
except ImportError:
    DummyLayer = None  # type: ignore[assignment,misc]

_CROP_COUNTS_TOKENS = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters
_warned: set[tuple[Any, ...]] = set()
# By attention class. Plain dictionaries, because torch.compile warns of functools.cache.
_eager: dict[type, Callable[..., Any] | None] = {}
_families: dict[type, Family] = {}


def warn_once(message: str, *key: Any) -> None:
    """Warn, but only the first time in this process that these ``key`` values occur; while a model is compiled, too."""
    if torch.compiler.is_compiling():
        _warn_while_compiling(message, *key)
    else:
        _warn(message, key, 4)


@torch.compiler.assume_constant_result
def _warn_while_compiling(message: str, *key: Any) -> None:
    _warn(message, key, 4)


def _warn(message: str, key: tuple[Any, ...], level: int) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"unique_attn: {message}", UserWarning, stacklevel=level)


def cropped_length(amount: int, length: int) -> int:
    """Tokens that remain of ``length`` after ``Cache.crop(amount)``, by the installed version's convention.

    Up to some 5.x, a positive amount is the length to keep and a negative one the tokens to drop; later, all
    amounts are tokens to drop and must not be positive.
    """
    if _CROP_COUNTS_TOKENS and amount > 0:
        raise ValueError(
            f"crop: expected a negative number of tokens to remove (or 0), got {amount}: this version of transformers "
            f"({transformers.__version__}) does not take the length to keep"
        )
    if amount < 0 or _CROP_COUNTS_TOKENS:
        return max(0, length - abs(amount))
    return min(amount, length)


def is_traced() -> bool:
    """Whether the model is being turned into a program now (``torch.compile``, ``torch.jit``): compiled or traced."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def sdpa_mask(**kwargs: Any) -> Any:
    """The mask function that transformers registers for ``sdpa``."""
    return _registered_mask("sdpa", kwargs)


def eager_mask(**kwargs: Any) -> Any:
    """What the mask function for ``eager`` returns: additive, and never left out for being causal.

    That of some versions copies a number from the host, which a CUDA graph cannot hold.
    """
    dtype = kwargs.get("dtype", torch.float32)
    mask = _registered_mask("sdpa", {**kwargs, "allow_is_causal_skip": False})
    if mask is None:  # nothing hidden, in both directions
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _registered_mask(name: str, kwargs: dict[str, Any]) -> Any:
    function: Any = AttentionMaskInterface._global_mapping[name]
    return function(**kwargs)


def cache_argument(model: Any) -> str | None:
    """The name under which a model's forward takes its cache: ``past_key_values`` up to some 5.x, then ``cache``."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "layer_past", "cache_params") if name in names), None)


def is_plain_causal_step(kwargs: dict[str, Any]) -> bool:
    """Whether these arguments of a mask function ask for the causal mask of one new token on a growing cache."""
    if "q_length" in kwargs:
        one_token = isinstance(kwargs["q_length"], int) and kwargs["q_length"] == 1
    else:
        one_token = kwargs["cache_position"].shape[0] == 1
    return (
        one_token
        and kwargs.get("mask_function") is causal_mask_function
        and not kwargs.get("use_vmap", False)
        and kwargs.get("allow_is_causal_skip", True)  # False for static caches and where a mask must exist
        and kwargs.get("kv_offset", 0) == 0
        and ("q_offset" not in kwargs or kwargs["q_offset"] + 1 == kwargs["kv_length"])
    )


def shares_kv(config: Any) -> bool:
    """Whether some layers of the model read the keys and values of other layers (Gemma 3n, Gemma 4)."""
    modes = getattr(config, "kv_sharing_modes", None) or ()
    return any(mode is not None for mode in modes) or bool(getattr(config, "num_kv_shared_layers", 0))


def eager_attention(module_class: type) -> Callable[..., Any] | None:
    """The family's own eager attention function, or None if its modeling file has none."""
    if module_class not in _eager:
        files = [sys.modules.get(each.__module__) for each in module_class.__mro__]
        found = (getattr(file, "eager_attention_forward", None) for file in files)
        _eager[module_class] = next((function for function in found if function is not None), None)
    return _eager[module_class]


class Family(NamedTuple):
    """What is known of a model family as a whole."""

    eager_only: bool  # with sdpa it would compute something else than with eager attention
    calls_interface: bool  # its attention is whatever is registered with transformers under the implementation's name


def family_of(module: Any) -> Family:
    """The family of an attention module."""
    config = getattr(module, "config", None)
    return _family(type(module)) if config is None else config_family(config)


def config_family(config: Any) -> Family:
    """The family of a language model with this config."""
    return _family(type(config))


def _family(cls: type) -> Family:
    if cls not in _families:
        _families[cls] = _find_family(cls)
    return _families[cls]


def _find_family(cls: type) -> Family:
    """By the models in the file of an attention module, or in the modeling file beside that of a config."""
    for each in cls.__mro__:
        file = sys.modules.get(each.__module__.replace(".configuration_", ".modeling_"))
        models = [
            value
            for value in ({} if file is None else vars(file)).values()
            if isinstance(value, type) and issubclass(value, PreTrainedModel) and value is not PreTrainedModel
        ]
        if models:
            eager = not any(model._supports_sdpa for model in models)
            return Family(eager, any(model._can_set_attn_implementation() for model in models))
    return Family(eager_only=False, calls_interface=True)
