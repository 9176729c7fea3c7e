"""Models whose steps are captured, and how often they are, for the tests of captured steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_helpers import SMALL, prompt, tiny

pytest.importorskip("transformers")

import unique_attn as ua
from unique_attn.hf import captured, step_graph

OFF = ua.UniqueConfig.from_dict({**SMALL.to_dict(), "graphs": "off"})


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts captured steps: [made, run]. On the CPU they are the same steps, run as they are."""
    counts = [0, 0]
    make, run = step_graph.StepGraph.__init__, step_graph.StepGraph.run

    def counted_make(self: Any, *args: Any) -> None:
        make(self, *args)
        counts[0] += 1

    def counted_run(self: Any, *args: Any) -> None:
        counts[1] += 1
        run(self, *args)

    for module in (captured, ua.hf.layer):
        monkeypatch.setattr(module, "CAPTURES", ("cuda", "cpu"))
    monkeypatch.setattr(captured, "_said", set())
    monkeypatch.setattr(step_graph.StepGraph, "__init__", counted_make)
    monkeypatch.setattr(step_graph.StepGraph, "run", counted_run)
    return counts


def on(device: str, family: str = "llama", config: ua.UniqueConfig = SMALL) -> Any:
    model = ua.enable(tiny(family).to(device), config).eval()
    if family == "gpt-oss" and device == "cuda":  # products of groups in fp32 copy their offsets to the host
        model.set_experts_implementation("batched_mm")
    return model


def inputs_on(device: str, batch: int = 2, length: int = 20, padding: list[int] | None = None) -> dict[str, Any]:
    return {name: x.to(device) for name, x in prompt(batch, length, padding).items()}


def generated(model: Any, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(**inputs, **settings)


def uncaptured(model: Any, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    config = ua.hf.hooks.hook_of(ua.hf.hooks.attention_modules(model)[0]).config
    ua.enable(model, ua.UniqueConfig.from_dict({**config.to_dict(), "graphs": "off"}))
    try:
        return generated(model, inputs, **settings)
    finally:
        ua.enable(model, config)
