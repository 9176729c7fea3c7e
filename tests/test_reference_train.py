"""The training oracle against independent statements of the same: PyTorch's attention, the decode oracle, finite
differences, and cases worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import examples
from torch import Tensor
from training_cases import BOUNDARIES, RULES, TrainCase, TrainSpec, build, train_specs

from unique_attn import ops, reference, reference_train

DOUBLE = st.just(torch.float64)


def boundary(case: TrainCase, **options: Any) -> Tensor:
    args = (case.q, case.k, case.cu_seqlens, case.spec.num_pages)
    return reference_train.page_boundary(*args, **{**case.spec.scoring, **options})


def attend(case: TrainCase, *leaves: Tensor, **options: Any) -> Tensor:
    args = leaves or (case.q, case.k, case.v)
    return reference_train.soft_mask_attention(*args, case.cu_seqlens, **{**case.spec.scoring, **options})[0]


@pytest.mark.parametrize("rule", ["minmax", "median"])
def test_rules_that_cannot_be_trained_are_refused(rule: str) -> None:
    q = torch.zeros(8, 2, 16)
    with pytest.raises(ValueError, match=f"rule: expected mean, unique or directional, got '{rule}'"):
        reference_train.head_scores(q, q, rule, 4, 1.0, torch.float32)


# ---- Attention. ----


@given(spec=train_specs(dtype=DOUBLE, layout="dense"))
@examples(15)
def test_without_a_mask_it_is_causal_attention(spec: TrainSpec) -> None:
    case = build(spec)
    out = attend(case, scale=spec.scale)
    for part in case.sequences:
        q, k, v = (x[part].transpose(0, 1)[None] for x in (case.q, case.k, case.v))
        k, v = (x.repeat_interleave(spec.group, 1) for x in (k, v))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale)
        torch.testing.assert_close(out[part], expected[0].transpose(0, 1))


@pytest.mark.parametrize("rule", RULES)
def test_hard_mode_attends_as_the_decode_oracle_does(rule: str) -> None:
    """The last token of a sequence: the decode oracle's scores, selection and attention over a paged cache."""
    for length, num_pages in [(44, 4), (47, 5), (12, 2), (3, 2)]:
        spec = TrainSpec((length,), group=3, num_pages=num_pages, dtype=torch.float64, rule=rule)
        case = build(spec)
        blocks = -(-length // 4)
        caches = [F.pad(x, (0, 0, 0, 0, 0, blocks * 4 - length)) for x in (case.k, case.v)]
        k_cache, v_cache = (x.view(blocks, 4, 2, 16).transpose(1, 2).contiguous() for x in caches)
        index = reference.new_index(k_cache, rule=rule, page_size=4)
        table, lens = torch.arange(blocks, dtype=torch.int32)[None], torch.tensor([length], dtype=torch.int32)
        paging = {"rule": rule, "page_size": 4}
        reference.page_index(k_cache, index, table, 0 * lens, lens, max_new_tokens=length, **paging)
        state = (k_cache, v_cache, index, table, lens)
        out, lse, pages = reference.unique_decode(case.q[None, -1:], None, None, *state, num_pages, **paging)
        everywhere = pages[0].expand(length, -1, -1)
        got, got_lse = reference_train.soft_mask_attention(
            case.q, case.k, case.v, case.cu_seqlens, pages=everywhere, **spec.scoring
        )
        torch.testing.assert_close(got[-1], out[0, 0])
        torch.testing.assert_close(got_lse[-1], lse[0, 0])


def test_tau_towards_zero_is_the_hard_mask_and_towards_infinity_a_constant_gate() -> None:
    case = build(TrainSpec((75, 33), group=3, dtype=torch.float64))
    theta = boundary(case)
    candidates = torch.cat([reference_train.candidate_mask(n, n // 4, 4, 1, 1).sum(1) for n in (75, 33)])
    assert bool(((theta == -torch.inf) == (candidates <= 4)[:, None]).all())
    assert bool((theta > -torch.inf).any())
    pages = torch.full((108, 2, 18), -1)
    for part in case.sequences:
        args = ("directional", 4, 2.0, torch.float64)
        scores = reference_train.group_max(reference_train.head_scores(case.q[part], case.k[part], *args))
        above = scores > theta[part, :, None]
        pages[part, :, : scores.shape[-1]] = torch.where(above, torch.arange(scores.shape[-1]), -1)
    hard = attend(case, pages=pages)
    torch.testing.assert_close(attend(case, theta=theta, tau=1e-9), hard, rtol=1e-9, atol=1e-9)
    constant = attend(case, theta=theta, tau=1e9)
    for part in case.sequences:
        length = part.stop - part.start
        bias = torch.full((2, length, length), -torch.inf, dtype=torch.float64).triu(1)
        for t in range(length):
            bias[:, t, 4 : t // 4 * 4] += math.log(0.5) * (theta[part][t] > -torch.inf)[:, None]
        q, k, v = (x[part].transpose(0, 1)[None] for x in (case.q, case.k, case.v))
        k, v, bias = (x.repeat_interleave(3, -3) for x in (k, v, bias))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        torch.testing.assert_close(constant[part], expected[0].transpose(0, 1), rtol=1e-7, atol=1e-7)


# ---- Scores and the boundary. ----


@given(spec=train_specs(mode=st.just("soft")))
@examples(15)
def test_the_boundary_separates_what_decoding_selects(spec: TrainSpec) -> None:
    """The candidates whose (rounded) score is above theta are those that the decode oracle's top-k takes beside the
    sink and recent pages; of candidates at theta itself it takes the lowest."""
    case = build(spec)
    theta = boundary(case)
    for part in case.sequences:
        args = (spec.rule, spec.page_size, spec.weight, spec.dtype)
        scores = reference_train.group_max(
            reference_train.head_scores(case.q[part].double(), case.k[part].double(), *args)
        )
        scores = F.pad(scores.to(reference.score_dtype(spec.dtype)).double(), (0, 1))  # an incomplete page has none
        length = part.stop - part.start
        for t in {length - 1, length * 3 // 4, length // 2} if length else ():
            own = t // spec.page_size
            row = scores[t, :, : own + 1]
            chosen = reference.topk_pages(
                row[None, None], torch.tensor([t + 1]), spec.num_pages, page_size=spec.page_size,
                sink_pages=spec.sink_pages, recent_pages=spec.recent_pages,
            )[0, 0]  # fmt: skip
            inner = range(spec.sink_pages, own - spec.recent_pages + 1)
            for h in range(spec.kv_heads):
                bound = float(theta[part][t, h])
                taken = set(chosen[h].tolist()) & set(inner)
                above = {p for p in inner if float(row[h, p]) > bound}
                at = [p for p in inner if float(row[h, p]) == bound]
                assert taken == above | set(at[: len(taken) - len(above)])


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_the_decode_oracle(rule: str) -> None:
    case = build(TrainSpec((50,), group=3, head_dim=24, dtype=torch.bfloat16, rule=rule))
    q, k = case.q.double(), case.k.double()
    weight = ops.RULES[rule].weight
    got = reference_train.head_scores(q, k, rule, 4, weight, torch.bfloat16)
    paged = k[:48].view(12, 4, 2, 24).permute(2, 0, 1, 3)
    entry = tuple(part.bfloat16().double() for part in reference.page_entry(paged, rule))
    expected = torch.stack([reference.rule_score(q[t].view(2, 3, 24), entry, rule, weight) for t in range(50)])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("note", "scores", "wanted", "expected"), BOUNDARIES, ids=[row[0] for row in BOUNDARIES])
def test_boundary_by_hand(note: str, scores: list[float], wanted: int, expected: float) -> None:
    row = torch.tensor(scores, dtype=torch.float64).view(1, 1, -1)
    mask = torch.ones(1, len(scores), dtype=torch.bool)
    assert float(reference_train.boundary(row, mask, wanted, torch.float32)) == expected


def test_candidates_by_hand() -> None:
    """Page size 4, 2 sink and 2 recent pages: a query of page 5 may drop pages 2 and 3."""
    mask = reference_train.candidate_mask(24, 6, 4, 2, 2)
    assert mask[19].nonzero().flatten().tolist() == [2]
    assert [mask[t].nonzero().flatten().tolist() for t in (20, 23)] == [[2, 3]] * 2
    assert not mask[:16].any()


# ---- Gradients. ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["soft", "hard", "dense"])
def test_gradcheck(rule: str, mode: str) -> None:
    """With theta fixed and the query factor of the spread held constant, finite differences agree."""
    case = build(TrainSpec((19, 0, 9), group=2, head_dim=8, num_pages=3, dtype=torch.float64, rule=rule))
    mask: dict[str, Any] = {"theta": boundary(case), "tau": 1.3} if mode == "soft" else {}
    if mode == "hard":
        mask["pages"] = torch.tensor([0, 2, -1]).expand(28, 2, 3)
    assert mode != "soft" or int(mask["theta"].isfinite().sum()) > 10
    spread_q = case.q.clone()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(case, q, k, v, spread_q=spread_q, **mask)

    assert torch.autograd.gradcheck(function, case.leaves(), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("rule", ["unique", "directional"])
def test_the_query_factor_of_the_spread_is_constant(rule: str) -> None:
    """q's gradient is that with another tensor in the spread's term; and finite differences that move both differ."""
    case = build(TrainSpec((40,), dtype=torch.float64, rule=rule))
    theta = boundary(case)
    q, k, v = case.leaves()
    own, fixed = (
        torch.autograd.grad(attend(case, q, k, v, theta=theta, tau=1.0, spread_q=s), q, case.grad_out)[0]
        for s in (None, case.q.clone())
    )
    assert torch.equal(own, fixed)
    step = 1e-6 * case.grad_out
    moved = [(attend(case, q + d, k, v, theta=theta, tau=1.0) * case.grad_out).sum() for d in (step, -step)]
    slope = float((moved[0] - moved[1]).detach()) / 2
    assert abs(slope - float((own * step).sum())) > 1e-3 * abs(slope)


def test_the_lowest_of_equal_heads_gets_the_gradient() -> None:
    case = build(TrainSpec((40,), group=3, dtype=torch.float64, mode="hard"))
    q = case.q.view(40, 2, 3, 16)
    q[:, :, 2] = q[:, :, 1]
    q[:, 0, 0] = q[:, 0, 1]  # all three equal; for the other KV head the first is different
    leaf = q.clone().requires_grad_()
    scores = reference_train.group_max(
        reference_train.head_scores(leaf.view(40, 6, 16), case.k, "directional", 4, 2.0, torch.float64)
    )
    (grad,) = torch.autograd.grad(scores.sum(), leaf)
    assert bool((grad[:, 0, 0] != 0).any(-1).all())
    assert not grad[:, 0, 1:].any()
    assert not grad[:, 1, 2].any()


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_finite_where_the_variance_vanishes(rule: str) -> None:
    case = build(TrainSpec((40,), dtype=torch.float64, rule=rule, mode="hard"))
    case.k[:] = case.k[::4].repeat_interleave(4, 0)  # constant in every page
    q, k, v = case.leaves()
    theta = boundary(case)
    out = attend(case, q, k, v, theta=theta, tau=1.0)
    flat = attend(case, q, k, v, theta=theta, tau=1.0, rule="mean")
    torch.testing.assert_close(out, flat)
    for got, expected in zip(*(torch.autograd.grad(x, (q, k, v), case.grad_out) for x in (out, flat)), strict=True):
        torch.testing.assert_close(got, expected)


def test_rounded_entries_pass_gradients_straight_through() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    rounded = reference_train.round_through(x, torch.bfloat16)
    assert torch.equal(rounded, x.bfloat16().double())
    assert torch.equal(torch.autograd.grad(rounded.sum(), x)[0], torch.ones_like(x))
