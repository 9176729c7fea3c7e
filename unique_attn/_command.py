"""What commands share (``python -m unique_attn``, and those of a checkout): complaints of one line, exit statuses."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

EXPECTED = (ImportError, OSError, ValueError)


def run(command: Callable[[], int | None]) -> int:
    """Call a command, which may return an exit status, and return the status.

    What the person who called it can put right (a value, a file, a package that is missing) is raised by the command as
    it comes up and told here in one line; ``python -X dev -m ...`` shows where it came from. Everything else is a fault
    of the program and keeps its traceback.
    """
    try:
        status = command() or 0
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


class Parser(argparse.ArgumentParser):
    """Says what is wrong without listing every option; its subcommands' parsers do too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")
