"""What the command lines of the examples and of the benchmarks share."""

from __future__ import annotations

import argparse

import torch


def existing_device(text: str) -> str:
    """The value of ``--device``, if that is a device here."""
    kind, _, number = text.partition(":")
    if kind not in ("cpu", "cuda") or (":" in text and not number.isdigit()):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        there = "this torch is built without CUDA"
        if torch.backends.cuda.is_built():
            there = f"torch finds {torch.cuda.device_count()} CUDA devices"
        raise argparse.ArgumentTypeError(f"{text} is not there: {there}")
    return text
