"""Recorded selections become the right array, and pictures that can be opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import numbers

from unique_attn import PrefillRecord, ops
from unique_attn.viz import Selections, kept_by_head, plot_layers, plot_prefill, plot_selection

pytest.importorskip("matplotlib")


def record(layer: int, length: int, pages: list[list[int]]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """One step of one layer for a batch of two, whose first row is a decoy; ``pages`` are those of each head."""
    chosen = torch.tensor(pages, dtype=torch.int32)[None, None]
    return layer, torch.tensor([5, length], dtype=torch.int32), torch.cat([torch.zeros_like(chosen), chosen])


def random_selections(steps: int, layers: int, heads: int, pages: int) -> Selections:
    read = np.random.default_rng(0).random((steps, layers, heads, pages)) < 0.2
    return Selections(read, tuple(range(layers)), 8, tuple(range(8 * pages - steps, 8 * pages)))


def test_records_become_an_array():
    records = [
        record(4, 17, [[0, 1, -1], [2, -1, -1]]),
        record(2, 17, [[1, 2, -1], [0, 1, 2]]),
        record(4, 25, [[3, -1, -1], [-1, -1, -1]]),
        record(2, 25, [[0, 3, -1], [1, -1, -1]]),
    ]
    s = Selections.from_records(records, page_size=8, sequence=1)
    assert s.layers == (2, 4)
    assert s.seq_lens == (17, 25)
    assert s.tokens == 32
    expected = np.zeros((2, 2, 2, 4), dtype=bool)
    for step, layer, head, pages in [
        (0, 0, 0, [1, 2]), (0, 0, 1, [0, 1, 2]), (0, 1, 0, [0, 1]), (0, 1, 1, [2]),
        (1, 0, 0, [0, 3]), (1, 0, 1, [1]), (1, 1, 0, [3]),
    ]:  # fmt: skip
        expected[step, layer, head, pages] = True
    np.testing.assert_array_equal(s.read, expected)


def test_shares():
    records = [record(0, 9, [[0, 1], [1, -1]]), record(0, 17, [[0, 2], [1, 2]])]
    s = Selections.from_records(records, page_size=8, sequence=1)
    np.testing.assert_array_equal(s.shares(), [[0.5, 1.0, np.nan], [0.5, 0.5, 1.0]])


def test_several_query_tokens_are_united():
    pages = torch.tensor([[[[0, 1]], [[0, 3]]]], dtype=torch.int32)  # [1, 2, 1, 2]
    s = Selections.from_records([(0, torch.tensor([30]), pages)], page_size=8)
    assert s.read[0, 0, 0].tolist() == [True, True, False, True]


def test_bad_records():
    with pytest.raises(ValueError, match="at least one decode step"):
        Selections.from_records([], page_size=8)
    uneven = [record(0, 17, [[0]]), record(0, 18, [[0]]), record(1, 17, [[0]])]
    with pytest.raises(ValueError, match=r"same number of steps of each layer, got \[1, 2\]"):
        Selections.from_records(uneven, page_size=8)


@pytest.mark.parametrize(("steps", "layers", "heads", "pages"), [(1, 1, 1, 1), (12, 5, 3, 90), (50, 12, 9, 33)])
def test_pictures(tmp_path: Path, steps: int, layers: int, heads: int, pages: int):
    s = random_selections(steps, layers, heads, pages)
    marks = {"here": 3}
    drawn = plot_selection(
        s, tmp_path / "new" / "a.png", subtitle="$ not mathtext", step_labels=["a_b$"] * steps, marks=marks
    )
    expected = {"layers": list(range(layers)), "seq_lens": list(s.seq_lens), "pages_read": s.read.sum(-1).tolist()}
    shares = {
        "median page": np.nanmedian(s.shares(), axis=1).tolist(),
        "90th percentile": np.nanquantile(s.shares(), 0.9, axis=1).tolist(),
        "here": s.shares()[:, 0].tolist(),
    }
    assert numbers(drawn) == expected | {"marks": marks, "shares": shares}
    assert numbers(plot_layers(s, tmp_path / "b.png", marks=marks)) == expected | {"marks": marks}
    assert numbers(plot_selection(s, tmp_path / "c.png")) == expected | {"marks": {}, "shares": {}}


# ---- Prefill. ----


def prefill_record(layer: int, num_queries: int, num_keys: int, kept: list[list[int]], mass: list[list[float]]):
    """A record whose query blocks list the first ``kept[block][head]`` key blocks."""
    listed = torch.arange(-(-num_keys // 64)) < torch.tensor([*kept, [9] * len(kept[0])])[..., None]  # a spare row
    kept_mass = torch.tensor([*mass, [5.0] * len(mass[0])])
    return PrefillRecord(layer, 0, num_queries, num_keys, 128, 64, ops.pack_block_mask(listed), kept_mass)


def test_what_prefill_kept_is_weighted_by_blocks():
    records = [
        prefill_record(3, 128, 128, [[1, 2]], [[0.5, 1.0]]),  # 2 blocks are visible
        prefill_record(3, 200, 328, [[2, 4], [3, 6]], [[0.8, 0.9], [0.2, 0.4]]),  # 4 + 6 are
        prefill_record(1, 128, 128, [[1]], [[0.25]]),
    ]
    assert [record.visible for record in records] == [2, 10, 2]
    layers, density, mass = kept_by_head(records)
    assert layers == [1, 3]
    np.testing.assert_allclose(density, [[0.5, np.nan], [6 / 12, 1.0]])
    np.testing.assert_allclose(mass, [[0.25, np.nan], [0.5, 2.3 / 3]], rtol=1e-6)


def test_prefill_without_records():
    with pytest.raises(ValueError, match="at least one sparse prefill, got none"):
        kept_by_head([])
    uneven = [prefill_record(0, 128, 128, [[1]], [[0.5]]), prefill_record(0, 128, 128, [[1, 1]], [[0.5, 0.5]])]
    with pytest.raises(ValueError, match=r"same heads in all records of a layer, got \[1, 2\]"):
        kept_by_head(uneven)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (40, 32)])
def test_picture_of_prefill(tmp_path: Path, layers: int, heads: int):
    records = [prefill_record(i, 128, 128, [[1 + h % 2 for h in range(heads)]], [[0.5] * heads]) for i in range(layers)]
    shown = numbers(plot_prefill(records, tmp_path / "new" / "a.png", subtitle="$ not mathtext"))
    density = [[0.5 + h % 2 / 2 for h in range(heads)]] * layers
    assert shown == {"layers": list(range(layers)), "density": density, "mass": [[0.5] * heads] * layers}
    mixed = [prefill_record(0, 128, 128, [[2]], [[1.0]]), prefill_record(1, 128, 128, [[2, 1]], [[1.0, 0.5]])]
    assert numbers(plot_prefill(mixed, tmp_path / "b.png"))["density"] == [[1.0, None], [1.0, 0.5]]
