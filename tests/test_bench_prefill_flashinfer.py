"""FlashInfer in ``benchmarks prefill``: it is given the blocks that ours is given, on which its causal mask is that of
the sequence, and what it lacks is a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_prefill_cases import CPU, options, prompt, run_prefill

from benchmarks.measure import block_lists, ceiling, harness, peers, prefill_flashinfer, prefill_sides
from benchmarks.measure.block_lists import Blocks
from benchmarks.report import prefill as prefill_report
from unique_attn import ops


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch):
    """Timing is not what is tested here."""
    monkeypatch.setattr(harness.ColdCache, "flush", lambda self: None)
    monkeypatch.setattr(ceiling, "SIZES", {"cpu": 1 << 20, "cuda": 1 << 20})


class FakeFlashInfer:
    """Looks like FlashInfer, and attends in plain PyTorch: to the listed keys one by one, causal from their end."""

    class VariableBlockSparseAttentionWrapper:
        def __init__(self, workspace: torch.Tensor, backend: str = "auto") -> None:
            assert workspace.dtype == torch.uint8
            if backend == "broken":
                raise RuntimeError("no such module")

        def plan(
            self,
            lists: torch.Tensor,
            rows: torch.Tensor,
            columns: torch.Tensor,
            *heads: int,
            causal: bool,
            **dtypes: Any,
        ) -> None:
            assert causal
            assert set(dtypes) == {"q_data_type", "kv_data_type"}
            assert lists.shape == (heads[1], rows.shape[1], columns.shape[1])
            self.lists, self.rows, self.columns = lists, rows, columns

        def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out, group = torch.empty_like(q), q.shape[0] // k.shape[0]
            for head, per_row in enumerate(self.lists):
                heads = slice(head * group, (head + 1) * group)
                for row, listed in enumerate(per_row.repeat_interleave(self.columns[head].long(), -1)):
                    first = int(self.rows[head, :row].sum())
                    queries = slice(first, first + int(self.rows[head, row]))
                    n, m = queries.stop - first, int(listed.sum())
                    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
                    out[heads, queries] = torch.nn.functional.scaled_dot_product_attention(
                        q[heads, queries], k[head, listed][None], v[head, listed][None], seen
                    )
            return out


@pytest.fixture
def fake_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "flashinfer", lambda device: FakeFlashInfer)
    monkeypatch.setattr(peers, "versions", lambda device: {"flashinfer": "1.2"})
    monkeypatch.setattr(peers, "WORKSPACE", 16)
    monkeypatch.setattr(prefill_flashinfer, "DTYPES", (torch.float32,))


@pytest.mark.parametrize("tokens", [100, 512, 700])
def test_causal_from_the_end_of_a_list_is_causal(fake_flashinfer: None, tokens: int):
    made = prompt(tokens)
    kept = block_lists.random_lists(made.blocks, made.kv_heads, 0.5, made.generator)
    mask = ops.pack_block_mask(kept)
    out = prefill_flashinfer.BlockSparse(made, kept, "fa2")(0).transpose(0, 1)
    bounds = made.cu_seqlens
    ours, _ = ops.block_sparse_attention(*made.sets[0], bounds, bounds, tokens, mask)
    torch.testing.assert_close(out, ours, atol=1e-5, rtol=1e-5)
    kept[-2 if tokens % 128 == 0 else -1, 1, made.blocks.keys - 1] = False
    with pytest.raises(ValueError, match="kept: expected rows that hold their diagonal"):
        prefill_flashinfer.BlockSparse(made, kept, "fa2")


def test_a_list_with_a_later_block_is_refused(fake_flashinfer: None):
    made = prompt(512)
    kept = block_lists.random_lists(made.blocks, made.kv_heads, 0.5, made.generator)
    kept[1, 0, 4] = True
    with pytest.raises(ValueError, match="kept: expected rows that hold their diagonal and nothing after it"):
        prefill_flashinfer.BlockSparse(made, kept, "fa2")


def test_flashinfer_beside_the_same_lists(
    fake_flashinfer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(prefill_flashinfer, "backends", lambda device: ("broken", "fa2"))
    result = run_prefill(tmp_path)
    assert result["peers"]["flashinfer"].startswith("1.2: VariableBlockSparseAttentionWrapper, backends broken and fa2")
    for case in result["cases"]:
        sides, shared = case["sides"], case["shared_lists"]
        assert sides["flashinfer_broken"] == {"failed": "RuntimeError: no such module"}
        taken = sides["flashinfer_fa2"]["median_ms"], sides["shared_lists"]["median_ms"]
        assert shared["speedups"]["flashinfer_broken"] is None
        assert shared["speedups"]["flashinfer_fa2"] == pytest.approx(taken[0] / taken[1], rel=0.01, abs=0.001)
        assert set(shared["plan_ms"]) == {"flashinfer_fa2"}
        assert shared["density"] == pytest.approx(case["lists"]["density"], abs=0.1)
    printed = capsys.readouterr().out
    assert "x flashinfer_fa2" in printed
    assert "no such module" in printed
    block = prefill_report.block([result])
    assert "| given lists | a list per KV head | FlashInfer, the same | whole call |" in block
    assert " ms (fa2) |" in block
    assert "FlashInfer 1.2 (`VariableBlockSparseAttentionWrapper`" in block


def test_a_wrong_output_of_flashinfer_is_noticed(fake_flashinfer: None, monkeypatch: pytest.MonkeyPatch):
    wrapper = FakeFlashInfer.VariableBlockSparseAttentionWrapper
    run = wrapper.run
    monkeypatch.setattr(wrapper, "run", lambda self, q, k, v: run(self, q, k, v).roll(1, 1))
    sides, failed = prefill_sides.Sparse(options(), prompt(512), 50, None).shared_sides()
    assert not failed
    assert set(harness.compare(sides, CPU, rounds=1).failed) == {"flashinfer_fa2"}


def test_flashinfer_is_left_out():
    made = prompt(256)
    sparse = prefill_sides.Sparse(options(), made, 50, None)
    assert sparse.shared_sides() == ({}, {})
    assert sparse.shared_mask is None
    assert prefill_flashinfer.described(made.device, made.dtype) == "not measured: needs CUDA"


def test_memory_of_flashinfer():
    size = prefill_flashinfer.needed(Blocks(1024), (4, 2), 32, 0.5, CPU)
    listed = 64 * sum(2 * row + 2 for row in range(8)) * 2 * 0.5  # two key blocks a query block
    assert size == listed * prefill_flashinfer.PLAN_BYTES + 3 * 1024 * 4 * 32 * 2 + peers.WORKSPACE
