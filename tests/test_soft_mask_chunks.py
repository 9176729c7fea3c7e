"""Sequences so long that the Hopper kernels cut them into chunks of queries and of keys: the same as in one piece."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from unique_attn import train

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def step(tensors: list[torch.Tensor], lengths: list[int], **options: object) -> list[torch.Tensor]:
    """out, dq, dk and dv of packed sequences."""
    q, k, v, grad = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    tau = torch.tensor(2.0, device="cuda")
    out = train.masked_attention(*leaves, bounds, max(lengths), 64, tau=tau, **options)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU on this machine")
@pytest.mark.parametrize("rule", ["directional", "unique"])
@pytest.mark.parametrize(("mode", "q_heads"), [("soft", 8), ("soft", 24), ("hard", 8)])
def test_chunks_equal_sequences_alone(rule: str, mode: str, q_heads: int) -> None:
    """Packed, the scores of 19000 tokens and 8 KV heads exceed a chunk; alone, those of a sequence fit into one."""
    lengths = [9001, 37, 9962]
    random = torch.Generator("cuda").manual_seed(0)
    heads = (q_heads, 8, 8, q_heads)
    tensors = [torch.randn(sum(lengths), n, 64, generator=random, device="cuda", dtype=torch.bfloat16) for n in heads]
    packed = step(tensors, lengths, rule=rule, mode=mode)
    sequences = zip(*(x.split(lengths) for x in tensors), strict=True)
    alone = [step(list(parts), [n], rule=rule, mode=mode) for n, parts in zip(lengths, sequences, strict=True)]
    for name, got, *parts in zip(("out", "dq", "dk", "dv"), packed, *alone, strict=True):
        expected = torch.cat(parts)
        difference = (got.float() - expected.float()).norm() / expected.float().norm()
        # Sums of the pages' gradients are grouped differently, and rounded to bf16 afterwards.
        assert difference <= 1e-4 if name != "dk" else difference <= 2e-3, (name, float(difference))
