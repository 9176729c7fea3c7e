"""Engines, prompts and answers."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

VOCAB = 512
MAX_LEN = 4096
FULL = 4096  # a budget that covers every context here

Prompt = list[int]


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]  # of the tokens; empty if they were not asked for


def sparse(**settings: Any) -> dict[str, Any]:
    """Arguments of an engine with the backend."""
    return {"attention_config": {"backend": "CUSTOM"}, "additional_config": {"unique_attn": settings}}


@contextmanager
def engine(model: Path, *, own_process: bool = False, **options: Any) -> Iterator[Any]:
    """An ``LLM``, eager, which counts what it does; in this process, or in processes of its own, which take 15 seconds
    to start.

    vLLM's n-gram speculation needs those: once it has imported numba, no other engine starts in the same process.
    """
    from vllm import LLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))

    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 1024,
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(str(model), **defaults | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        del llm
        gc.collect()


def prompts(*lengths: int, seed: int = 0) -> list[Prompt]:
    """Random prompts of so many tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


def sampling(max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, detokenize=False, ignore_eos=True, **{"temperature": 0, **options})


def answers(llm: Any, asked: Sequence[Prompt], params: Any) -> list[Answer]:
    """Of one batch; ``params`` for all, or a list with those of each."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
    found = []
    for output in outputs:
        (out,) = output.outputs
        tokens = list(out.token_ids)
        found.append(Answer(tokens, [at[t].logprob for t, at in zip(tokens, out.logprobs or [])]))
    return found


def counted(llm: Any, name: str) -> float:
    """A counter of the engine, such as ``num_preemptions``."""
    (value,) = [metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}"]
    return float(value)


def dropped_in(model: Path, asked: Sequence[Prompt], max_tokens: int, **settings: Any) -> list[list[int]]:
    """Greedy tokens of the Hugging Face drop-in with these settings, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    import unique_attn

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    unique_attn.enable(hf, unique_attn.UniqueConfig(**settings))
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def assert_close(ours: Sequence[Answer], stock: Sequence[Answer]) -> None:
    """The same tokens, and log-probabilities within 1e-5."""
    assert [each.tokens for each in ours] == [each.tokens for each in stock]
    for mine, theirs in zip(ours, stock):
        assert len(mine.logprobs) == len(mine.tokens) == len(theirs.logprobs)
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), atol=1e-5, rtol=0)
