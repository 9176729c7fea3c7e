"""soft_mask_attention as autograd uses it: the same bits every time, gradcheck, any inputs, one derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_cases import CUDA_DTYPES, DEVICES, assert_same, assert_threads_agree, poisoned
from torch import Tensor
from training_cases import MODES, RESULTS, RULES, TrainCase, TrainSpec, assert_all_same, build, library_mask, run

from unique_attn import ops, train


def attend(case: TrainCase, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return ops.soft_mask_attention(q, k, v, *case.packing, **{**case.spec.scoring, **options})[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_repeats_and_stale_memory(device: str, dtype: torch.dtype, mode: str) -> None:
    case = build(TrainSpec((150, 3, 0), group=3, head_dim=64, page_size=8, dtype=dtype, mode=mode), device)
    mask = library_mask(case)
    first = run(case, mask)
    torch.use_deterministic_algorithms(True)
    try:
        again = [run(case, mask), dict(zip(RESULTS, poisoned(lambda: tuple(run(case, mask).values())), strict=True))]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in again:
        assert_all_same(other, first)


@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_bits(mode: str) -> None:
    for dtype in CUDA_DTYPES:
        case = build(TrainSpec((101, 0, 57), group=3, head_dim=40, dtype=dtype, mode=mode))
        assert_threads_agree(lambda: tuple(run(case).values()))  # noqa: B023


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(mode: str, rule: str) -> None:
    """The CPU op in fp64, the index recomputed from the keys, theta or the selection fixed. q is included where the
    spread has no query factor to detach: in rule `mean`, and with a spread of 0."""
    case = build(TrainSpec((19, 0, 9), group=2, head_dim=8, num_pages=3, dtype=torch.float64, rule=rule, mode=mode))
    mask = library_mask(case)
    assert mode != "soft" or int(mask["theta"].isfinite().sum()) > 10

    def function(q: Tensor, k: Tensor, v: Tensor, **options: float) -> Tensor:
        if mode == "soft":
            mask["index"] = train.packed_index(k, *case.packing, rule=rule, page_size=4)
        return attend(case, q, k, v, **mask, **options)

    q, k, v = case.leaves()
    if rule == "mean" or mode != "soft":
        gradcheck(function, q, k, v)
    else:
        gradcheck(lambda k, v: function(q.detach(), k, v), k, v)
        gradcheck(lambda q, k, v: function(q, k, v, spread_weight=0.0), q, k, v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_frozen_inputs(device: str, mode: str) -> None:
    """Any subset of q, k and v may require grad; the others' gradients are the same then."""
    case = build(TrainSpec((40, 9), mode=mode), device)
    mask, full = library_mask(case), run(case)
    for chosen in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        leaves = [x.detach().requires_grad_(i in chosen) for i, x in enumerate((case.q, case.k, case.v))]
        attend(case, *leaves, **mask).backward(case.grad_out)
        for i, (leaf, name) in enumerate(zip(leaves, ("dq", "dk", "dv"), strict=True)):
            assert (leaf.grad is not None) == (i in chosen)
            if leaf.grad is not None:
                assert_same(leaf.grad, full[name], name)
    with torch.no_grad():
        assert not attend(case, *case.leaves(), **mask).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_used_twice(device: str) -> None:
    case = build(TrainSpec((40, 9), group=1), device)
    mask, once = library_mask(case), run(case)
    q, k, v = case.leaves()
    out = attend(case, q, k, v, **mask) + attend(case, q, k, v, **mask) + 3 * q
    grads = torch.autograd.grad(out, (q, k, v), case.grad_out)
    torch.testing.assert_close(grads[0], 2 * once["dq"] + 3 * case.grad_out)
    torch.testing.assert_close(grads[1], 2 * once["dk"])
    torch.testing.assert_close(grads[2], 2 * once["dv"])
    tied = replace(case, v=case.k, q=case.k)  # q, k and v are one tensor
    leaf = case.k.detach().requires_grad_()
    parts = run(tied, mask)
    (grad,) = torch.autograd.grad(attend(tied, leaf, leaf, leaf, **mask), leaf, case.grad_out)
    torch.testing.assert_close(grad, parts["dq"] + parts["dk"] + parts["dv"])


def test_what_is_not_differentiable_says_so() -> None:
    case = build(TrainSpec((40,)))
    mask, leaves = library_mask(case), case.leaves()
    out, lse = ops.soft_mask_attention(*leaves, *case.packing, **mask, **case.spec.scoring)
    assert out.requires_grad
    assert not lse.requires_grad
    (dq,) = torch.autograd.grad(out, leaves[0], case.grad_out, create_graph=True)
    with pytest.raises(ops.NotDifferentiableError, match="differentiable once"):
        dq.sum().backward()
    for name in ("theta", "tau"):
        constants = {**mask, name: mask[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{name}: expected a tensor without gradient .* got requires_grad=True"):
            attend(case, *leaves, **constants)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_same_gates(device: str, reentrant: bool) -> None:
    case = build(TrainSpec((75, 22), group=3, dtype=torch.bfloat16), device)
    options = {"rule": case.spec.rule, "page_size": 4, "tau": case.tau}

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return train.masked_attention(q, k, v, *case.packing, case.spec.num_pages, **options)

    leaves = case.leaves()
    expected = torch.autograd.grad(layer(*leaves), leaves, case.grad_out)
    torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=reentrant).backward(case.grad_out)
    for leaf, grad in zip(leaves, expected, strict=True):
        assert_same(leaf.grad, grad)
