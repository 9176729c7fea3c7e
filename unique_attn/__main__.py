"""``python -m unique_attn COMMAND ...``: each command is a module with ``main(argv)``, imported when it is called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": ("unique_attn.info", "versions, what was compiled, whether the CUDA kernels run here"),
    "demo": ("unique_attn.demo", "a language model reads a long document: dense against page-sparse"),
    "bench": ("unique_attn.bench", "benchmarks, printed and written as JSON"),
    "report": ("unique_attn.report", "tables from committed benchmark results"),
}


def available() -> dict[str, tuple[str, str]]:
    return {name: entry for name, entry in COMMANDS.items() if importlib.util.find_spec(entry[0]) is not None}


def usage() -> str:
    lines = ["usage: python -m unique_attn COMMAND [options]", ""]
    lines += [f"  {name:<8} {help}" for name, (_, help) in available().items()]
    return "\n".join([*lines, "", "`python -m unique_attn COMMAND --help` lists the options of one command."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its ``main(argv)`` may return an exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in available():
        print(f"error: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    sys.argv[0] = f"python -m unique_attn {name}"  # what argparse shows as the program
    return importlib.import_module(COMMANDS[name][0]).main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
