"""soft_mask_attention, forward and backward, against the oracle and against what it must equal exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CUDA_DTYPES, DEVICES, DTYPES, assert_same, examples
from training_cases import (
    LAYOUTS,
    MODES,
    RESULTS,
    RULES,
    TrainSpec,
    assert_all_same,
    assert_attention,
    build,
    library_mask,
    run,
    train_specs,
)

# ---- Values. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(20)
def test_equals_the_oracle(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(train_specs(dtype=dtype)), device)
    mask = library_mask(case)
    assert_attention(case, run(case, mask), mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_soft_gates_of_typical_shapes(device: str, dtype: torch.dtype, rule: str) -> None:
    """What models have: several tiles of queries and keys, groups of any size, tuned head sizes and the largest."""
    shapes = [(4, 128, 8, (200, 77)), (3, 64, 4, (131,)), (7, 64, 16, (150, 1)), (2, 256, 8, (140, 9))]
    for group, head_dim, page_size, lengths in shapes:
        spec = TrainSpec(lengths, 1, group, head_dim, page_size, num_pages=5, dtype=dtype, rule=rule)
        case = build(spec, device)
        mask = library_mask(case)
        assert_attention(case, run(case, mask), mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_mode_is_causal_attention(device: str, dtype: torch.dtype) -> None:
    case = build(TrainSpec((90, 1, 37), group=3, head_dim=24, dtype=dtype, mode="dense"), device)
    got = run(case)
    dtype = case.spec.dtype
    leaves = case.leaves()
    outs = []
    for part in case.sequences:
        q, k, v = (x[part].transpose(0, 1)[None] for x in leaves)
        k, v = (x.repeat_interleave(3, 1) for x in (k, v))
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
    grads = torch.autograd.grad(torch.cat(outs), leaves, case.grad_out)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-5}.get(dtype, 8 * torch.finfo(dtype).eps)
    for name, expected in zip(("out", "dq", "dk", "dv"), (torch.cat(outs), *grads), strict=True):
        torch.testing.assert_close(got[name], expected.detach(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_masks_that_hide_nothing_equal_dense_mode(device: str, dtype: torch.dtype) -> None:
    """Hard with every page, soft where theta is -inf, and any mask on sequences without candidates: same bits."""
    spec = TrainSpec((75, 33), group=3, head_dim=40, dtype=dtype, mode="dense")
    case = build(spec, device)
    dense = run(case)
    for mode in ("soft", "hard"):
        generous = replace(case, spec=replace(spec, mode=mode, num_pages=19))
        assert_all_same(run(generous), dense)
    none = torch.full((108, 2, 1), -1, dtype=torch.int32, device=device)
    assert_all_same(run(replace(case, spec=replace(spec, sink_pages=19)), {"pages": none}), dense)
    assert_all_same(run(replace(case, spec=replace(spec, recent_pages=19)), {"pages": none}), dense)
    short = build(replace(spec, lengths=(8, 4, 0, 1)), device)
    for mode in ("soft", "hard"):
        tight = replace(short, spec=replace(short.spec, mode=mode, num_pages=2))
        assert_all_same(run(tight), run(short))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_tau_towards_zero_is_the_hard_mask(device: str, dtype: torch.dtype, rule: str) -> None:
    """On queries whose boundary separates two scores; a gate whose score is theta itself stays 1/2."""
    case = build(TrainSpec((90, 33), group=3, head_dim=40, dtype=dtype, rule=rule), device)
    mask = library_mask(case)
    pages = library_mask(replace(case, spec=replace(case.spec, mode="hard")))
    for tau in (1e-5, 1e-30):
        soft = run(case, {**mask, "tau": torch.tensor(tau, device=device)})
        hard = run(case, pages)
        # The gates use unrounded scores: with 16-bit keys theta may lie on the wrong side of one of them.
        same = torch.isclose(soft["lse"], hard["lse"], rtol=1e-5, atol=1e-5).all(1)
        assert float(same.float().mean()) > (0.99 if dtype == torch.float32 else 0.8)
        assert all(bool(value.isfinite().all()) for value in soft.values())
        tolerance = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(soft["out"][same], hard["out"][same], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_tau_towards_infinity_is_a_constant_gate(device: str, dtype: torch.dtype) -> None:
    """log(1/2) on the candidates of a query that has a boundary."""
    case = build(TrainSpec((75, 33), group=3, dtype=dtype, tau=1e30), device)
    mask = library_mask(case)
    got = run(case, mask)
    bounded = (mask["theta"] > -torch.inf).cpu()
    leaves = case.leaves(torch.float64)
    outs = []
    for part in case.sequences:
        length = part.stop - part.start
        bias = torch.full((2, length, length), -torch.inf, dtype=torch.float64).triu(1)
        for t in range(length):
            bias[:, t, 4 : t // 4 * 4] += math.log(0.5) * bounded[part][t][:, None]
        q, k, v = (x[part].transpose(0, 1)[None] for x in leaves)
        k, v, bias = (x.repeat_interleave(3, -3) for x in (k, v, bias))
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[0].transpose(0, 1))
    grads = torch.autograd.grad(torch.cat(outs), leaves, case.grad_out.cpu().double())
    tolerance = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for name, expected in zip(("out", "dq", "dk", "dv"), (torch.cat(outs), *grads), strict=True):
        torch.testing.assert_close(got[name].cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_the_lowest_of_equal_heads_gets_the_gradient(device: str, rule: str) -> None:
    """Heads 1 and 2 of KV head 0 are the same, all of KV head 1: as in the oracle, which has a test of its own."""
    case = build(TrainSpec((60,), group=3, rule=rule, mode="hard", tau=1.0), device)
    q = case.q.view(60, 2, 3, 16)
    q[:, 0, 1], q[:, 0, 2] = 2 * q[:, 0, 0], 2 * q[:, 0, 0]
    q[:, 1, 0], q[:, 1, 2] = q[:, 1, 1], q[:, 1, 1]
    case = replace(case, spec=replace(case.spec, mode="soft"))
    mask = library_mask(case)
    got = run(case, mask)
    assert_attention(case, got, mask)
    assert not torch.equal(got["dq"][:, 3], got["dq"][:, 4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_where_the_variance_vanishes(device: str, dtype: torch.dtype, rule: str) -> None:
    """Every page constant: the spread adds nothing, to no gradient either (no 0 / 0). And nearly constant ones."""
    case = build(TrainSpec((60, 22), group=2, dtype=dtype, rule=rule), device)
    case.k.copy_((case.k * 8).round() / 8)  # means are exact
    for part in case.sequences:
        keys = case.k[part]
        whole = len(keys) // 4 * 4
        keys[:whole] = keys[:whole:4].repeat_interleave(4, 0)
    flat = replace(case, spec=replace(case.spec, rule="mean"))
    got, expected = run(case), run(flat)
    for name in RESULTS:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)
    tiny = torch.finfo(dtype).smallest_normal * 4
    for noise in (tiny, 1e-20, 1e-4):
        case.k.add_(noise * torch.randn(case.k.shape, generator=torch.Generator().manual_seed(0)).to(case.k))
        assert all(bool(value.isfinite().all()) for value in run(case).values())


@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_and_scores_do_not_overflow(device: str) -> None:
    for dtype in CUDA_DTYPES:
        case = build(TrainSpec((75,), group=2, head_dim=64, dtype=dtype, tau=0.1), device)
        case.q.mul_(100.0)
        assert all(bool(value.isfinite().all()) for value in run(case).values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_large_fp16_keys(device: str, rule: str) -> None:
    """Keys whose spread over all channels has no fp16 number. With one head a group no best one is in doubt."""
    for head_dim in (64, 72, 128):
        case = build(TrainSpec((75, 40), 2, 1, head_dim, dtype=torch.float16, rule=rule, mode="hard"), device)
        case.k.mul_(2e4).clamp_(-65504.0, 65504.0)
        case.q.mul_(2.0**-12)
        case.grad_out.mul_(2.0**-6)  # or dq itself has no fp16 number
        case = replace(case, spec=replace(case.spec, mode="soft"))
        mask = library_mask(case)
        got = run(case, mask)
        assert all(bool(value.isfinite().all()) for value in got.values())
        assert_attention(case, got, mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_a_nan_query_stays_with_its_head_or_group(device: str, mode: str) -> None:
    case = build(TrainSpec((75,), group=3, mode=mode), device)
    mask = library_mask(case)
    clean = run(case, mask)
    case.q[40, 4, 3] = torch.nan  # the second head of KV head 1
    got = run(case, mask)
    hurt = got["out"].isnan().any(-1)
    group = slice(3, 6) if mode == "soft" else slice(4, 5)  # the score of a page is NaN if any head's is
    assert hurt.nonzero().tolist() == [[40, head] for head in range(6)[group]]
    assert_same(got["out"][~hurt], clean["out"][~hurt])


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_hard_mode_does_not_read_what_is_not_selected(dtype: torch.dtype, poison: float) -> None:
    """As in decoding: keys and values of a page hurt the queries that see it and what those give gradients to. On CUDA
    a tile's keys are multiplied by all of a tile's queries, and 0 times NaN is NaN."""
    case = build(TrainSpec((75, 33), group=3, head_dim=40, dtype=dtype, mode="hard"), "cpu")
    pages = library_mask(case)["pages"]
    hurt = slice(12, 16)  # page 3 of the first sequence, where queries from 16 on do not select it
    pages[16:75] = torch.where(pages[16:75] == 3, 2, pages[16:75])
    clean = run(case, {"pages": pages})
    case.k[hurt] = poison
    case.v[hurt] = poison
    got = run(case, {"pages": pages})
    assert not got["out"][hurt].isfinite().any()
    for name in RESULTS:
        before = slice(
            0, 12 if name in ("out", "lse", "dq") else 0
        )  # dk and dv there come from queries of the page too
        for part in (before, slice(16, None)):
            assert_same(got[name][part], clean[name][part], name)


@pytest.mark.parametrize("rule", [*RULES, "minmax"])
def test_a_page_of_nan_keys_is_not_selected(rule: str) -> None:
    """Where there are other pages to select: from page 6 on a query has five candidates and takes four."""
    case = build(TrainSpec((75,), group=3, mode="hard", rule=rule), "cpu")
    case.k[9], case.v[9] = torch.nan, torch.nan
    mask = library_mask(case)
    assert not (mask["pages"][24:] == 2).any()
    got = run(case, mask)
    assert got["out"].isnan().any(-1).any(-1).nonzero().flatten().tolist() == list(range(9, 24))
    assert all(bool(got[name][24:].isfinite().all()) for name in RESULTS)


# ---- Packing, layouts, padding. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@given(data=st.data())
@examples(8)
def test_packed_sequences_are_as_if_alone(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(train_specs(dtype=dtype)), device)
    packed = run(case)
    for part in case.sequences:
        assert_all_same(run(case.alone(part)), packed, part)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_padding_on_the_right_changes_nothing(device: str, mode: str) -> None:
    """A padded batch as sequences of one length: what real tokens get and give is the same, whatever the padding is."""
    case = build(TrainSpec((61, 38, 1), group=2, mode=mode), device)
    expected = run(case)
    padded = build(TrainSpec((64, 64, 64), group=2, mode=mode, seed=5), device)
    rows = torch.cat([64 * b + torch.arange(n) for b, n in enumerate(case.spec.lengths)]).to(device)
    padded.grad_out.zero_()  # no loss on padding
    for name in ("q", "k", "v", "grad_out"):
        getattr(padded, name)[rows] = getattr(case, name)
    assert_all_same({name: value[rows] for name, value in run(padded).items()}, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_strides_do_not_matter(device: str, dtype: torch.dtype, mode: str) -> None:
    spec = TrainSpec((70, 21), group=3, head_dim=40, dtype=dtype, mode=mode)
    expected = run(build(spec, device))
    for layout in LAYOUTS[1:]:
        got = run(build(replace(spec, layout=layout), device))
        assert_all_same(got, expected)
    case = build(spec, device)
    ones = case.grad_out[:1, :1, :1].expand_as(case.grad_out)  # as sum().backward() gives it
    expanded = run(replace(case, grad_out=ones))
    assert_all_same(expanded, run(replace(case, grad_out=ones.contiguous())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_and_no_sequences(device: str, mode: str) -> None:
    for lengths in ((), (0,), (0, 0)):
        got = run(build(TrainSpec(lengths, mode=mode), device))
        assert [got[name].shape[0] for name in RESULTS] == [0] * 5
    case = build(TrainSpec((1, 0, 1), mode=mode), device)
    assert_same(run(case)["out"].view(2, 2, 2, 16)[:, :, 1], case.v)  # a token that sees itself alone
