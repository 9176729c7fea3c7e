"""Texts that every machine with this checkout has, long enough for long prompts.

Their words differ a little between machines (versions of Python and of the installed packages), so a result names each
by its length and a hash.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from examples.support import DOCUMENT

LICENSE_FILE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)
TEXT_SUFFIXES = ("", ".txt", ".md", ".rst")
MODULES = (  # of the standard library, long ones whose source is plain
    "argparse", "ast", "datetime", "decimal", "difflib", "doctest", "inspect", "ipaddress", "mailbox", "optparse",
    "pathlib", "pickle", "pydoc", "statistics", "subprocess", "tarfile", "threading", "turtle", "typing", "zipfile",
)  # fmt: skip


def prose() -> str:
    """The history of a lighthouse that the demo reads; about 5,700 tokens, so not for long prompts."""
    return DOCUMENT.read_text("utf-8")


def technical() -> str:
    """The language reference that ``help()`` shows."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def legal() -> str:
    """The license of Python, and those of the installed packages and of the system; no paragraph comes twice."""
    seen: set[str] = set()
    fresh: list[str] = []
    for file in _licenses():
        for paragraph in re.split(r"\n\s*\n", file.read_text("utf-8", errors="replace")):
            key = " ".join(paragraph.split()).lower()
            if len(key) > 40 and key not in seen:
                seen.add(key)
                fresh.append(paragraph.rstrip())
    return "\n\n".join(fresh)


def _licenses() -> Iterator[Path]:
    own = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    system = Path("/usr/share/common-licenses")
    if own.is_file():
        yield own
    yield from sorted(file for file in system.glob("*") if file.is_file() and not file.is_symlink())
    for package in sorted(importlib.metadata.distributions(), key=lambda each: each.metadata["Name"] or ""):
        for file in sorted(package.files or [], key=str):
            if LICENSE_FILE.search(str(file)) and file.suffix in TEXT_SUFFIXES:
                path = Path(str(file.locate()))
                if path.is_file():
                    yield path


def code() -> str:
    """Python sources of the standard library."""
    found = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            found.append(Path(spec.origin).read_text("utf-8"))
    return "\n\n".join(found)


TEXTS: dict[str, Callable[[], str]] = {"prose": prose, "legal": legal, "technical": technical, "code": code}


def read(names: Sequence[str]) -> dict[str, str]:
    """By name: one of ``TEXTS``, or what a file of that name holds.

    Raises:
        OSError: there is no such file.
    """
    return {
        Path(name).stem: TEXTS[name]() if name in TEXTS else Path(name).read_text("utf-8", errors="replace")
        for name in names
    }


def facts(text: str) -> dict[str, int | str]:
    """What a result says of a text."""
    return {"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
