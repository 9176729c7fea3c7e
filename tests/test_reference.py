"""The oracle against independent statements of the same things: definitions spelled out, and PyTorch's own SDPA."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import NAMED_RULES, RULES, Case, Spec, build, examples, specs
from torch import Tensor

from unique_attn import reference


def sdpa(case: Case, window: int) -> Tensor:
    """Dense attention of every sequence by F.scaled_dot_product_attention in fp64 with an explicit mask."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    num_tokens, group = case.q.shape[1], case.spec.group
    for b, length in enumerate(case.spec.lengths):
        keys = reference.gather_tokens(case.k_cache, case.block_table[b], length).double()
        values = reference.gather_tokens(case.v_cache, case.block_table[b], length).double()
        own = torch.arange(length - num_tokens, length)[:, None]
        mask = torch.arange(length) <= own
        if window:
            mask &= torch.arange(length) > own - window
        result = F.scaled_dot_product_attention(
            case.q[b].double().transpose(0, 1),
            keys.repeat_interleave(group, 0),
            values.repeat_interleave(group, 0),
            attn_mask=mask,
        )
        out[b] = result.transpose(0, 1).nan_to_num(0.0)  # a query without tokens gets 0
    return out


@given(spec=specs(dtype=torch.float64))
@examples(15)
def test_dense_and_all_pages_equal_sdpa(spec: Spec) -> None:
    case = build(spec)
    expected = sdpa(case, spec.window)
    cache = (case.k_cache, case.v_cache)
    out, lse = reference.dense_decode(case.q, *cache, case.block_table, case.seq_lens, window=spec.window)
    torch.testing.assert_close(out, expected)
    num_pages = case.block_table.shape[1] * spec.pages_per_block
    pages = torch.arange(num_pages, dtype=torch.int32).expand(*case.q.shape[:2], spec.kv_heads, num_pages)
    table = (case.block_table, case.seq_lens)
    sparse, sparse_lse = reference.sparse_decode(case.q, *cache, pages, *table, **case.attending)
    torch.testing.assert_close(sparse, expected)
    torch.testing.assert_close(sparse_lse, lse)


