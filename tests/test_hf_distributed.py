"""Training on several ranks equals training on one with the joint batch: DDP, FSDP2, accumulation, the Trainer.

Two processes run all scenarios once, with gloo on the CPU and with NCCL where there are two GPUs. Each rank saves what
it got; the tests compare. A rank that fails or hangs ends both: collectives and the wait for the processes time out.
"""

from __future__ import annotations

import datetime
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hf_helpers import prompt, tiny
from hf_training_cases import PACED, SMALL
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import unique_attn as ua
from unique_attn.hf import training

transformers = pytest.importorskip("transformers")

RANKS = 2
RANK_TIMEOUT = 120  # seconds that a rank waits for the other
TIMEOUT = 240  # seconds for all scenarios, below that of pytest
LENGTH = 48


# ---- Scenarios: what a rank computes, and the same in one process. ----


def model_for(device: torch.device, mode: str = "soft", tau: float = 2.0) -> Any:
    return ua.enable(tiny().to(device), SMALL, train=ua.TrainConfig(mode=mode, tau=tau)).train()


def batch(device: torch.device, rows: slice = slice(None), padded: bool = False, seed: int = 1) -> dict[str, Any]:
    """Rows of a batch of four; labels of padding do not count."""
    inputs = prompt(4, LENGTH, [9, 0, 0, 21] if padded else None, seed=seed)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs = {name: x[rows].to(device) for name, x in {**inputs, "labels": labels}.items()}
    counted = int((labels[:, 1:] != -100).sum())  # of the whole batch
    return {**inputs, "use_cache": False, "num_items_in_batch": torch.tensor(counted, device=device)}


