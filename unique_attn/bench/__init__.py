"""Benchmarks: ``python -m unique_attn bench NAME``.

Every module of this package whose name does not begin with an underscore is a benchmark: it has
``add_arguments(parser)``, ``run(options) -> dict`` (what goes into the JSON) and ``report(result) -> str``.
A new one is a new file. What they share is in ``_harness``.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import torch

from unique_attn.bench._harness import write_json


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m unique_attn bench", description="Benchmarks, printed and written as JSON."
    )
    commands = root.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        summary = (module.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
        sub.add_argument("--repeats", type=int, default=30, help="timed rounds of every candidate")
        sub.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for what torch takes")
        sub.add_argument("--out", help="file for the JSON result")
        module.add_arguments(sub)
        sub.set_defaults(module=module)
    return root


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    if options.repeats < 1:
        raise SystemExit(f"error: --repeats: expected at least 1, got {options.repeats}")
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = options.module.run(options)
    print(options.module.report(result))
    if options.out:
        print(f"\nwrote {write_json(options.out, result)}")
    return 0
