"""Whether pages compute what an attention module asks for, by the arguments that it gives the attention function."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from unique_attn.hf.compat import family_of, shares_kv, warn_once
from unique_attn.hf.handover import Refusal
from unique_attn.paging import unsupported

SLIDING = Refusal("it has a sliding window", lasting=True, quiet=True)
SINKS = ("s_aux", "sinks")  # the names under which families pass attention sinks

# Arguments that the attention function uses, or that leave what attention computes as it is. Whatever else a module
# passes may change it: the selection of a sparse attention of its own, say.
USED = frozenset(
    (
        *SINKS,
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "head_mask",
        "is_causal",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "position_bias",
        "position_ids",
        "sliding_window",
        "softcap",
    )
)
HARMLESS = frozenset(
    (
        "attention_mask",
        "cache_position",
        "dropout",
        "key",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "query",
        "return_dict",
        "scaling",
        "seq_idx",
        "use_cache",
        "value",
    )
)
_KNOWN = USED | HARMLESS
_asked: dict[type, frozenset[str]] = {}  # by attention class


class UnsupportedFeatureError(NotImplementedError):
    """A model asks for a kind of attention that neither the ops nor the dense fallbacks compute."""


def refuse_continuous_batching() -> NoReturn:
    raise UnsupportedFeatureError(
        "transformers' continuous batching (generate_batch) keeps its keys in a cache of its own, which unique_attn "
        "does not read: use generate(), or the backend for vLLM to serve requests as they come, or "
        "unique_attn.disable(model) first for dense batches"
    )


def unknown_reason(module: nn.Module, kwargs: dict[str, Any]) -> Refusal | None:
    """Why a call with arguments of which nothing is known is dense, as the stock implementations are; None if all are.

    Raises:
        UnsupportedFeatureError: the module itself passes one, beside what its caller gave it: it may then count on an
            attention function that knows it, and stock attention may get another mask.
    """
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _KNOWN)
    if not unknown:
        return None
    if not _asked_for(type(module)).isdisjoint(unknown):
        raise UnsupportedFeatureError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, and unique_attn does not know what "
            "that changes: use this model with its own attention"
        )
    return Refusal(f"unique_attn does not know what {', '.join(unknown)} would change")


def never_sparse(model: Any, modules: Sequence[nn.Module]) -> str | None:
    """Why no layer of a model could ever use pages; None if some may. Such a model keeps its own attention."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    asked = {name for cls in {type(module) for module in modules} for name in _asked_for(cls)}
    unknown = sorted(asked - _KNOWN)
    if unknown:
        return f"its attention is told {', '.join(unknown)}, and unique_attn does not know what that changes"
    if not asked & set(SINKS) and all(family_of(module).eager_only for module in modules):
        return "its family has eager attention only"
    return None


def _asked_for(cls: type) -> frozenset[str]:
    """The names that an attention module gives the arguments of its attention function, as its source has them."""
    if cls not in _asked:
        _asked[cls] = _find_asked_for(cls)
    return _asked[cls]


def _find_asked_for(cls: type) -> frozenset[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))  # type: ignore[attr-defined]
    except (AttributeError, OSError, SyntaxError, TypeError):  # no source: the attention function looks at each call
        return frozenset()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _passes_self(node)]
    return frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None)


def _passes_self(call: ast.Call) -> bool:
    """Whether it is a call like ``attention_interface(self, query, ...)``."""
    first = call.args[0] if call.args else None
    return isinstance(call.func, ast.Name) and isinstance(first, ast.Name) and first.id == "self"


def warn_dense(module: nn.Module, refusal: Refusal) -> None:
    """Say that a module is dense, once in a process for its class and the reason."""
    stays = "stays dense" if refusal.lasting else "is dense in this call"
    warn_once(f"{type(module).__name__} {stays}: {refusal.reason}", type(module), refusal.reason)


def module_reason(module: nn.Module, window: int = 0) -> Refusal | None:
    """Why no call of this module can use pages, by its config; None if calls can. ``window``: what its cache knows."""
    if window_of(module) != window:
        return SLIDING
    if shares_kv(getattr(module, "config", None)):
        return Refusal("layers of its model share keys and values", lasting=True)
    return None


def kind_reason(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any], window: int = 0
) -> Refusal | None:
    """Why this kind of attention cannot use pages, by what a call is given; None if it can. ``key`` of any length."""
    if kwargs.get("sliding_window") not in (None, window):
        return SLIDING
    reason = _lasting(module, query, key, value, kwargs)
    return None if reason is None else Refusal(reason, lasting=True)


def call_reason(
    module: nn.Module, query: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> Refusal | None:
    """Why only this call cannot use pages; None if it can."""
    # A single query is the last one, and a mask says itself what is causal.
    if query.shape[2] > 1 and mask is None and not is_causal(module, kwargs):
        return Refusal("it is not causal")
    if kwargs.get("output_attentions"):
        return Refusal("output_attentions needs all weights")
    return Refusal("it uses dropout") if dropout > 0 else None


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a query sees no later tokens where no mask says so."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _lasting(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("softcap") is not None:
        return "it softcaps its logits"
    for name in ("head_mask", "position_bias"):
        if kwargs.get(name) is not None:
            return f"it uses {name}"
    sinks = [kwargs[name] for name in SINKS if kwargs.get(name) is not None]
    if any(tuple(each.shape) != (query.shape[1],) for each in sinks):
        return f"its attention sinks have shape {list(sinks[0].shape)}"
    if not sinks and family_of(module).eager_only:
        return "its family has eager attention only"
    return unsupported(query, key, value)


def window_of(module: nn.Module) -> int | None:
    """Tokens that a query of an attention module sees, itself included; 0 for all; None for another kind of window."""
    config, kind = getattr(module, "config", None), _layer_type(module)
    if kind is not None and "chunked" not in kind and "sliding" not in kind:
        return 0
    if "chunked" in (kind or "") or _first(module, config, "attention_chunk_size") is not None:
        return None
    window = _first(module, config, "sliding_window")
    if window is not None:
        return int(window)
    return 0 if kind is None else None


def _layer_type(module: nn.Module) -> str | None:
    types, layer_idx = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return types[layer_idx] if types is not None and layer_idx is not None and layer_idx < len(types) else None


def _first(module: nn.Module, config: Any, name: str) -> Any:
    value = getattr(module, name, None)
    return getattr(config, name, None) if value is None else value
