"""Causal attention with a gate per page, differentiable in q, k and v."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from unique_attn.ops._autocast import autocast_inputs
from unique_attn.ops._autograd import NotDifferentiableError
from unique_attn.ops._shared import same_device, softmax_scale
from unique_attn.rules import rule_info, weight_of


def soft_mask_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    index: torch.Tensor | None = None,
    theta: torch.Tensor | None = None,
    tau: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    rule: str = "directional",
    page_size: int = 8,
    spread_weight: float | None = None,
    sink_pages: int = 1,
    recent_pages: int = 1,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over packed sequences whose logits get ``log g`` of each key's page (UNIQUE section 4).

    Soft (``index``, ``theta`` and ``tau`` given): ``g = sigmoid((s - theta) / tau)`` on the candidate pages of a query
    (complete, neither sink nor recent), s the page's score. Hard (``pages`` given): g = 1 on the selected pages, 0 on
    the other candidates, which then count as little as in decoding (on the CPU not even a NaN in them is seen; on CUDA
    it is, by the queries of the same tile). Neither: dense. Gates are recomputed in the backward pass, never stored.

    Gradients reach q (logits, q . mean), k (logits, mean and spread of its page's entry) and v. theta, tau and the
    query factor of the spread are constants; the maximum over the group passes its gradient to the arg-max head (the
    lowest on ties), and the square root of the spread has gradient 0 where the variance vanishes. Differentiable once.

    Forward and backward are bitwise deterministic, also under ``torch.use_deterministic_algorithms``; extra memory is
    linear in N. Under ``torch.autocast`` q, k and v are cast to its dtype, as in ``scaled_dot_product_attention``;
    index and theta must come from the same autocast region.

    Args:
        q: ``[N, Hq, D]``, ``Hq = G * H`` with G from 1 to 16; bf16, fp16, fp32 (fp64 on the CPU); D a multiple of 8
            to 256 (to 128 for fp32 on CUDA).
        k: ``[N, H, D]``.
        v: ``[N, H, D]``.
        cu_seqlens: int32 ``[B + 1]``, the first token of each sequence and N, ascending from 0. On the CPU the values
            are checked; on CUDA with UNIQUE_ATTN_CHECK=1.
        max_seqlen: host-known upper bound of the sequence lengths.
        index: uint8 ``[slots, H, 1, entry_bytes]`` of these keys, from :func:`unique_attn.train.packed_index`.
        theta: ``[N, H]`` fp32 (fp64 for fp64) from :func:`page_boundary`.
        tau: 0-dim fp32 temperature on q's device, positive, in score units (raw q . k). A tensor, so that a schedule
            changes it without compiling again.
        pages: int32 ``[N, H, n]``, ascending logical pages of the query's sequence, padded with -1.
        rule: ``mean``, ``unique`` or ``directional``.
        page_size: tokens per page; pages start at each sequence's start.
        spread_weight: lambda of ``unique`` (default 0.5) or c of ``directional`` (default 2).
        sink_pages: first pages of a sequence, without a gate.
        recent_pages: last pages up to the query's own, without a gate; at least 1 with a mask.
        scale: factor of the logits, ``1 / sqrt(D)`` by default.

    Returns:
        ``out`` ``[N, Hq, D]`` and ``lse`` ``[N, Hq]`` fp32 (fp64), which carries no gradient.

    Raises:
        ValueError: a wrong rank, shape, dtype, device, stride or number, naming the argument; theta or tau that
            requires grad.
        NotDifferentiableError: a second derivative is asked for.
    """
    info = rule_info(rule)
    weight = weight_of(info, spread_weight)
    scale = softmax_scale(q) if scale is None else float(scale)
    if tau is not None and not isinstance(tau, torch.Tensor):
        raise ValueError(f"soft_mask_attention: tau: expected a 0-dim float32 tensor, got {tau!r}")
    for name, constant in (("theta", theta), ("tau", tau)):
        if constant is not None and constant.requires_grad:
            raise ValueError(
                f"soft_mask_attention: {name}: expected a tensor without gradient (it is a constant of the soft mask), "
                "got requires_grad=True"
            )
    q, k, v = autocast_inputs(q, k, v)
    return torch.ops.unique_attn.soft_mask_forward(
        q, k, v, cu_seqlens, max_seqlen, index, theta, tau, pages,
        page_size, info.id, weight, sink_pages, recent_pages, scale,
    )  # fmt: skip


@torch.library.register_fake("unique_attn::soft_mask_forward")
def _(q, k, v, cu_seqlens, max_seqlen, index, theta, tau, pages, *options):  # type: ignore[no-untyped-def]
    tensors = {"k": k, "v": v, "cu_seqlens": cu_seqlens, "index": index, "theta": theta, "tau": tau, "pages": pages}
    same_device("soft_mask_forward", q=q, **tensors)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=dtype)


@torch.library.register_fake("unique_attn::soft_mask_backward")
def _(grad_out, q, k, v, out, lse, cu_seqlens, max_seqlen, *rest):  # type: ignore[no-untyped-def]
    same_device("soft_mask_backward", q=q, grad_out=grad_out, k=k, v=v, out=out, lse=lse, cu_seqlens=cu_seqlens)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, max_seqlen, index, theta, tau, pages, *options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, index, theta, tau, pages)
    ctx.max_seqlen = max_seqlen
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_seqlens, index, theta, tau, pages = ctx.saved_tensors
    grads = torch.ops.unique_attn.soft_mask_backward(
        grad_out, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, index, theta, tau, pages, *ctx.options
    )
    return (*grads, *[None] * (6 + len(ctx.options)))


def _no_second_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise NotDifferentiableError("soft_mask_attention is differentiable once: its backward pass has no gradient")


torch.library.register_autograd("unique_attn::soft_mask_forward", _backward, setup_context=_setup_context)
torch.library.register_autograd("unique_attn::soft_mask_backward", _no_second_backward)
