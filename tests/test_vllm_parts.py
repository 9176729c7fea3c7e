"""The parts of the backend for vLLM that need no vLLM; the rest is tested in tests_vllm/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unique_attn import UniqueConfig, ops
from unique_attn.vllm.layout import block_views, content_bytes
from unique_attn.vllm.settings import num_pages, read_settings

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"budgt": 512},
            ValueError,
            "additional_config['unique_attn']: UniqueConfig.from_dict: expected fields among ",
        ),
        ({"budget": 100}, ValueError, "UniqueConfig.budget: expected a multiple of page_size = 8, got 100"),
        ({"budget": "512"}, TypeError, "UniqueConfig.budget: expected an integer, got '512'"),
        ({"rule": "best"}, ValueError, "UniqueConfig.rule: expected one of"),
        (
            {"graphs": "off"},
            ValueError,
            "additional_config['unique_attn']['graphs']: expected vLLM's compilation_config",
        ),
        ({"block_size": 64}, ValueError, "['block_size']: expected vLLM's own argument block_size, got 64 here"),
        ({"max_decode_tokens": 8}, ValueError, "['max_decode_tokens']: expected speculative_config"),
        ({"dense_below": 10**9}, ValueError, "['dense_below']: expected at most "),
        ({"dense_layers": [3]}, ValueError, "['dense_layers']: expected layers from 0 to 2, got 3"),
        ([64], TypeError, "additional_config['unique_attn']: expected a mapping of fields of UniqueConfig, got [64]"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: Any, error: type[Exception], message: str):
    with pytest.raises(error) as raised:
        read_settings({"unique_attn": settings, "another plugin": 1}, num_layers=3)
    assert message in str(raised.value)


def test_settings_of_others_are_none_of_ours():
    assert read_settings({"another plugin": {"budget": 64}}) == read_settings(object())
    assert read_settings(object()) == UniqueConfig(max_decode_tokens=1)  # how many it is, the engine says
    assert num_pages(UniqueConfig(budget=64, dense_below=700)) == 88  # 699 tokens


@pytest.mark.parametrize("rule", ["directional", "unique", "minmax", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [4, 8, 64])
def test_the_parts_of_a_block_do_not_meet(rule: str, dtype: torch.dtype, page_size: int):
    """All that is written through one view is read through it alone; blocks of several layers side by side."""
    config, dim, shape = UniqueConfig(rule=rule, page_size=page_size, budget=512), 72, (3, 2, 2, 64)
    blocks, layers, heads, size = shape
    content = content_bytes(config, dim, dtype) // dtype.itemsize
    cache = torch.zeros((blocks, layers, heads, size, content), dtype=dtype)
    views = [block_views(cache[:, layer], config, dim) for layer in range(layers)]
    written = []
    for number, part in enumerate(part for view in views for part in (view.k, view.v, view.index)):
        part.fill_(number + 1)
        written.append(part)
    for number, part in enumerate(written):
        assert (part == number + 1).all()
    assert views[0].k.shape == (blocks, heads, size, dim)
    new = ops.new_index(views[0].k, rule=rule, page_size=page_size)
    assert new.shape == views[0].index.shape
    assert new.dtype == views[0].index.dtype


@pytest.mark.parametrize(("index_format", "share"), [("exact", 0.125), ("compressed", 0.027)])
def test_what_the_index_takes(index_format: str, share: float):
    """As the documentation says for D = 128, pages of 8 and 16-bit keys."""
    content = content_bytes(UniqueConfig(index_format=index_format), 128, torch.bfloat16)
    assert content / 512 - 1 == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (torch.zeros(2, 2, 64, 128), "cache: expected 144 elements per token and head"),
        (torch.zeros(2, 64, 2, 144).transpose(1, 2), "cache: expected the elements of a block and head in one run"),
        (torch.zeros(2, 2, 20, 144), "cache: expected blocks of whole pages of 8 tokens, got 20 tokens"),
    ],
)
def test_another_layout_is_refused(cache: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        block_views(cache, UniqueConfig(), 64)


def test_the_plugin_says_that_it_cannot_register():
    """In a process where vLLM is not there, or another than the one that is known."""
    code = """
import sys
sys.modules["vllm"] = None  # importing it fails
from unique_attn.vllm.plugin import register
register()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "unique_attn is not available in this vLLM" in done.stderr
