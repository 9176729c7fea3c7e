"""The table of rules: what the op library says, in the types that Python promises."""

from __future__ import annotations

import json

import pytest
import torch

from unique_attn import UniqueConfig, paging, rules


def test_facts_are_those_of_the_library():
    facts = {each["name"]: each for each in json.loads(torch.ops.unique_attn.build_info())["rules"]}
    assert list(facts) == list(rules.RULES)
    for name, info in rules.RULES.items():
        assert (info.spread_kind, info.weight, info.id) == tuple(facts[name][key] for key in ("spread", "weight", "id"))
        assert info.spread_kind in (None, "scalar", "vector")
        assert bool(info.weight_name) == bool(info.spread_kind)


def test_weights_are_floats():
    """JSON makes no difference between 2 and 2.0."""
    assert {type(info.weight) for info in rules.RULES.values()} == {float}
    assert rules.WEIGHTS == {"lambda_": 0.5, "c": 2.0}
    config = UniqueConfig()
    assert (type(config.c), type(config.lambda_)) == (float, float)
    assert '"c": 2.0' in json.dumps(config.to_dict())
    for rule in rules.RULES:
        assert type(UniqueConfig(rule=rule, c=3, lambda_=1).spread_weight) is float
        assert type(rules.weight_of(rules.rule_info(rule), None)) is float


def test_the_storage_has_the_limits_of_the_library():
    """The reason why a layer stays dense."""
    q, k = torch.zeros(1, 8, 1, 64), torch.zeros(1, 8, 1, rules.MAX_HEAD_DIM + 8)
    assert paging.unsupported(q, q, q) is None
    assert f"up to {rules.MAX_HEAD_DIM}" in str(paging.unsupported(k, k, k))
    many = torch.zeros(1, 8 * (rules.MAX_GROUP + 1), 1, 64)
    assert f"groups of up to {rules.MAX_GROUP}" in str(paging.unsupported(many, q, q))


def test_unknown_names():
    with pytest.raises(ValueError, match=r"rule: expected one of mean, unique, directional, minmax.*, got 'quest'"):
        rules.rule_info("quest")
    with pytest.raises(ValueError, match="index_format: expected one of exact, compressed, got 'packed'"):
        rules.format_id("packed", "mean")
