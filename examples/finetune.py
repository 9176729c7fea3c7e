"""Fine-tune a model for a small budget with the soft page mask, and measure what that buys.

python examples/finetune.py --seeds 0 1 2    # SmolLM2-135M-Instruct on text that Python has: 3 minutes on an H100
python examples/finetune.py --tau 1 4 16     # which temperature?
python examples/finetune.py --text a.txt b.txt --method lora --save tuned  # your text, and keep the model
python examples/finetune.py --length 512 --budget 32 --batch 2 --steps 20 --eval-prompts 16  # 15 minutes on a CPU core

Three models are measured, each densely and with page-sparse attention at --budget: the model as it came, the model
fine-tuned with dense attention, and the model fine-tuned with the page mask on the same data. So what training for
sparsity adds can be told from what training on the task adds. `train` is all that your own script needs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `examples`, where this is run as a file

import unique_attn
from examples.finetuning import (
    Evaluation,
    offline_documents,
    plot,
    read_documents,
    summarize,
    table,
    token_nll,
    tokenize,
    training_data,
    variant,
)
from examples.support.models import SMOLLM2, SMOLLM2_NAME, load_model
from examples.support.results import DTYPES, environment, write_json
from unique_attn import TrainConfig, UniqueConfig, _command
from unique_attn.train_config import SCHEDULES

LEARNING_RATE = {"full": 1e-4, "lora": 1e-3}


def train(
    model: Any,
    data: Sequence[dict[str, Tensor]],
    config: UniqueConfig,
    how: TrainConfig | None,
    options: Any,
    seed: int,
) -> tuple[Any, list[dict[str, float]]]:
    """Train ``model`` in place on ``data``, densely if ``how`` is None.

    Returns:
        The model with its new weights merged, and what the Trainer logged.
    """
    from transformers import Trainer, TrainingArguments

    class WeightedTrainer(Trainer):
        """The loss is a mean over tokens weighted by ``weights``, so that few answers count among much prose."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
            output = model(input_ids=inputs["input_ids"], use_cache=False)
            nll = token_nll(output.logits, inputs["input_ids"])
            weights = inputs["weights"][:, 1:]
            loss = (nll * weights).sum() / weights.sum()
            return (loss, output) if return_outputs else loss

    callbacks: list[Any] = []
    if how is not None:
        unique_attn.enable(model, config, train=how)  # before PEFT wraps it or after: both work
        callbacks.append(unique_attn.SparsityCallback(model))
    if options.method == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            logging_steps=max(1, options.steps // 20),
            save_strategy="no",
            report_to=[],
            seed=seed,
            bf16=options.dtype == "bf16",  # autocast: the weights stay fp32
            fp16=options.dtype == "fp16",
            use_cpu=options.device == "cpu",
            disable_tqdm=options.quiet,
            remove_unused_columns=False,
        )
        trainer = WeightedTrainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.train()
    if options.method == "lora":
        model = model.merge_and_unload()
    return unique_attn.disable(model), trainer.state.log_history


def run(options: argparse.Namespace, config: UniqueConfig, hows: Sequence[TrainConfig]) -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    dtype = DTYPES[options.dtype]
    base, tokenizer = load_model(options.model, device=options.device, quiet=options.quiet)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", options.length)
    if options.length > limit:
        raise ValueError(f"--length: expected at most {limit}, what the model can read, got {options.length}")
    documents = read_documents(options.text) if options.text else offline_documents()
    sentences, held_out = tokenize(tokenizer, documents)
    evaluation = Evaluation.of(
        tokenizer, held_out, length=options.length, windows=options.eval_windows, prompts=options.eval_prompts,
        skipped=config.budget, batch=options.eval_batch,
    )  # fmt: skip

    def measure(weights: dict[str, Tensor], label: str) -> dict[str, Any]:
        """Of the model as it would be used: in ``dtype``, on its own."""
        model = copy.deepcopy(base).to(dtype)
        model.load_state_dict(weights)
        found = {}
        for name, each in (("dense", None), ("sparse", config)):
            with tqdm(total=evaluation.total, desc=f"{label}, measured {name}", disable=options.quiet) as bar:
                found[name] = evaluation.measure(model, each, bar.update)
        return found

    fields = ("method", "steps", "batch", "length", "lr", "retrieval_share", "answer_weight", "dtype", "seeds")
    result: dict[str, Any] = {
        "bench": "finetune",
        "model": SMOLLM2_NAME if options.model == SMOLLM2 else Path(options.model).name,
        "options": {name: getattr(options, name) for name in fields},
        "settings": config.to_dict(),
        "data": {
            "text": [Path(file).name for file in options.text] if options.text else "offline",
            "documents": len(documents),
            "training_tokens": sum(map(len, sentences)),
            "held_out_tokens": sum(map(len, held_out)),
            "windows": len(evaluation.windows),
            "prompts": len(evaluation.samples),
        },
        "environment": {**environment(torch.device(options.device)), "transformers": version("transformers")},
        "before": measure(base.state_dict(), "before"),
        "runs": [],
    }
    variants: list[TrainConfig | None] = [*([] if options.no_control else [None]), *hows]
    for seed in options.seeds:
        data = training_data(
            tokenizer, sentences, count=options.steps * options.batch, length=options.length, seed=seed,
            share=options.retrieval_share, weight=options.answer_weight,
        )  # fmt: skip
        for how in variants:
            described = None if how is None else how.to_dict()
            label = f"seed {seed}, {variant(described)}"
            if not options.quiet:
                print(label, file=sys.stderr)
            began = time.perf_counter()
            model, log = train(copy.deepcopy(base), data, config, how, options, seed)
            seconds = round(time.perf_counter() - began, 1)
            sides = measure(model.state_dict(), label)
            log = [each for each in log if "loss" in each]
            result["runs"].append({"seed": seed, "train": described, "seconds": seconds, **sides, "log": log})
            result["summary"] = summarize(result)
            write_json(result_file(options), result)  # a run that is stopped has lost little
            if options.save and how is not None:
                model.save_pretrained(options.save)
                tokenizer.save_pretrained(options.save)
    return result


