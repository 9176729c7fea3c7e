"""The table of model families from a sweep over all of them (``python -m tests.families --json FILE``)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from unique_attn.bench._tables import table

ORDER = ("sparse", "dense", "refused", "wrong", "not built")
WORDS = {"not built": "could not be built here"}


def block(results: Sequence[Mapping[str, Any]]) -> str:
    """Counts and names by verdict and reason, of the newest transformers that there is a result of."""
    sweeps = [r for r in results if r["bench"] == "families"]
    if not sweeps:
        return ""
    newest = max(sweeps, key=lambda r: [int(n) for n in re.findall(r"\d+", r["transformers"])])
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, family in newest["families"].items():
        groups[family["verdict"], _reason(family)].append(name)
    ordered = sorted(groups.items(), key=lambda item: (ORDER.index(item[0][0]), -len(item[1]), item[0][1]))
    rows = [(_verdict(*kind), str(len(names)), ", ".join(names)) for kind, names in ordered]
    counts = {verdict: sum(len(names) for kind, names in ordered if kind[0] == verdict) for verdict in ORDER}
    versions = ", ".join(sorted((r["transformers"] for r in sweeps), key=_version))
    return (
        f"Of {len(newest['families'])} families in transformers {newest['transformers']}, "
        f"{counts['sparse']} are sparse, "
        f"{counts['dense']} dense, {counts['refused']} refused by name, and {counts['wrong'] or 'none'} differs from "
        f"its stock attention; {counts['not built']} could not be built. Swept: {versions}.\n\n"
        "<details>\n<summary>The families by name</summary>\n\n"
        + table(("what happens", "families", "which"), rows)
        + "\n</details>\n"
    )


def _version(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _verdict(verdict: str, reason: str) -> str:
    name = f"**{verdict}**" if verdict == "sparse" else WORDS.get(verdict, verdict)
    return f"{name}: {reason}" if reason else name


def _reason(family: Mapping[str, Any]) -> str:
    """A warning or an error without the names and numbers of one family."""
    if family["verdict"] == "sparse":
        return ""
    reason = family.get("reason", "")
    if family["verdict"] == "not built":
        return "stock attention fails on a tiny model, or a package is missing"
    if "every layer of" in reason:
        return "every layer has a sliding window"
    if family["verdict"] == "refused":
        return "no attention with a cache, or not through transformers' attention interface"
    reason = re.sub(r"^\w+ (keeps its own attention and is dense|stays dense|is dense( in this call)?): ", "", reason)
    reason = re.sub(r"is told \w+,", "is told which keys to attend to,", reason)
    reason = re.sub(r" \(.*?\)", "", reason)
    return reason or "layers of other kinds, all of them with a window"
