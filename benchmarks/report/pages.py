"""Where blocks stand: between the lines ``<!-- NAME -->`` and ``<!-- /NAME -->`` of README.md and docs/*.md."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.report.plots import FOLDER

BLOCK = re.compile(r"^<!-- (?P<name>[^/\n][^\n]*?) -->\n(?P<text>.*?)^<!-- /(?P=name) -->\n", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^<!-- (/?)([^\n]+?) -->$", re.MULTILINE)


def placed(name: str, block: str) -> str:
    """A block with its markers."""
    return f"<!-- {name} -->\n{block}<!-- /{name} -->\n"


def files(root: Path) -> list[Path]:
    """Every page that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def rewrite(root: Path, blocks: Mapping[str, str]) -> dict[Path, str]:
    """The new texts of all pages that hold blocks; a block is written wherever its markers stand.

    Raises:
        ValueError: a block that is not empty stands nowhere, or a page has markers of no block, or half of a pair.
    """
    texts = {page: page.read_text("utf-8") for page in files(root)}
    found: dict[Path, list[str]] = {page: _names(page, text, blocks) for page, text in texts.items()}
    nowhere = [name for name, block in blocks.items() if block and all(name not in names for names in found.values())]
    if nowhere:
        name = nowhere[0]
        raise ValueError(f"no page has the lines <!-- {name} --> and <!-- /{name} -->: README.md or one of docs/ must")

    def fill(page: Path, text: str) -> str:
        folder = os.path.relpath(root / FOLDER, page.parent)
        prefix = "" if folder == "." else f"{Path(folder).as_posix()}/"

        def block(match: re.Match[str]) -> str:
            return placed(match["name"], blocks[match["name"]].replace(f"]({FOLDER}/", f"]({prefix}"))

        return BLOCK.sub(block, text)

    return {page: fill(page, texts[page]) for page, names in found.items() if names}


def _names(page: Path, text: str, blocks: Mapping[str, str]) -> list[str]:
    """The blocks of a page. Comments that are neither closed nor named like a block are no markers."""
    found = [match["name"] for match in BLOCK.finditer(text)]
    for closing, name in MARKER.findall(text):
        if (closing or name in found) and name not in blocks:
            raise ValueError(f"{page}: <!-- {closing}{name} --> marks no block: expected one of {', '.join(blocks)}")
        if name in blocks and name not in found:
            raise ValueError(f"{page}: expected the lines <!-- {name} --> and <!-- /{name} -->, got one of them")
    return found
