"""The models whose quality is measured: flags that choose one, what these leave open, and the model itself."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.measure.gemma import GEMMA, GEMMA_NAME, gemma_path
from examples.support.models import SMOLLM2, SMOLLM2_NAME, load_model
from examples.support.results import DTYPES

_NAMES = {SMOLLM2: SMOLLM2_NAME, GEMMA: GEMMA_NAME}


def add_model_flags(parser: argparse.ArgumentParser, lengths: Mapping[str, Sequence[int]], what: str) -> None:
    """``--model``, ``--length`` in tokens and ``--dtype``.

    Args:
        parser: of a benchmark.
        lengths: of each model that has a name.
        what: is so long.
    """
    usual = ", ".join(f"{' '.join(f'{n // 1024}K' for n in each)} for {name}" for name, each in lengths.items())
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, gemma3, a Hugging Face id or a local folder")
    parser.add_argument("--length", type=int, nargs="+", default=argparse.SUPPRESS, help=f"tokens of {what}: {usual}")
    parser.add_argument("--dtype", choices=list(DTYPES), default=argparse.SUPPRESS, help="bf16; fp32 on the CPU")


def settle(options: argparse.Namespace, lengths: Mapping[str, Sequence[int]]) -> None:
    """Fill in what the flags left open; the model also names the file of ``--results``."""
    if not hasattr(options, "dtype"):
        options.dtype = "fp32" if torch.device(options.device).type == "cpu" else "bf16"
    if not hasattr(options, "length"):
        options.length = lengths.get(options.model, lengths[SMOLLM2])
    options.preset = options.model if options.model in _NAMES else "model"


def name_of(options: argparse.Namespace) -> str:
    """What a result calls the model."""
    return _NAMES.get(options.model, str(options.model))


def load(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, for inference, and its tokenizer."""
    source = gemma_path() if name == GEMMA else name
    model, tokenizer = load_model(source, device=device, dtype=dtype, quiet=True)
    return model.requires_grad_(False), tokenizer