def result_file(options: argparse.Namespace) -> Path:
    return Path(options.out) / "finetune.json"


def parser() -> argparse.ArgumentParser:
    how = TrainConfig()
    p = _command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    p.add_argument("--model", default=SMOLLM2, help="a Hugging Face id, a local folder, or smollm2 (the default)")
    p.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 text to train on; the last tenth is held out")
    p.add_argument("--method", default="full", choices=["full", "lora"])
    p.add_argument("--mode", default=how.mode, choices=["soft", "hard"], help="mask of the training (soft)")
    p.add_argument("--tau", type=float, nargs="+", default=[how.tau], help=f"temperatures to train with ({how.tau:g})")
    p.add_argument("--schedule", default=how.schedule, choices=SCHEDULES, help="way of tau (constant)")
    p.add_argument("--tau-end", type=float, help="tau at the end of the schedule")
    p.add_argument("--hard-after", type=float, help="share of the training from which on the mask is hard (never)")
    p.add_argument("--budget", type=int, default=128, help="tokens that a query reads per KV head (128)")
    p.add_argument("--page-size", type=int, default=8, help="tokens per page (8)")
    p.add_argument("--rule", default="directional", help="how pages are scored (directional)")
    p.add_argument("--steps", type=int, default=60, help="optimizer steps (60)")
    p.add_argument("--batch", type=int, default=4, help="sequences per step (4)")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence (2048)")
    p.add_argument("--lr", type=float, help=f"learning rate; by default {LEARNING_RATE}")
    p.add_argument("--retrieval-share", type=float, help="share of sequences with facts and questions; 0 with --text")
    p.add_argument("--answer-weight", type=float, default=10.0, help="weight of an answer's token in the loss (10)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    p.add_argument("--no-control", action="store_true", help="leave out the dense fine-tuning")
    p.add_argument("--eval-windows", type=int, default=14, help="windows of held-out prose (14)")
    p.add_argument("--eval-prompts", type=int, default=96, help="questions asked (96)")
    p.add_argument("--eval-batch", type=int, default=16, help="sequences measured at a time (16)")
    p.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", choices=list(DTYPES), help="of matrix products; fp32 on the CPU and bf16 on a GPU")
    p.add_argument("--out", default="out", help="folder for finetune.json and finetune.png (out)")
    p.add_argument("--save", metavar="FOLDER", help="keep the last model that was trained with the mask")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    return p


def check(options: argparse.Namespace) -> tuple[UniqueConfig, list[TrainConfig]]:
    """Fill in what depends on other options, and refuse what cannot work."""
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    options.lr = options.lr or LEARNING_RATE[options.method]
    if options.retrieval_share is None:
        options.retrieval_share = 0.0 if options.text else 1.0
    for name in ("steps", "batch", "eval_windows", "eval_prompts", "eval_batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if not 0 <= options.retrieval_share <= 1:
        raise ValueError(f"--retrieval-share: expected a share from 0 to 1, got {options.retrieval_share}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, since torch finds no GPU, got cuda")
    if options.device == "cuda" and torch.cuda.device_count() > 1:  # the Trainer would put the model on all of them
        raise ValueError("--device: expected one GPU, got several: choose with CUDA_VISIBLE_DEVICES=0")
    config = UniqueConfig(budget=options.budget, page_size=options.page_size, rule=options.rule)
    if options.length < 2 * options.budget:
        raise ValueError(
            f"--length: expected at least twice the budget of {options.budget} tokens, or little would be left out, "
            f"got {options.length}"
        )
    how: dict[str, Any] = {"mode": options.mode, "schedule": options.schedule, "tau_end": options.tau_end}
    how["hard_after"] = options.hard_after
    return config, [TrainConfig(tau=tau, **how) for tau in options.tau]


def _command_line(argv: Sequence[str]) -> None:
    options = parser().parse_args(argv)
    result = run(options, *check(options))
    print(table(result))
    written = [result_file(options)]
    try:
        written.append(plot(result, written[0].with_suffix(".png")))
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(f"Wrote {', '.join(map(str, written))}")


def main(argv: Sequence[str]) -> int:
    """Fine-tune, measure, and return the exit status."""
    return _command.run(lambda: _command_line(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
