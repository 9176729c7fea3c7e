"""Every Python block of the README and of docs/ runs as it is written, on the CPU and with a tiny random model."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_CODE = [str(page.relative_to(ROOT)) for page in PAGES if BLOCK.search(page.read_text("utf-8"))]


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute the blocks of a page one after another, as a reader would; lines have its numbers in a traceback."""
    text = (ROOT / page).read_text("utf-8")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Both `max_new_tokens`")  # of transformers, which logs it, too
        for block in BLOCK.finditer(text):
            before = text.count("\n", 0, block.start(1))
            exec(compile("\n" * before + block[1], page, "exec"), names)
    return names


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the pages take as given: a model, inputs, and what a Trainer needs."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from hf_helpers import SHAPE
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    ids = torch.randint(2, 97, (2, 600))
    settings = {"max_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "per_device_train_batch_size": 2}
    return {
        "model": model,
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "Trainer": Trainer,
        "args": TrainingArguments(str(tmp_path), **settings),
        "data": [{"input_ids": row, "labels": row} for row in torch.randint(2, 97, (4, 600))],
    }


def test_pages_have_code():
    assert {"README.md", "docs/support.md", "docs/training.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_runs(page: str, names: dict[str, Any]):
    found = run(page, names)
    if page == "README.md":
        assert found["pages"].shape == (2, 1, 2, 16)
        assert found["q"].grad.abs().sum() > 0
        assert found["k"].grad.abs().sum() > 0
        assert len(found["records"]) == 19  # the prompt is read once and gives the first of 20 tokens
    if "tokens" in found:
        assert found["tokens"].shape == (2, 800)
    if "trainer" in found:
        trainer = found["trainer"]
        assert trainer.train().training_loss > 0
        assert any("sparsity_mass_kept" in line for line in trainer.state.log_history)
