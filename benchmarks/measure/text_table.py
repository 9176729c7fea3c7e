"""The tables that benchmarks print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate

NOTE = "note"  # the column of why a row has no numbers, always the last one


def text_table(rows: Sequence[Mapping[str, object]], *, left: Sequence[str] = ()) -> list[str]:
    """Lines of a table: a column for each key of any row, as wide as what is in it.

    A column with nothing in it is left out. Numbers are formatted by the caller.

    Args:
        rows: texts by the titles of their columns; a row may lack some.
        left: columns of words, which are aligned to the left; others are aligned to the right.
    """
    titles = [title for title in dict.fromkeys(title for row in rows for title in row) if title != NOTE]
    used = [title for title in [*titles, NOTE] if any(str(row.get(title, "")) for row in rows)]
    if not used:
        return []
    cells = [[str(row.get(title, "")) for title in used] for row in rows]
    sides = ["left" if title in (*left, NOTE) else "right" for title in used]
    text = tabulate(cells, headers=used, colalign=sides, disable_numparse=True)
    return [line.rstrip() for line in text.splitlines()]
