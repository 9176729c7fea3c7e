"""Static caches on a GPU, where transformers compiles the steps by itself and captures them in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from hf_helpers import SMALL, assert_same, generate, prompt, tiny
from transformers.cache_utils import StaticLayer

import unique_attn as ua
from unique_attn.hf.static_layer import UniqueStaticLayer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(
        not hasattr(StaticLayer(8), "cumulative_length"),
        reason="transformers 4 counts the tokens of a static cache elsewhere",
    ),
]


GRAPHS = {"llama": 1, "gemma3": 2}  # as stock: its sliding layers make two, before and after they are full


@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["even", "padded"])
@pytest.mark.parametrize("family", GRAPHS)
def test_compiled_steps_are_captured_on_cuda(family, padding):
    """As few compiled graphs as stock for all lengths, and inductor leaves no step out of its CUDA graphs."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = ua.enable(tiny(family).cuda(), SMALL)
    graphs = GRAPHS[family]
    for number, length in enumerate((60, 40)):
        inputs = {name: part.cuda() for name, part in prompt(length=length, padding=padding).items()}
        expected = generate(model, inputs, max_length=80, tokens=None)
        output = generate(model, inputs, max_length=80, tokens=None, cache_implementation="static")
        assert_same(output, expected)
        assert any(isinstance(layer, UniqueStaticLayer) and layer.indexed for layer in output.past_key_values.layers)
        assert counters["stats"]["unique_graphs"] == graphs, f"call {number}"
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not counters["graph_break"]
