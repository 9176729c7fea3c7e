"""The ways to estimate which blocks matter in prefill, as the ops take them."""

from __future__ import annotations

from dataclasses import dataclass

from unique_attn.rules import rule_info, weight_of

_AGGREGATES = ("mean", "max")  # Aggregate of csrc/core/prefill/composite_blocks.h


@dataclass(frozen=True)
class PrefillMethod:
    """An estimate, and the selection that it comes with."""

    rule: str  #: how a pooled query scores a page
    pools_heads: bool  #: whether queries are pooled over the heads of a group too
    aggregate: str  #: ``mean`` or ``max`` of the shares that the pooled queries of a block give
    threshold: float | None = None  #: selection where a call says nothing
    top_p: float | None = None  #: likewise


#: By name: ``directional`` (ours) and ``unisparse`` (the paper's composite tokens).
PREFILL_METHODS: dict[str, PrefillMethod] = {
    "directional": PrefillMethod("directional", pools_heads=False, aggregate="max", threshold=0.005),
    "unisparse": PrefillMethod("mean", pools_heads=True, aggregate="mean", top_p=0.95),
}


def prefill_method(op: str, method: str) -> PrefillMethod:
    """The method of a name. Raises ValueError for an unknown one."""
    try:
        return PREFILL_METHODS[method]
    except (KeyError, TypeError):
        raise ValueError(f"{op}: method: expected one of {', '.join(PREFILL_METHODS)}, got {method!r}") from None


def method_options(op: str, method: str, spread_weight: float | None) -> tuple[int, bool, int, float]:
    """rule, pools_heads, aggregate and spread_weight as the ops take them.

    Raises:
        ValueError: an unknown method, or a ``spread_weight`` for one that has no spread.
    """
    known = prefill_method(op, method)
    info = rule_info(known.rule)
    if spread_weight is not None and not info.weight_name:
        raise ValueError(f"{op}: spread_weight: expected None with method {method!r}, got {spread_weight!r}")
    return info.id, known.pools_heads, _AGGREGATES.index(known.aggregate), weight_of(info, spread_weight)


def selection_of(method: str, threshold: float | None, top_p: float | None) -> tuple[float | None, float | None]:
    """Threshold and top-p of a call: the method's own where it says neither."""
    if threshold is None and top_p is None:
        return PREFILL_METHODS[method].threshold, PREFILL_METHODS[method].top_p
    return threshold, top_p
