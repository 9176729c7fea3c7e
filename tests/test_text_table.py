"""The tables that benchmarks print."""

from __future__ import annotations

from benchmarks.measure.sweep import shape_cells, side_cells
from benchmarks.measure.text_table import text_table

TIMED = {"median_ms": 1.5, "p10_ms": 1.25, "p90_ms": 12.0, "bytes": 3 << 20, "floor_ms": 0.75, "percent_of_ceiling": 50}


def test_columns_are_aligned_and_empty_ones_are_left_out():
    rows = [{"rule": "mean", "n": "1", "none": ""}, {"rule": "directional", "n": "1000", "none": "", "note": "slow"}]
    head, line, first, second = text_table(rows, left=["rule"])
    assert head.split() == ["rule", "n", "note"]
    assert set(line) == {"-", " "}
    assert first.split() == ["mean", "1"]
    assert second.split() == ["directional", "1000", "slow"]
    assert first.startswith("mean ")
    assert first.index("1") == second.index("1000") + 3
    assert text_table([]) == text_table([{"a": ""}]) == []


def test_texts_stay_as_they_are():
    assert text_table([{"time": "0.1000 ms", "n": "1e5"}])[-1].split("  ") == ["0.1000 ms", "1e5"]


def test_a_row_without_numbers_says_why():
    """Whichever row comes first."""
    shape = {"batch": 80, "head_dim": 64, "rule": "mean", "index_format": "compressed"}
    cases = [{"skipped": "needs 9 GiB, 2 GiB are free"}, {"ours": {"failed": "AssertionError"}}, {"ours": TIMED}, {}]
    rows = [{**shape_cells(shape, "batch", "head_dim", "rule"), **side_cells(case, moved="index")} for case in cases]
    head, _, skipped, failed, timed, neither = text_table(rows, left=["rule"])
    titles = ["batch", "D", "rule", "time", "p10 .. p90", "index", "floor", "of ceiling", "note"]
    assert [head.index(title) for title in titles] == sorted(head.index(title) for title in titles)
    for line, note in ((skipped, "needs 9 GiB, 2 GiB are free"), (failed, "AssertionError"), (neither, "not measured")):
        assert line.split() == ["80", "64", "mean,", "compressed", *note.split()]
    for cell in ("1.5000 ms", "1.2500 .. 12.0000", "3.00 MiB", "0.7500 ms", "50.0 %"):
        assert cell in timed
