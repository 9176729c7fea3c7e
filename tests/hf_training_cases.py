"""What the tests of training Hugging Face models share: settings, tiny models in training mode, a step of one."""

from __future__ import annotations

from typing import Any

import torch
from hf_helpers import prompt, tiny

import unique_attn as ua

SMALL = ua.UniqueConfig(page_size=4, budget=16, dense_below=0, block_size=16)
HUGE = ua.UniqueConfig(budget=512, dense_below=0)
SOFT = ua.TrainConfig(mode="soft", tau=2.0)
HARD = ua.TrainConfig(mode="hard")
PACED = ua.TrainConfig(tau=4.0, tau_end=1.0, schedule="exponential", hard_after=0.5)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def trained(family: str = "llama", config: ua.UniqueConfig = SMALL, how: ua.TrainConfig = SOFT, **kwargs: Any) -> Any:
    return ua.enable(tiny(family, **kwargs), config, train=how).train()


def ids(length: int, seed: int = 1, batch: int = 1) -> torch.Tensor:
    return prompt(batch, length, seed=seed)["input_ids"]


def step(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    model.zero_grad()
    inputs.setdefault("labels", inputs["input_ids"])
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
