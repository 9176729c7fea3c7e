"""Training of enabled models on a GPU: the same as on the CPU, for every layout of a batch."""

from __future__ import annotations

import pytest
import torch
from hf_helpers import prompt, tiny
from hf_training_cases import SMALL
from op_cases import needs_cuda

import unique_attn as ua
from unique_attn.hf import training

pytestmark = needs_cuda

PLACES = torch.cat([torch.arange(n) for n in (31, 50, 15)])[None]
BOUNDS = torch.tensor([0, 31, 81, 96], dtype=torch.int32)
PACKED = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 50, "max_length_k": 50}


def run(device: str, mode: str, inputs: dict[str, torch.Tensor | int]) -> tuple[torch.Tensor, list[torch.Tensor], dict]:
    how = ua.TrainConfig(mode=mode, tau=2.0)
    model = ua.enable(tiny().to(device), SMALL, train=how).train()
    state = training.train_state(model)
    state.collect = True
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach().cpu(), [p.grad.cpu() for p in model.parameters()], state.statistics()


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("layout", ["even", "left", "positions", "bounds"])
def test_training_equals_the_cpu(mode, layout):
    inputs = prompt(2, 60, [9, 0]) if layout == "left" else {"input_ids": prompt(1, 96)["input_ids"]}
    inputs |= {"positions": {"position_ids": PLACES}, "bounds": {"position_ids": PLACES, **PACKED}}.get(layout, {})
    loss, grads, statistics = run("cuda", mode, inputs)
    expected, expected_grads, expected_statistics = run("cpu", mode, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-2, atol=1e-3)
    assert statistics == pytest.approx(expected_statistics, rel=1e-2)
