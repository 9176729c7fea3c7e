"""How enabled models are trained: checkpointing, autocast, PEFT, torch.compile, and the Trainer with its callback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_helpers import prompt, run_and_collect, tiny
from hf_training_cases import CLOSE, PACED, SMALL, ids, step, trained

import unique_attn as ua
from unique_attn.hf import training

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    tokens = prompt(2, 60, [9, 0])
    loss, grads = step(trained(), **tokens)
    model = trained()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got, got_grads = step(model, **tokens)
    torch.testing.assert_close((got, got_grads), (loss, grads), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast(family):
    ua.hf.compat._warned.clear()
    model, tokens = trained(family), ids(60)
    exact = model(tokens).logits

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(tokens).logits

    logits, messages = run_and_collect(run)
    assert not messages
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(logits.float(), exact, dim=-1).mean() > 0.95
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_peft_lora():
    peft = pytest.importorskip("peft")
    tokens = ids(60)
    expected, _ = step(trained(), input_ids=tokens)
    model = peft.get_peft_model(trained(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    loss, grads = step(model.train(), input_ids=tokens)
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert training.train_state(model) is not None
    assert all("lora" in name for name in grads)
    assert any(grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("padding", [None, [9, 0]])
def test_compile(padding):
    torch._dynamo.reset()
    model, tokens = trained("llama-mha", how=PACED), prompt(2, 40, padding)
    if padding is None:
        tokens.pop("attention_mask")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    one_graph = padding is None and version >= (5, 23)  # earlier ones give compiled models a mask, which is looked at
    compiled = torch.compile(model, backend="aot_eager" if padding is None else "eager", fullgraph=one_graph)
    step(compiled, **tokens, use_cache=padding is None)
    training.train_state(model).update(0.25)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss, grads = step(compiled, **tokens, use_cache=padding is None)
    expected, expected_grads = step(model, **tokens, use_cache=False)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(list(grads.values()), list(expected_grads.values()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["packed", "checkpointed", "autocast"])
def test_compile_with(how):
    torch._dynamo.reset()
    model, plain = trained("llama-mha"), trained("llama-mha")
    inputs: dict[str, Any] = {"input_ids": ids(48), "use_cache": False}
    if how == "packed":
        bounds = torch.tensor([0, 20, 48], dtype=torch.int32)
        inputs["position_ids"] = torch.cat([torch.arange(20), torch.arange(28)])[None]
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 28, "max_length_k": 28}
    if how == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss, grads = step(torch.compile(model, backend="aot_eager"), **inputs)
        expected, expected_grads = step(plain, **inputs)
    close = {"rtol": 5e-2, "atol": 5e-2} if how == "autocast" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(list(grads.values()), list(expected_grads.values()), **close)
    _, dense_grads = step(trained("llama-mha", how=ua.TrainConfig(mode="dense")), **inputs)
    assert any((grads["_orig_mod." + name] - grad).abs().max() > 0.1 for name, grad in dense_grads.items())


# ---- Trainer. ----


def trainer(folder: Any, model: Any, **kwargs: Any) -> Any:
    pytest.importorskip("accelerate")
    settings = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
    settings |= {"logging_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3}
    data = [{"input_ids": row, "labels": row} for row in ids(48, batch=8)]
    args = transformers.TrainingArguments(str(folder), save_only_model=False, **{**settings, **kwargs})
    return transformers.Trainer(model, args, train_dataset=data, callbacks=[ua.SparsityCallback()])


def logged(run: Any, name: str) -> list[float]:
    return [each[name] for each in run.state.log_history if name in each]


def test_trainer_and_resume(tmp_path):
    model = trained(how=PACED)
    run = trainer(tmp_path, model)
    run.train()
    state = training.train_state(model)
    assert (state.mode, state.progress) == ("hard", 7 / 8)
    assert logged(run, "sparsity_mode") == [1, 1, 2, 2]
    assert logged(run, "sparsity_tau") == pytest.approx([PACED.tau_at(s / 8) for s in (1, 3, 5, 7)])
    assert all(0 <= share <= 1 for name in ("gate_mean", "gate_open_share", "mass_kept")
               for share in logged(run, f"sparsity_{name}"))  # fmt: skip
    assert len(logged(run, "sparsity_gate_mean")) == 4
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]
    assert all(norm > 0 for norm in logged(run, "grad_norm"))

    again = trainer(tmp_path, trained(how=PACED))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(again, "sparsity_tau")[-3:] == logged(run, "sparsity_tau")[-3:]
    assert logged(again, "sparsity_mode")[-2:] == [2, 2]
    assert logged(again, "loss")[-1] == pytest.approx(logged(run, "loss")[-1], rel=1e-3)


def test_gradient_accumulation_changes_nothing(tmp_path):
    """Micro-batches of 1, 2 and 4 rows: one temperature for each optimizer step, and the same parameters."""
    runs = []
    for rows in (1, 2, 4):
        run = trainer(
            tmp_path / str(rows), trained(how=PACED), max_steps=4, per_device_train_batch_size=rows,
            gradient_accumulation_steps=4 // rows, logging_steps=1, save_strategy="no", optim="sgd", learning_rate=0.01,
        )  # fmt: skip
        run.train()
        runs.append(run)
    assert logged(runs[0], "sparsity_mode") == [1, 1, 2, 2]
    for run in runs[1:]:
        assert logged(run, "sparsity_tau") == logged(runs[0], "sparsity_tau")
        assert logged(run, "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-3)
        torch.testing.assert_close(run.model.state_dict(), runs[0].model.state_dict(), rtol=1e-3, atol=1e-4)


def test_callback_needs_an_enabled_model(tmp_path):
    with pytest.raises(ValueError, match=r"SparsityCallback: expected a model from unique_attn.enable"):
        trainer(tmp_path, ua.enable(tiny(), SMALL), max_steps=1).train()
    with pytest.raises(ValueError, match="got LlamaForCausalLM that is not enabled for training"):
        ua.SparsityCallback(tiny())
    with pytest.raises(TypeError, match="SparsityCallback: expected a model, got int"):
        ua.SparsityCallback(3)  # type: ignore[arg-type]
