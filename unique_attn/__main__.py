"""``python -m unique_attn COMMAND ...``: each command is a module with ``main(argv)``, imported when it is called."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence

from unique_attn import _command
from unique_attn._version import __version__

COMMANDS = {
    "calibrate": ("unique_attn.calibration.command", "which budget, rule and page size a model can take, measured"),
    "info": ("unique_attn.info", "versions, what was compiled, whether the CUDA kernels run here"),
}
OF_A_CHECKOUT = {"bench": "benchmarks", "demo": "examples.demo", "report": "benchmarks report"}


def usage() -> str:
    lines = ["usage: python -m unique_attn COMMAND [options]", ""]
    lines += [f"  {name:<10} {help}" for name, (_, help) in COMMANDS.items()]
    lines += [
        "",
        "`python -m unique_attn COMMAND --help` lists the options of one command, `--version` prints the version.",
    ]
    return "\n".join(lines)


def _run(arguments: Sequence[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"unique_attn {__version__}")
        return 0
    if name not in COMMANDS:
        complaint = f"error: no command {name!r}: expected one of {', '.join(COMMANDS)}"
        if name in OF_A_CHECKOUT:
            there = f"python -m {OF_A_CHECKOUT[name]} {shlex.join(rest)}".rstrip()
            complaint = f"error: {name!r} is no part of the package: in a checkout, `{there}`"
        print(complaint, file=sys.stderr)
        return 2
    sys.argv[0] = f"python -m unique_attn {name}"  # what argparse shows as the program
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, whose ``main(argv)`` may return an exit status, and return the status."""
    return _command.run(lambda: _run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
