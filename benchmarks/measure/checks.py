"""Outputs against ``unique_attn.reference``, on a few sequences of a batch.

Checks raise AssertionError with what is wrong. ``TOLERANCE`` is a relative error, norm against norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unique_attn import reference

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
SEQUENCES = 2  # of a batch that are computed twice


def some(batch: int) -> list[int]:
    """Sequences to look at: the first, the last."""
    return sorted({i * (batch - 1) // max(1, SEQUENCES - 1) for i in range(min(batch, SEQUENCES))})


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def close(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The relative error of ``found``; infinities must be equal."""
    infinite = expected.isinf()
    assert torch.equal(found.isinf(), infinite), f"{name}: infinities are elsewhere, or values were not written"
    difference = (found.double() - expected.double()).masked_fill(infinite, 0)
    norm = float(expected.double().masked_fill(infinite, 0).norm())
    error = float(difference.norm()) / max(norm, 1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, at most {tolerance:.0e} was expected"
    return error


def scores(
    found: torch.Tensor,
    q: torch.Tensor,
    index: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
    scoring: Mapping[str, Any],
) -> None:
    """``found`` are the scores of ``page_scores``, called with the keywords ``scoring``."""
    assert not found.isnan().any(), "scores: NaN, or values were not written"
    for b in some(len(q)):
        one = slice(b, b + 1)
        precision: dict[str, Any] = {"compute_dtype": compute_dtype(q.dtype)}
        expected = reference.page_scores(q[one], index, table[one], lens[one], **scoring, **precision)
        close("scores", found[one], expected, TOLERANCE[q.dtype])


def attention(
    found: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
    *,
    page_size: int,
) -> float:
    """``found`` are ``out`` and ``lse`` of attention to ``pages``. Returns the largest error of ``out``."""
    out, lse = found
    unwritten = out.isnan().any() | lse.isnan().any()
    assert not unwritten, "attention: NaN, or values were not written"
    worst = 0.0
    for b in some(len(q)):
        one = slice(b, b + 1)
        expected = reference.sparse_decode(
            q[one], k_cache, v_cache, pages[one], table[one], lens[one],
            page_size=page_size, compute_dtype=compute_dtype(q.dtype),
        )  # fmt: skip
        close("out", out[one], expected[0], TOLERANCE[q.dtype])
        close("lse", lse[one], expected[1], TOLERANCE[q.dtype])
        worst = max(worst, float((out[one].double() - expected[0].double()).abs().max()))
    return worst


def dense(
    found: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
) -> None:
    """``found`` ``[B, T, Hq, D]`` is attention to every token."""
    assert not found.isnan().any(), "dense attention: NaN, or values were not written"
    for b in some(len(q)):
        one = slice(b, b + 1)
        expected, _ = reference.dense_decode(
            q[one], k_cache, v_cache, table[one], lens[one], compute_dtype=compute_dtype(q.dtype)
        )
        close("dense attention", found[one], expected, TOLERANCE[q.dtype])


def selection(
    pages: torch.Tensor,
    q: torch.Tensor,
    index: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
    scoring: Mapping[str, Any],
) -> None:
    """``pages`` ``[B, T, H, k]`` are the best ones within the rounding of scores; first and own page are there."""
    ulp = 2.0**-8 if q.dtype in (torch.bfloat16, torch.float16) else 1e-5
    assert ((pages[..., 1:] > pages[..., :-1]) | (pages[..., 1:] == -1)).all(), "pages: not ascending, or not written"
    for b in some(len(q)):
        one = slice(b, b + 1)
        precision: dict[str, Any] = {"compute_dtype": compute_dtype(q.dtype), "rounded": False}
        values = reference.page_scores(q[one], index, table[one], lens[one], **scoring, **precision)
        assert pages[one].max() < values.shape[-1], "pages: out of range"
        own = (lens[b] - q.shape[1] + torch.arange(q.shape[1], device=q.device)) // scoring["page_size"]
        chosen = torch.zeros(values.shape, dtype=torch.int32, device=q.device)
        valid = pages[one] >= 0
        chosen.scatter_add_(-1, pages[one].clamp(min=0).long(), valid.int())
        taken = chosen > 0
        wanted = torch.minimum((own + 1), torch.tensor(pages.shape[-1], device=q.device))
        assert torch.equal(taken.sum(-1), wanted[None, :, None].expand(taken.shape[:3])), "pages: too few or too many"
        assert taken[..., 0].all(), "pages: the first page is missing"
        own = own.view(1, -1, 1, 1).expand(*taken.shape[:3], 1)
        assert taken.gather(-1, own).all(), "pages: the own page is missing"
        free = taken.clone()
        free[..., 0] = False
        free.scatter_(-1, own, False)
        least = values.masked_fill(~free, torch.inf).amin(-1)
        best_left = values.masked_fill(taken, -torch.inf).amax(-1)
        slack = 2 * ulp * torch.maximum(least.abs(), best_left.abs()).nan_to_num(posinf=0.0, neginf=0.0)
        ok = (least >= best_left - slack) | least.isinf() | best_left.isinf()
        assert ok.all(), "pages: a page with a larger score was left out"
