"""``python -m unique_attn COMMAND ...``: each command is a module with ``main(argv)``, imported when it is called.

What the person who called it can put right (a value, a file, a package that is missing) is raised by the commands as it
comes up and told here in one line; ``python -X dev -m unique_attn ...`` shows where it came from. Everything else is a
fault of this package and keeps its traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence

from unique_attn._version import __version__
from unique_attn.models import ModelUnavailableError

COMMANDS = {
    "info": ("unique_attn.info", "versions, what was compiled, whether the CUDA kernels run here"),
    "demo": ("unique_attn.demo", "a language model reads a long document: dense against page-sparse"),
    "bench": ("unique_attn.bench", "benchmarks, printed and written as JSON"),
    "report": ("unique_attn.report", "tables from committed benchmark results"),
}
EXPECTED = (ImportError, OSError, ValueError, ModelUnavailableError)


def available() -> dict[str, tuple[str, str]]:
    return {name: entry for name, entry in COMMANDS.items() if importlib.util.find_spec(entry[0]) is not None}


def usage() -> str:
    lines = ["usage: python -m unique_attn COMMAND [options]", ""]
    lines += [f"  {name:<8} {help}" for name, (_, help) in available().items()]
    lines += [
        "",
        "`python -m unique_attn COMMAND --help` lists the options of one command, `--version` prints the version.",
    ]
    return "\n".join(lines)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"unique_attn {__version__}")
        return 0
    if name not in available():
        print(f"error: no command {name!r}: expected one of {', '.join(available())}", file=sys.stderr)
        return 2
    sys.argv[0] = f"python -m unique_attn {name}"  # what argparse shows as the program
    return importlib.import_module(COMMANDS[name][0]).main(rest) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, whose ``main(argv)`` may return an exit status, and return the status."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # so that a reader who left is noticed here and not when Python exits
        return status
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except EXPECTED as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