@given(spec=specs(num_tokens=st.integers(1, 3)).filter(lambda s: sum(s.lengths) > 0))
@examples(10)
def test_unique_decode_with_room_for_all_pages_is_dense(spec: Spec) -> None:
    case = build(spec)
    num_pages = max(2, -(-max(spec.lengths) // spec.page_size))
    state = (case.k_cache, case.v_cache, case.index, case.block_table, case.seq_lens)
    out, _, pages = reference.unique_decode(case.q, case.k, case.v, *state, num_pages, **case.scoring)
    torch.testing.assert_close(out, sdpa(case, spec.window))
    for b, length in enumerate(spec.lengths):
        last = reference.visible_pages(length - 1, spec.window, spec.page_size)
        assert pages[b, -1, 0, : len(last)].tolist() == list(last)


def test_gather_reads_the_table_and_no_entry_past_the_end() -> None:
    cache = torch.arange(3 * 2 * 4 * 8).view(3, 2, 4, 8)
    table = torch.tensor([2, 0, -1, 10**6], dtype=torch.int32)
    tokens = reference.gather_tokens(cache, table, 6)
    assert tokens.shape == (2, 6, 8)
    assert torch.equal(tokens[:, :4], cache[2])
    assert torch.equal(tokens[:, 4:], cache[0, :, :2])
    assert reference.gather_tokens(cache, table, 0).shape == (2, 0, 8)


def test_positions() -> None:
    assert reference.query_position(10, 4, 0) == 6
    assert list(reference.visible_tokens(6)) == [0, 1, 2, 3, 4, 5, 6]
    assert list(reference.visible_tokens(6, 3)) == [4, 5, 6]
    assert list(reference.visible_tokens(1, 3)) == [0, 1]
    assert not reference.visible_tokens(-1)
    assert list(reference.visible_pages(8, 0, 4)) == [0, 1, 2]
    assert list(reference.visible_pages(8, 2, 4)) == [1, 2]
    assert not reference.visible_pages(-2, 5, 4)


def test_entries_are_the_equations_of_the_page_index_page() -> None:
    keys = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns = keys.T.tolist()
    mean = [sum(c) / 7 for c in columns]
    var = [sum((x - m) ** 2 for x in c) / 7 for c, m in zip(columns, mean, strict=True)]

    def parts(rule: str) -> list[list[float] | float]:
        return [part.tolist() for part in reference.page_entry(keys, rule)]

    assert parts("mean") == [pytest.approx(mean)]
    assert parts("unique") == [pytest.approx(mean), pytest.approx(math.sqrt(sum(var)))]
    assert parts("directional") == [pytest.approx(mean), pytest.approx([math.sqrt(v) for v in var])]
    assert parts("minmax") == [[max(c) for c in columns], [min(c) for c in columns]]
    with pytest.raises(ValueError, match=r"rule: expected one of .*, got 'median'"):
        reference.page_entry(keys, "median")


def test_unknown_rules_and_formats_are_refused() -> None:
    keys = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    entry = reference.page_entry(keys, "mean")
    with pytest.raises(ValueError, match=r"rule: expected one of mean, .*, got 'median'"):
        reference.rule_score(keys[:1], entry, "median", 1.0)
    with pytest.raises(ValueError, match=r"index_format: expected exact or compressed, got 'packed'"):
        reference.encode_entry(keys, "mean", "packed", torch.float32)


def test_scores_are_the_equations_of_the_page_index_page() -> None:
    random = torch.Generator().manual_seed(1)
    keys = torch.randn(3, 4, 6, dtype=torch.float64, generator=random)  # three pages of four keys
    q = torch.randn(2, 6, dtype=torch.float64, generator=random)
    for rule in NAMED_RULES:
        scores = reference.rule_score(q, reference.page_entry(keys, rule), rule, 0.75)
        for g in range(2):
            for p in range(3):
                mean, var = keys[p].mean(0), keys[p].var(0, unbiased=False)
                expected = q[g] @ mean
                if rule == "unique":
                    expected = expected + 0.75 * q[g].norm() * var.sum().sqrt()
                elif rule == "directional":
                    expected = expected + 0.75 * (q[g] ** 2 @ var).sqrt()
                elif rule == "minmax":
                    expected = q[g].relu() @ keys[p].amax(0) - (-q[g]).relu() @ keys[p].amin(0)
                    assert expected >= (keys[p] @ q[g]).max()  # Quest: a bound of every logit in the page
                torch.testing.assert_close(scores[g, p], expected)


def test_index_round_trips_through_bytes() -> None:
    for rule in RULES:
        case = build(Spec(lengths=(21,), rule=rule, dtype=torch.bfloat16, page_size=8))
        parts = reference.decode_index(case.index, rule=rule, dtype=torch.bfloat16)
        keys = reference.gather_tokens(case.k_cache, case.block_table[0], 21).double()
        for page in range(3):
            entry = reference.page_entry(keys[:, page * 8 : page * 8 + 8], rule)
            block, inner = int(case.block_table[0, page // 2]), page % 2
            for part, value in zip(parts, entry, strict=True):
                assert torch.equal(part[block, :, inner], value.bfloat16())


@given(data=st.data())
@examples(40)
def test_selection_is_its_definition(data: st.DataObject) -> None:
    """Against Python's sort with the rule as the key."""
    count = data.draw(st.integers(1, 24), label="pages")
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan])
    row = data.draw(st.lists(values, min_size=count, max_size=count), label="scores")
    seq_len = data.draw(st.integers(0, 4 * count), label="seq_len")
    window = data.draw(st.one_of(st.just(0), st.integers(1, 4 * count)), label="window")
    sink, recent = data.draw(st.integers(0, 3), label="sink"), data.draw(st.integers(0, 3), label="recent")
    k = data.draw(st.integers(max(1, sink + recent), 12), label="k")
    got = reference.topk_pages(
        torch.tensor([[[row]]]), torch.tensor([seq_len]), k,
        page_size=4, sink_pages=sink, recent_pages=recent, window=window,
    )  # fmt: skip

    last = seq_len - 1
    first = max(0, last - window + 1) if window else 0
    candidates = list(range(first // 4, last // 4 + 1)) if seq_len else []

    def rank(page: int) -> tuple[int, float, int]:
        own = last // 4 - page
        if own < recent:
            return 0, own, page
        if page < sink:
            return 1, page, page
        if math.isnan(row[page]):
            return 3, 0.0, page
        return 2, -row[page] + 0.0, page

    chosen = sorted(sorted(candidates, key=rank)[:k])
    assert got[0, 0, 0].tolist() == chosen + [-1] * (k - len(chosen))


def test_selection_per_sequence_budget_and_physical_pages() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]).expand(3, 1, 1, 6)
    lens = torch.full((3,), 24, dtype=torch.int32)
    budget = torch.tensor([3, 0, 99], dtype=torch.int32)
    pages = reference.topk_pages(scores, lens, 4, page_size=4, budget_pages=budget)
    assert pages[:, 0, 0].tolist() == [[0, 2, 5, -1], [-1] * 4, [0, 2, 4, 5]]
    table = torch.tensor([[7, 3, 5]] * 3, dtype=torch.int32)
    physical = reference.topk_pages(scores, lens, 4, page_size=4, block_table=table, pages_per_block=2)
    assert physical[0, 0, 0].tolist() == [14, 6, 10, 11]


@given(spec=specs(dtype=torch.bfloat16))
@examples(5)
def test_fp32_oracle_agrees_with_fp64(spec: Spec) -> None:
    case = build(spec)
    table = (case.block_table, case.seq_lens)
    options = {**case.scoring, "rounded": False}
    exact = reference.page_scores(case.q, case.index, *table, **options)
    single = reference.page_scores(case.q, case.index, *table, **options, compute_dtype=torch.float32)
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-3)
    rounded = reference.page_scores(case.q, case.index, *table, **case.scoring)
    assert torch.equal(rounded, exact.bfloat16())
