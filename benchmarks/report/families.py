"""The table of model families from a sweep over all of them (``python -m tests.families --json FILE``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from examples.support.results import markdown

ORDER = ("sparse", "dense", "refused", "wrong", "not built")
WORDS = {"not built": "could not be built here"}


def block(results: Sequence[Mapping[str, Any]]) -> str:
    """Counts and names by verdict and reason, of the newest transformers that there is a result of."""
    sweeps = sorted((r for r in results if r["bench"] == "families"), key=lambda r: _version(r["transformers"]))
    if not sweeps:
        return ""
    newest = sweeps[-1]
    families = pd.DataFrame(
        [(ORDER.index(each["verdict"]), _reason(each), name) for name, each in newest["families"].items()],
        columns=["order", "reason", "name"],
    )
    counts = {verdict: int((families["order"] == i).sum()) for i, verdict in enumerate(ORDER)}
    kinds = families.groupby(["order", "reason"])["name"].agg(["size", ", ".join]).reset_index()
    kinds = kinds.sort_values(["order", "size", "reason"], ascending=[True, False, True])
    shown = pd.DataFrame(
        {
            "what happens": [_verdict(ORDER[i], reason) for i, reason in zip(kinds["order"], kinds["reason"])],
            "families": kinds["size"].astype(str),
            "which": kinds["join"],
        }
    )
    versions = ", ".join(r["transformers"] for r in sweeps)
    return (
        f"Of {len(families)} families in transformers {newest['transformers']}, "
        f"{counts['sparse']} are sparse, "
        f"{counts['dense']} dense, {counts['refused']} refused by name, and {counts['wrong'] or 'none'} differs from "
        f"its stock attention; {counts['not built']} could not be built. Swept: {versions}.\n\n"
        f"<details>\n<summary>The families by name</summary>\n\n{markdown(shown)}\n</details>\n"
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
