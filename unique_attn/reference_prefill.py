"""What sparse prefill computes, in plain PyTorch: the oracle of the prefill ops.

Written to be read, one sequence at a time, with a dense mask. Source: UniSparse (arXiv 2512.14082) section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_mask(mask: Tensor, slot: int, num_queries: int, num_keys: int, block_q: int, block_k: int) -> Tensor:
    """bool ``[num_queries, Hm, num_keys]``: the keys that the last ``num_queries`` tokens of a sequence see.

    ``mask`` is the packed mask ``[slots, Hm, words]``; ``slot``: the row of the sequence's first query block.
    """
    rows = mask[slot + torch.arange(num_queries) // block_q]
    block = torch.arange(num_keys) // block_k
    listed = torch.zeros(num_queries, mask.shape[1], num_keys, dtype=torch.bool)
    reached = block < 32 * mask.shape[2]  # blocks past the last word are not listed
    listed[..., reached] = (rows[..., block[reached] // 32] >> (block[reached] % 32).int() & 1).bool()
    position = num_keys - num_queries + torch.arange(num_queries)
    return listed & (torch.arange(num_keys) <= position[:, None])[:, None]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``out`` ``[N, Hq, D]`` and ``lse`` ``[N, Hq]`` in ``compute_dtype`` (products in it, the softmax in fp32 or
    better), on the CPU. What a query does not see has no part in its result, NaN and all."""
    q, k, v, mask = (x.cpu() for x in (q, k, v, mask))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_heads, heads = q.shape[1], k.shape[1]
    wide = torch.promote_types(compute_dtype, torch.float32)
    out, lse = torch.zeros(q.shape, dtype=compute_dtype), torch.full(q.shape[:2], -torch.inf, dtype=wide)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        queries, keys = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        n, m = queries.stop - queries.start, keys.stop - keys.start
        seen = key_mask(mask, bounds_q[b] // block_q + b, n, m, block_q, block_k)
        for head in range(q_heads):
            kv_head, row = head * heads // q_heads, seen[:, head * mask.shape[1] // q_heads]
            part_q, part_k, part_v = (
                x.to(compute_dtype) for x in (q[queries, head], k[keys, kv_head], v[keys, kv_head])
            )
            logits = ((part_q @ part_k.mT).to(wide) * scale).masked_fill(~row, -torch.inf)
            some = row.any(-1)  # the others keep 0 and -inf
            weights = logits[some].softmax(-1).to(compute_dtype)
            attended = weights @ torch.where(part_v.isfinite(), part_v, 0.0)
            # NaN and infinity reach exactly those who see them.
            for j in (~part_v.isfinite()).any(-1).nonzero().flatten().tolist():
                hurt = row[some, j]
                bad = torch.where(part_v[j].isfinite(), 0.0, part_v[j])
                attended[hurt] += weights[hurt, j, None] * bad
            out[queries, head] = out[queries, head].index_put((some.nonzero().flatten(),), attended)
            lse[queries, head] = logits.logsumexp(-1)
    return out, lse