def of_rank(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("_orig_mod.").removeprefix("module."): p.grad.cpu()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered if they are sharded."""
    full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: p.detach().cpu().clone() for name, p in full.items()}


def ddp(model: nn.Module, device: torch.device) -> nn.Module:
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def ddp_gradients(rank: int, device: torch.device, mode: str = "soft", padded: bool = False, **how: Any) -> Any:
    model = model_for(device, mode)
    if "reentrant" in how:
        model.gradient_checkpointing_enable({"use_reentrant": how["reentrant"]})
    model = ddp(model, device)
    if "backend" in how:
        model = torch.compile(model, backend=how["backend"])
    (RANKS * model(**batch(device, of_rank(rank), padded)).loss).backward()
    alone = {each: model_for(device, each) for each in (mode, "dense")}
    for each in alone.values():
        each(**batch(device, padded=padded)).loss.backward()
    return gradients(model), gradients(alone[mode]), gradients(alone["dense"])


def ddp_accumulation(rank: int, device: torch.device, folder: Path) -> Any:
    """Two micro-batches a rank, the first without communication, against one batch of all of them."""
    model, alone = ddp(model_for(device), device), {each: model_for(device, each) for each in ("soft", "dense")}
    with model.no_sync():
        (RANKS * model(**batch(device, of_rank(rank), seed=1)).loss).backward()
    (RANKS * model(**batch(device, of_rank(rank), seed=2)).loss).backward()
    for each in alone.values():
        for seed in (1, 2):
            each(**batch(device, seed=seed)).loss.backward()
    return gradients(model), gradients(alone["soft"]), gradients(alone["dense"])


def steps(model: nn.Module, device: torch.device, rows: slice = slice(None), ranks: int = 1) -> dict[str, torch.Tensor]:
    """Parameters after a soft step and a hard one."""
    state = training.train_state(model)
    assert state is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for progress in (0.0, 0.6):
        state.update(progress)
        (ranks * model(**batch(device, rows)).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def shard(model: Any, device: torch.device, **kwargs: Any) -> Any:
    mesh = init_device_mesh(device.type, (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def paced(device: torch.device) -> Any:
    return ua.enable(tiny().to(device), SMALL, train=PACED).train()


def fsdp_steps(
    rank: int, device: torch.device, checkpointed: bool = False, enabled_last: bool = False, backend: str | None = None
) -> Any:
    """``enabled_last``: the model is sharded before it is enabled. ``backend``: its layers are compiled first."""
    if enabled_last:
        model = ua.enable(shard(tiny().to(device), device), SMALL, train=PACED).train()
    else:
        model = paced(device)
        for layer in model.model.layers if backend else ():
            layer.compile(backend=backend)
        model = shard(model, device)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got = steps(model, device, of_rank(rank), RANKS)
    return got, steps(paced(device), device), steps(model_for(device, "dense"), device)


def fsdp_half(rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Logits with parameters gathered in bf16, and in fp32 on one process, of the soft mask and of dense attention."""
    inputs = batch(device, of_rank(rank))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(model_for(device), device, mp_policy=policy)
    out = model(**inputs)
    out.loss.backward()
    found = {"half": out.logits}
    found |= {mode: model_for(device, mode)(**inputs).logits for mode in ("soft", "dense")}
    return {name: x.detach().cpu().float() for name, x in found.items()}


def trainer_run(
    device: torch.device, folder: Path, per_device: int, **kwargs: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    rows = prompt(32, LENGTH)["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = transformers.TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=per_device, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=device.type == "cpu",
        learning_rate=1e-2, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", **kwargs,
    )  # fmt: skip
    if args.device.type == "cuda":
        args._n_gpu = 1  # no DataParallel where one process sees all GPUs
    run = transformers.Trainer(paced(device), args, train_dataset=data, callbacks=[ua.SparsityCallback()])
    run.train()
    names = ("sparsity_tau", "sparsity_mode", "loss")
    logs = {name: [each[name] for each in run.state.log_history if name in each] for name in names}
    state = training.train_state(run.model)
    assert state is not None
    logs["ends"] = [state.progress, state.tau, float(state.tau_on(device))]
    logs["ranks"] = [args.world_size]
    logs["sharded"] = [sum(isinstance(p, DTensor) for p in run.model.parameters())]
    return logs, whole(run.model)


def trainer_steps(rank: int, device: torch.device, folder: Path) -> Any:
    return trainer_run(device, folder / f"rank{rank}", 2)


def trainer_fsdp(rank: int, device: torch.device, folder: Path) -> Any:
    """Accelerate shards on GPUs only."""
    if device.type == "cpu":
        return None
    wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return trainer_run(device, folder / f"fsdp{rank}", 2, fsdp="full_shard auto_wrap", fsdp_config=wrap)


SCENARIOS: dict[str, Callable[..., Any]] = {
    "ddp soft": lambda rank, device, folder: ddp_gradients(rank, device),
    "ddp soft padded": lambda rank, device, folder: ddp_gradients(rank, device, padded=True),
    "ddp hard": lambda rank, device, folder: ddp_gradients(rank, device, "hard"),
    "ddp reentrant": lambda rank, device, folder: ddp_gradients(rank, device, reentrant=True),
    "ddp non-reentrant": lambda rank, device, folder: ddp_gradients(rank, device, reentrant=False),
    "ddp compiled": lambda rank, device, folder: ddp_gradients(rank, device, backend="aot_eager"),
    "ddp accumulation": ddp_accumulation,
    "fsdp": lambda rank, device, folder: fsdp_steps(rank, device),
    "fsdp checkpointed": lambda rank, device, folder: fsdp_steps(rank, device, checkpointed=True),
    "fsdp compiled": lambda rank, device, folder: fsdp_steps(rank, device, backend="aot_eager"),
    "fsdp enabled last": lambda rank, device, folder: fsdp_steps(rank, device, enabled_last=True),
    "fsdp bf16": lambda rank, device, folder: fsdp_half(rank, device),
    "trainer": trainer_steps,
    "trainer fsdp": trainer_fsdp,
}


# ---- Processes. ----


def attempt(run: Callable[..., Any], *args: Any) -> Any:
    """What a scenario returns, or the report of its error: others may still work."""
    try:
        return run(*args)
    except Exception:
        return traceback.format_exc()


def work(rank: int, folder: str, kind: str) -> None:
    """All scenarios on one rank; what it got goes into a file of its own."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # not used: the store is a file
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=RANK_TIMEOUT),
    )
    try:
        torch.save(
            {name: attempt(run, rank, device, Path(folder)) for name, run in SCENARIOS.items()}, f"{folder}/{rank}.pt"
        )
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """The kind of device, and what each rank got in each scenario."""
    pytest.importorskip("accelerate")
    kind = request.param
    if kind == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip(f"fewer than {RANKS} CUDA devices on this machine")
    folder = tmp_path_factory.mktemp(kind)
    processes = mp.spawn(work, args=(str(folder), kind), nprocs=RANKS, join=False)
    end = time.monotonic() + TIMEOUT
    try:
        while not processes.join(timeout=5):  # raises what a rank raised, and ends the other
            if time.monotonic() > end:
                pytest.fail(f"the ranks did not finish in {TIMEOUT} s")
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
    return kind, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def results_of(ranks: Any, scenario: str) -> list[Any]:
    results = [each[scenario] for each in ranks[1]]
    for result in results:
        if isinstance(result, str):
            pytest.fail(result)
    return results


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if "trainer" not in name and name != "fsdp bf16"])
def test_ranks_equal_one_process(ranks, scenario):
    close = {"rtol": 1e-3, "atol": 1e-4} if ranks[0] == "cpu" else {"rtol": 1e-2, "atol": 1e-3}
    for got, expected, dense in results_of(ranks, scenario):
        assert got.keys() == expected.keys() == dense.keys()
        assert got
        torch.testing.assert_close(got, expected, **close)
        assert any((expected[name] - dense[name]).abs().max() > 0.01 for name in dense)  # the mask is at work


def test_the_mask_is_at_work_under_fsdp_in_bf16(ranks):
    for logits in results_of(ranks, "fsdp bf16"):
        error = (logits["half"] - logits["soft"]).abs().mean()
        assert error < (logits["soft"] - logits["dense"]).abs().mean() / 4


@pytest.mark.parametrize("scenario", ["trainer", "trainer fsdp"])
def test_the_trainer_keeps_one_schedule(ranks, scenario, tmp_path):
    """Temperature and mode are the same on all ranks; the parameters are those of one process with the joint batch."""
    kind, (first, second) = ranks[0], results_of(ranks, scenario)
    if first is None:
        pytest.skip("accelerate shards on GPUs only")
    assert first[0]["ends"] == second[0]["ends"]
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)
    assert first[0]["sparsity_tau"] == pytest.approx([PACED.tau_at(step / 4) for step in range(4)])
    assert first[0]["sparsity_mode"] == [1, 1, 2, 2]
    logs, parameters = trainer_run(torch.device(kind, 0) if kind == "cuda" else torch.device(kind), tmp_path, 4)
    assert (first[0]["ranks"], logs["ranks"]) == ([RANKS], [1])
    assert first[0]["sharded"] == [len(parameters) if "fsdp" in scenario else 0]
    assert logs["sparsity_tau"] == first[0]["sparsity_tau"]
    assert logs["loss"] == pytest.approx(first[0]["loss"], rel=1e-3)
    assert first[1].keys() == parameters.keys()
    torch.testing.assert_close(first[1], parameters, rtol=1e-3, atol=1e-3)
