"""The page-scoring rules, index formats and limits of the op library, which says them itself (``build_info``).

What a rule computes is ``csrc/core/rules.h``; a rule that is added there is known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from unique_attn._load import load_library

load_library()
_INFO: dict[str, Any] = json.loads(torch.ops.unique_attn.build_info())


@dataclass(frozen=True)
class RuleInfo:
    """What a caller must know of a rule."""

    id: int  #: its place in the op library's table, which the ops take
    vectors: int  #: vectors of D channels in an exact index entry
    scalar: bool  #: whether that also holds one scalar
    spread_kind: str | None  #: the spread in the score is a ``scalar``, a ``vector``, or not there
    weight_name: str  #: the field of UniqueConfig with the weight of that; "" if there is none
    weight: float  #: its default; 0 where there is no weight
    compressible: bool  #: whether it has compressed entries
    trainable: bool  #: whether soft gates can be trained with it


def _rule_info(facts: dict[str, Any]) -> RuleInfo:
    """A rule of ``build_info``."""
    return RuleInfo(
        id=facts["id"],
        vectors=facts["vectors"],
        scalar=facts["scalar"],
        spread_kind=facts["spread"],
        weight_name=facts["weight_name"],
        weight=float(facts["weight"]),  # JSON has 2 for 2.0
        compressible=facts["compressible"],
        trainable=facts["trainable"],
    )


#: The scoring rules by name.
RULES: dict[str, RuleInfo] = {facts["name"]: _rule_info(facts) for facts in _INFO["rules"]}
#: Default weights of the spread, by the field of UniqueConfig that sets them.
WEIGHTS: dict[str, float] = {info.weight_name: info.weight for info in RULES.values() if info.weight_name}
#: The ways to store an index, with the op library's numbers.
INDEX_FORMATS: dict[str, int] = {name: number for number, name in enumerate(_INFO["index_formats"])}
#: Tokens that a page may have.
PAGE_SIZES: tuple[int, ...] = tuple(_INFO["page_sizes"])
#: Largest head dimension.
MAX_HEAD_DIM: int = _INFO["max_head_dim"]
#: Query heads that may share a KV head.
MAX_GROUP: int = _INFO["max_group"]
#: Query tokens that a sequence may have in one decode step.
MAX_QUERY_TOKENS: int = _INFO["max_query_tokens"]
#: Pages that ``topk_pages`` can select.
MAX_PAGES: int = _INFO["max_selected_pages"]


def choices(names: Iterable[object]) -> str:
    """``a, b or c``, as error messages list what is allowed."""
    *most, last = map(str, names)
    return f"{', '.join(most)} or {last}" if most else last


def rules_with(has: Callable[[RuleInfo], bool]) -> list[str]:
    """Names of the rules with a property."""
    return [name for name, info in RULES.items() if has(info)]


def rule_info(rule: str) -> RuleInfo:
    """The :class:`RuleInfo` of ``rule``. Raises ValueError for an unknown name."""
    try:
        return RULES[rule]
    except (KeyError, TypeError):
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}") from None


def weight_of(info: RuleInfo, given: float | None) -> float:
    """The weight of the spread that an op was called with: the rule's default for None."""
    return info.weight if given is None else float(given)


def format_id(index_format: str, rule: str) -> int:
    """The op library's number of ``index_format``. Raises ValueError for an unknown one, or one without the rule."""
    try:
        number = INDEX_FORMATS[index_format]
    except (KeyError, TypeError):
        raise ValueError(f"index_format: expected one of {', '.join(INDEX_FORMATS)}, got {index_format!r}") from None
    if index_format == "compressed" and not rule_info(rule).compressible:
        allowed = choices(rules_with(lambda info: info.compressible))
        raise ValueError(f"rule: expected {allowed} for a compressed index, got {rule!r}")
    return number
