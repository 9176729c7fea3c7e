"""Every Python block of the README runs as it is written, on the CPU and with a tiny random model."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = {match[1]: match for match in re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)}
OPS, DROP_IN, GRAPHED, TRAINING = "import torch\n", "import unique_attn\n", "decoder = ", "unique_attn.enable("


def block(beginning: str) -> str:
    (found,) = [code for code in BLOCKS if code.startswith(beginning)]
    return found


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute a block; its lines have the README's numbers in a traceback."""
    before = README.count("\n", 0, BLOCKS[code].start(1))
    exec(compile("\n" * before + code, "README.md", "exec"), names)
    return names


def test_every_block_is_run():
    assert {block(each) for each in (OPS, DROP_IN, GRAPHED, TRAINING)} == set(BLOCKS)


def test_ops():
    found = run(block(OPS), {})
    assert found["pages"].shape == (2, 1, 2, 16)
    assert found["q"].grad.abs().sum() > 0
    assert found["k"].grad.abs().sum() > 0


@pytest.fixture
def model() -> Any:
    pytest.importorskip("transformers")
    from hf_helpers import SHAPE
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1, "max_position_embeddings": 4096})).eval()


def test_drop_in(model: Any):
    ids = torch.randint(2, 97, (2, 600))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = run(block(DROP_IN), {"model": model, "inputs": inputs})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about both a given length and one of its defaults
        found = run(block(GRAPHED), found)
    assert found["tokens"].shape == (2, 800)


def test_training(model: Any, tmp_path: Path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    import unique_attn

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 97, (4, 600))]
    settings = {"max_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "per_device_train_batch_size": 2}
    args = TrainingArguments(str(tmp_path), **settings)
    names = {"unique_attn": unique_attn, "model": model, "Trainer": Trainer, "args": args, "data": data}
    trainer = run(block(TRAINING), names)["trainer"]
    assert trainer.train().training_loss > 0
    assert any("sparsity_mass_kept" in line for line in trainer.state.log_history)
