"""The command line of the benchmarks, and :func:`run`, which calls one from Python."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, suite
from benchmarks.measure.machine import slug
from examples.support.command import existing_device
from examples.support.results import write_json
from unique_attn import _command

RESULTS = Path("benchmarks") / "results"


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(suite.__path__))


def module(name: str) -> Any:
    return importlib.import_module(f"{suite.__name__}.{name}")


def _add_device(sub: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    sub.add_argument("--device", type=existing_device, default=default, help="cpu, cuda or cuda:N")


def _add_shared(sub: argparse.ArgumentParser) -> None:
    _add_device(sub)
    sub.add_argument("--repeats", type=int, default=30, help="timed rounds of every candidate")
    sub.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for what torch takes")
    sub.add_argument("--out", help="file for the JSON result")
    sub.add_argument("--results", help="folder for the JSON result, which names its file itself")


def parser() -> argparse.ArgumentParser:
    root = _command.Parser(prog="python -m benchmarks", description="Benchmarks, printed and written as JSON.")
    commands = root.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in names():
        summary = (module(name).__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        _add_shared(sub)
        module(name).add_arguments(sub)
    every = commands.add_parser("all", help="write every committed result that this device can write")
    _add_device(every)
    every.add_argument("--results", default=str(RESULTS), help="folder for the JSON results")
    summary = (report.__doc__ or "").partition("\n")[0]
    report.add_arguments(commands.add_parser("report", help=summary, description=report.__doc__))
    return root


def file_name(result: dict[str, Any], options: argparse.Namespace) -> str:
    """``<bench>-<device>-<preset or dtype>.json``, with the storage of the index if that is not the default one."""
    variant = getattr(options, "preset", None) or getattr(options, "dtype", [])
    words = [variant] if isinstance(variant, str) else list(variant)
    storage = list(getattr(options, "index_format", ["exact"]))
    words += storage if storage != ["exact"] else []
    return "-".join([result["bench"], slug(result["environment"]["device"]), *words]) + ".json"


def committed(device: str) -> list[list[str]]:
    """Command lines that write the committed results on a kind of device."""
    kind = torch.device(device).type
    return [[name, *flags] for name in names() for flags in getattr(module(name), "COMMITTED", {}).get(kind, [])]


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.repeats < 1:
        raise SystemExit(f"error: --repeats: expected at least 1, got {options.repeats}")
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if options.threads < 0:
        raise SystemExit(f"error: --threads: expected at least 0, got {options.threads}")
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = module(options.name).run(options)
    return result


def run(name: str, **flags: Any) -> dict[str, Any]:
    """Run a benchmark and return what its JSON would hold.

    Args:
        name: one of :func:`names`.
        flags: its command line's, ``head_dim=[64, 128]`` for ``--head-dim 64 128``.

    Raises:
        SystemExit: a flag that does not exist, or a value that it does not take.
    """
    argv = [name]
    for flag, value in flags.items():
        argv += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return _run(parser().parse_args(argv))


def _command_line(argv: Sequence[str]) -> None:
    options = parser().parse_args(argv)
    if options.name == "report":
        report.run(options)
        return
    if options.name == "all":
        for command in committed(options.device):
            print(f"==== {' '.join(command)} ====", flush=True)
            _command_line([*command, "--device", options.device, "--results", options.results])
        return
    result = _run(options)
    print(module(options.name).report(result))
    targets = [options.out] if options.out else []
    if options.results:
        targets.append(str(Path(options.results) / file_name(result, options)))
    for path in targets:
        print(f"\nwrote {write_json(path, result)}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    return _command.run(lambda: _command_line(argv))
