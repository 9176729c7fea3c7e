"""UniqueConfig: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses
import json

import pytest

from unique_attn import UniqueConfig, ops
from unique_attn.prefill_methods import PREFILL_METHODS


def test_defaults():
    config = UniqueConfig()
    assert (config.rule, config.page_size, config.budget, config.num_pages) == ("directional", 8, 512, 64)
    assert config.dense_limit == 512
    assert UniqueConfig(dense_below=0).dense_limit == 0
    assert config.spread_weight == 2.0
    assert UniqueConfig(rule="unique", lambda_=0.3).spread_weight == 0.3
    assert UniqueConfig(rule="mean").spread_weight == 0.0
    assert (config.prefill, config.threshold, config.top_p, config.prefill_above) == ("dense", None, None, 8192)


def test_rules_are_those_of_the_ops():
    for rule, info in ops.RULES.items():
        config = UniqueConfig(rule=rule)
        assert config.spread_weight == info.weight
        if hasattr(config, info.weight_name):
            assert dataclasses.replace(config, **{info.weight_name: 7.5}).spread_weight == 7.5


def test_frozen_hashable_and_equal():
    config = UniqueConfig(dense_layers=[3, 1, 3])
    assert config == UniqueConfig(dense_layers=(1, 3))
    assert len({config, UniqueConfig(dense_layers=(1, 3))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 8
    assert dataclasses.replace(config, budget=64).num_pages == 8


def test_round_trip_through_json():
    config = UniqueConfig(rule="minmax", budget=256, dense_below=0, dense_layers=(0, 5), c=1.5)
    assert UniqueConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert UniqueConfig.from_dict({"budget": 64}) == UniqueConfig(budget=64)
    for prefill in ({"prefill": "directional", "threshold": 0.0}, {"prefill": "unisparse", "top_p": 1}):
        config = UniqueConfig(**prefill, prefill_above=0)
        assert UniqueConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_that_were_saved_before_there_was_sparse_prefill():
    values = UniqueConfig(budget=64).to_dict()
    old = {name: value for name, value in values.items() if name not in ("prefill", "threshold", "top_p")}
    del old["prefill_above"]
    assert UniqueConfig.from_dict(old) == UniqueConfig(budget=64)


VALUE_ERRORS = {
    "rule": ("quest", f"expected one of {', '.join(ops.RULES)}, got 'quest'"),
    "page_size": (12, "expected one of 4, 8, 16, 32, 64, got 12"),
    "budget": (100, "expected a multiple of page_size = 8, got 100"),
    "sink_pages": (-1, "expected at least 0, got -1"),
    "recent_pages": (-2, "expected at least 0, got -2"),
    "lambda_": (float("nan"), "expected a finite number of at least 0, got nan"),
    "c": (-0.5, "expected a finite number of at least 0, got -0.5"),
    "block_size": (20, "expected a multiple of page_size = 8, got 20"),
    "index_format": ("packed", "expected one of exact, compressed, got 'packed'"),
    "dense_below": (-1, "expected at least 0, got -1"),
    "dense_layers": ((0, -1), "expected layer indices of at least 0, got -1"),
    "max_decode_tokens": (0, "expected at least 1, got 0"),
    "prefill": ("sparse", f"expected one of dense, {', '.join(PREFILL_METHODS)}, got 'sparse'"),
    "threshold": (1.01, "expected a share from 0 to 1, got 1.01"),
    "top_p": (float("inf"), "expected a finite number of at least 0, got inf"),
    "prefill_above": (-1, "expected at least 0, got -1"),
}
TYPE_ERRORS = {
    "page_size": ("8", "expected an integer, got '8'"),
    "budget": (512.0, "expected an integer, got 512.0"),
    "sink_pages": (True, "expected an integer, got True"),
    "lambda_": ("0.5", "expected a number, got '0.5'"),
    "c": (None, "expected a number, got None"),
    "dense_below": (1.5, "expected an integer, got 1.5"),
    "dense_layers": (3, "expected a tuple of layer indices, got 3"),
    "threshold": ("0.1", "expected a number, got '0.1'"),
    "top_p": (True, "expected a number, got True"),
    "prefill_above": (8192.0, "expected an integer, got 8192.0"),
}


@pytest.mark.parametrize("field", VALUE_ERRORS)
def test_bad_values(field):
    value, message = VALUE_ERRORS[field]
    with pytest.raises(ValueError, match=f"^UniqueConfig.{field}: ") as caught:
        UniqueConfig(**{field: value})
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("field", TYPE_ERRORS)
def test_bad_types(field):
    value, message = TYPE_ERRORS[field]
    with pytest.raises(TypeError, match=f"^UniqueConfig.{field}: ") as caught:
        UniqueConfig(**{field: value})
    assert str(caught.value).endswith(message)


def test_several_tokens_at_once_always_read_their_own_page():
    """Its entry is made of the tokens behind a token, too."""
    message = "recent_pages: expected at least 1 with max_decode_tokens above 1.*, got 0 with 32"
    with pytest.raises(ValueError, match=message):
        UniqueConfig(recent_pages=0)
    assert UniqueConfig(recent_pages=0, max_decode_tokens=1).recent_pages == 0


def test_budgets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"budget: expected room for sink_pages \+ recent_pages = 3 pages of 8 tokens"):
        UniqueConfig(budget=16, sink_pages=2)
    with pytest.raises(ValueError, match="budget: expected at most 4096 pages of 4 tokens, got 16388"):
        UniqueConfig(page_size=4, budget=16388)
    with pytest.raises(ValueError, match="budget: expected at least 1, got 0"):
        UniqueConfig(budget=0)


def test_settings_of_prefill_that_do_not_fit():
    with pytest.raises(ValueError, match=r"UniqueConfig\.top_p: expected None with a threshold, got 0\.9"):
        UniqueConfig(prefill="unisparse", threshold=0.1, top_p=0.9)
    for name in ("threshold", "top_p"):
        with pytest.raises(ValueError, match=rf"UniqueConfig\.{name}: expected None with prefill 'dense', got 0\.5"):
            UniqueConfig(**{name: 0.5})
        with pytest.raises(
            ValueError, match=rf"UniqueConfig\.{name}: expected a finite number of at least 0, got -0\.5"
        ):
            UniqueConfig(prefill="directional", **{name: -0.5})


def test_minmax_has_no_compressed_index():
    assert UniqueConfig(index_format="compressed", rule="unique").index_format == "compressed"
    with pytest.raises(
        ValueError, match=r"UniqueConfig\.index_format: expected exact with rule 'minmax', got 'compressed'"
    ):
        UniqueConfig(index_format="compressed", rule="minmax")


def test_from_dict_refuses():
    with pytest.raises(ValueError, match="got budgets"):
        UniqueConfig.from_dict({"budgets": 5})
    with pytest.raises(TypeError, match="expected a mapping, got list"):
        UniqueConfig.from_dict([1])
    with pytest.raises(ValueError, match=r"UniqueConfig\.budget"):
        UniqueConfig.from_dict({"budget": 5})
