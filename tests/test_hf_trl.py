"""TRL's SFTTrainer on an enabled model: every layer and step has the training mask, and packing changes nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_helpers import VOCAB, prompt, tiny
from hf_training_cases import PACED, SMALL

import unique_attn as ua
from unique_attn.hf import training

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LENGTHS = [70, 45, 60, 31]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """Mode and sequence bounds of every call of the training attention."""
    found: list[tuple[str, list[int]]] = []
    real = training.masked_attention

    def spy(q: Any, k: Any, v: Any, cu_seqlens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append((kwargs["mode"], cu_seqlens.tolist()))
        return real(q, k, v, cu_seqlens, *args, **kwargs)

    monkeypatch.setattr(training, "masked_attention", spy)
    return found


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<bos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<bos>")


def documents() -> list[torch.Tensor]:
    return [prompt(1, n, seed=n)["input_ids"] for n in LENGTHS]


def sft(folder: Any, model: Any, **kwargs: Any) -> Any:
    """One that reads all documents in every step."""
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "max_length": 256, "learning_rate": 0.0, "lr_scheduler_type": "constant",
        "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, "loss_type": "nll",
    }  # fmt: skip
    data = datasets.Dataset.from_list([{"input_ids": row[0].tolist()} for row in documents()])
    args = trl.SFTConfig(str(folder), **{**settings, **kwargs})
    return trl.SFTTrainer(
        model, args, train_dataset=data, processing_class=tokenizer(), callbacks=[ua.SparsityCallback(model)]
    )


def logged(run: Any, name: str) -> list[float]:
    return [each[name] for each in run.state.log_history if name in each]


def loss_alone(model: Any) -> float:
    """Mean loss of a token, every document by itself."""
    with torch.no_grad():
        sums = [(n - 1) * float(model(row, labels=row, use_cache=False).loss) for n, row in zip(LENGTHS, documents())]
    return sum(sums) / sum(n - 1 for n in LENGTHS)


PACKINGS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "per_device_train_batch_size": 1},  # best fit: one row of 206 tokens
}


@pytest.mark.parametrize(
    ("packing", "checkpointing"), [("padded", False), ("padding-free", False), ("packed", False), ("packed", True)]
)
def test_every_layer_has_the_training_mask(tmp_path, calls, packing, checkpointing):
    model = ua.enable(tiny(), SMALL, train=PACED).train()
    expected = {}
    for progress in (0.0, 0.5):
        training.train_state(model).update(progress)
        expected[progress] = loss_alone(model)
    calls.clear()
    run = sft(tmp_path, model, gradient_checkpointing=checkpointing, **PACKINGS[packing])
    run.train()
    layers = len(model.model.layers) * (2 if checkpointing else 1)
    assert [mode for mode, _ in calls] == ["soft"] * layers + ["hard"] * layers
    for _, bounds in calls:
        lengths = sorted(end - start for start, end in pairwise(bounds))
        assert lengths == ([70] * 4 if packing == "padded" else sorted(LENGTHS))
    assert logged(run, "sparsity_tau") == [4.0, 1.0]
    assert logged(run, "sparsity_mode") == [1, 2]
    # Earlier Trainers count the first token of a padded row, which has no loss.
    earlier = packing == "padded" and int(transformers.__version__.split(".")[0]) < 5
    share = sum(n - 1 for n in LENGTHS) / sum(LENGTHS) if earlier else 1
    assert logged(run, "loss") == pytest.approx([share * each for each in expected.values()], rel=1e-3)
    assert abs(expected[0.0] - loss_alone(tiny().train())) > 0.01


def test_lora(tmp_path, calls):
    peft = pytest.importorskip("peft")
    model = ua.enable(tiny(), SMALL, train=PACED)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = sft(tmp_path, peft.get_peft_model(model, config), packing=True, learning_rate=1e-2, max_steps=4)
    run.train()
    assert [mode for mode, _ in calls] == ["soft"] * 6 + ["hard"] * 6
    assert all(norm > 0 for norm in logged(run, "grad_norm"))
    assert logged(run, "loss")[1] < logged(run, "loss")[0]
