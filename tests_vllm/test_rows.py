"""How batches are cut, also those of captured steps, which do not run on a CPU; and the arguments of FlashAttention."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unique_attn import UniqueConfig
from unique_attn.vllm import dense
from unique_attn.vllm.layout import BlockViews
from unique_attn.vllm.rows import Batch, BatchCutter, Rows

BLOCK = 64


def common(
    query_lens: list[int], seq_lens: list[int], *, tokens: int | None = None, max_seq_len: int | None = None
) -> Any:
    """vLLM's metadata; ``tokens`` with the padding of a captured step."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    total = int(starts[-1]) if tokens is None else tokens
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=total,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens) if max_seq_len is None else max_seq_len,
        block_table_tensor=torch.arange(len(query_lens) * 64, dtype=torch.int32).view(-1, 64),
        slot_mapping=torch.zeros(total, dtype=torch.int64),
    )


def cut(batch: Any, threshold: int = 1, **settings: Any) -> Batch:
    return BatchCutter(UniqueConfig(**settings), threshold, BLOCK, 16, torch.device("cpu")).cut(batch)


def test_one_token_each():
    batch = cut(common([1, 1, 1], [500, 3, 1000]))
    assert batch.decode is not None
    assert batch.prompts is None
    assert batch.segments == []
    assert (batch.decode.num_tokens, batch.decode.per_row, batch.decode.places) == (3, 1, None)
    assert batch.decode.block_table.shape == (3, 16)  # 1,000 tokens
    assert batch.decode.block_table.stride() == (64, 1)  # a view


def test_the_padding_of_a_captured_step_is_rows_of_length_0():
    rows = cut(common([3, 3, 0, 0], [500, 3, 0, 0], tokens=12, max_seq_len=4096), threshold=3).decode
    assert rows is not None
    assert (rows.num_tokens, rows.per_row, rows.places) == (12, 3, None)
    assert rows.seq_lens.tolist() == [500, 3, 0, 0]
    assert rows.block_table.shape == (4, 64)


@pytest.mark.parametrize("tokens", [3, 4, 8])
def test_other_padding_is_left_out(tokens: int):
    """Tokens behind the rows, or rows without tokens."""
    rows = cut(common([1, 1, 1, 0, 0, 0, 0, 0, 0], [500, 3, 9] + [0] * 6, tokens=tokens)).decode
    assert rows is not None
    assert (rows.num_tokens, rows.per_row, rows.seq_lens.tolist()) == (3, 1, [500, 3, 9])


def test_ragged_rows_stand_at_the_right():
    rows = cut(common([3, 1, 2], [500, 1, 9]), threshold=4).decode
    assert rows is not None
    assert rows.places is not None
    assert (rows.num_tokens, rows.per_row) == (6, 3)
    assert rows.places.tolist() == [0, 1, 2, 5, 7, 8]


def test_prompts_behind_rows_that_decode():
    settings = {"prefill": "directional", "prefill_above": 600}
    batch = cut(common([1, 1, 100, 300, 200, 50], [500, 3, 100, 700, 900, 50]), **settings)
    assert batch.decode is not None
    assert batch.prompts is not None
    assert batch.prompts.start_lens is not None
    assert (batch.decode.num_tokens, batch.prompts.tokens) == (2, slice(2, 652))
    assert batch.prompts.start_lens.tolist() == [0, 400, 700, 0]
    assert [rows.tokens for rows in batch.segments] == [slice(2, 102), slice(102, 602), slice(602, 652)]
    assert [rows.key_start is None for rows in batch.segments] == [True, False, True]
    sparse = batch.segments[1]
    assert sparse.key_start is not None
    assert (sparse.query_start.tolist(), sparse.key_start.tolist()) == ([0, 300, 500], [0, 700, 1600])
    assert (sparse.max_query_len, sparse.max_seq_len) == (300, 900)


def test_budgets_below_a_length_are_at_one_address():
    cutter = BatchCutter(UniqueConfig(budget=64, dense_below=700), 1, BLOCK, 16, torch.device("cpu"))
    first, second = (cutter.cut(common([1, 1], lens)).decode for lens in ([699, 700], [3, 5000]))
    assert first is not None
    assert second is not None
    assert first.budget is not None
    assert second.budget is not None
    assert second.budget.tolist() == [88, 8]
    assert first.budget.data_ptr() == second.budget.data_ptr()


def test_flash_attention_is_given_what_it_takes():
    """A stand-in with the names of vLLM's function, in PyTorch: the results are those of the other dense function."""
    torch.manual_seed(0)
    query_lens, seq_lens = [1, 70, 0, 40], [300, 70, 0, 200]
    k, v = torch.randn(2, 256, 2, BLOCK, 16)  # each [num_blocks, H, block_size, D]
    cache = BlockViews(k, v, torch.empty(0, dtype=torch.uint8))
    rows: Rows = cut(common(query_lens, seq_lens)).everything
    q = torch.randn(sum(query_lens), 6, 16)
    seen: list[dict[str, Any]] = []

    def flash(**given: Any) -> None:
        seen.append(given)
        for row in range(len(query_lens)):
            begin, end = given["cu_seqlens_q"][row : row + 2].tolist()
            length = int(given["seqused_k"][row])
            blocks = given["block_table"][row, : -(-length // BLOCK)].long()

            def of(paged: Tensor, blocks: Tensor = blocks, length: int = length) -> Tensor:
                return paged[blocks].flatten(0, 1)[:length].repeat_interleave(3, 1)  # [length, Hq, D]

            logits = torch.einsum("qhd,khd->hqk", given["q"][begin:end], of(given["k"])) * given["softmax_scale"]
            mask = torch.ones(end - begin, length, dtype=torch.bool).tril(length - (end - begin))
            weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
            given["out"][begin:end] = torch.einsum("hqk,khd->qhd", weights, of(given["v"]))

    out, expected = torch.empty_like(q), torch.empty_like(q)
    dense.flash_attention(flash, 3, 32)(q, cache, rows, 0.25, out)
    dense.torch_attention(q, cache, rows, 0.25, expected)
    torch.testing.assert_close(out, expected)
    (given,) = seen
    assert (given["max_seqlen_q"], given["max_seqlen_k"], given["num_splits"]) == (70, 300, 0)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "vllm_flash_attn" / "flash_attn_interface.py").read_text("utf-8")
    function = next(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    assert set(given) <= {argument.arg for argument in function.args.args}
