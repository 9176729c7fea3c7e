"""What sparse prefill computes, in plain PyTorch: the oracle of the prefill ops.

Written to be read, one sequence at a time, with a dense mask. Source: UniSparse (arXiv 2512.14082) section 3.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor

# ---- How much of their attention the queries of a block give to each key block. ----


def composite_blocks(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    *,
    method: str = "directional",
    pool_q: int = 8,
    pool_k: int = 8,
    block_q: int = 128,
    block_k: int = 64,
    spread_weight: float | None = None,
    scale: float | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Shares ``[slots, Hm, key_blocks]`` on the CPU, fp32 (fp64 if ``compute_dtype`` is), of attention between means.

    Everything is computed in fp32 or better. Means are rounded to ``compute_dtype``, and if that has 16 bits, the
    numbers below the root to bf16 and weights to fp16: a run in the inputs' dtype rounds as the op may, one in fp64
    nothing.
    """
    q, k = q.cpu(), k.cpu()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weight = 2.0 if spread_weight is None else spread_weight
    wide = torch.promote_types(compute_dtype, torch.float32)
    narrow = torch.bfloat16 if compute_dtype.itemsize == 2 else wide
    heads = k.shape[1]
    share_heads = heads if method == "unisparse" else q.shape[1]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    slots = q.shape[0] // block_q + len(bounds_q) - 1
    shares = torch.zeros(slots, share_heads, -(-max_seqlen_k // block_k), dtype=wide)
    for b in range(len(bounds_q) - 1):
        queries = q[bounds_q[b] : bounds_q[b + 1]].to(wide)
        keys = k[bounds_k[b] : bounds_k[b + 1]].to(wide)
        n, m = len(queries), len(keys)
        if n == 0:
            continue
        # The query heads of a row of the shares are a dimension of their own, of 1 but for unisparse.
        grouped = queries.unflatten(1, (share_heads, -1))
        composite = torch.stack([part.mean((0, 2)) for part in grouped.split(pool_q)])
        mean = torch.stack([page.mean(0) for page in keys.split(pool_k)])
        var = torch.stack([(page - page.mean(0)).square().mean(0) for page in keys.split(pool_k)])
        composite, mean = composite.to(compute_dtype).to(wide), mean.to(compute_dtype).to(wide)
        square, var = composite.square().to(narrow).to(wide), var.to(narrow).to(wide)
        last = m - n + (pool_q * torch.arange(1, len(composite) + 1)).clamp(max=n) - 1  # position of the last query
        first_key = pool_k * torch.arange(len(mean))
        seen = first_key <= last[:, None]
        for head in range(share_heads):
            kv_head = head * heads // share_heads
            logits = composite[:, head] @ mean[:, kv_head].mT
            if method == "directional":
                logits = logits + weight * (square[:, head] @ var[:, kv_head].mT).sqrt()
            weights = (scale * logits).masked_fill(~seen, -torch.inf).softmax(-1)  # a NaN makes the whole row NaN
            weights = weights.masked_fill(~seen, 0.0)
            mass = torch.zeros(len(composite), shares.shape[2], dtype=wide)
            mass.index_add_(1, first_key // block_k, weights)
            if compute_dtype.itemsize == 2:
                mass = mass.half().to(wide)
            for i, part in enumerate(mass.split(block_q // pool_q)):  # the composite queries of query block i
                together = part.mean(0) if method == "unisparse" else part.amax(0)
                shares[bounds_q[b] // block_q + b + i, head] = together
    return shares


# ---- Which key blocks are kept. ----


def kept_blocks(
    shares: list[float],
    forced: list[bool],
    threshold: float | None,
    top_p: float | None,
    min_blocks: int,
    max_blocks: int | None,
) -> tuple[list[int], float]:
    """The blocks of one row that are kept, in the order of choice, and the part of all shares that they have.

    ``shares`` and ``forced``: of the key blocks that the query block sees. Shares and ``threshold`` are fp32 numbers;
    sums are of whole numbers of 2^-32, to which shares are rounded, halves up.
    """
    shares = [share if math.isnan(share) else min(max(share, 0.0), 1.0) for share in shares]
    whole = [0 if math.isnan(share) else math.floor(share * 2**32 + 0.5) for share in shares]
    total = sum(whole)

    def rank(block: int) -> tuple[bool, bool, float, int]:
        nan = math.isnan(shares[block])
        return not forced[block], not nan, 0.0 if nan else -shares[block], block

    order = sorted(range(len(shares)), key=rank)
    if top_p == 1:
        threshold, top_p = 0.0, None
    if threshold is not None:
        wanted = [math.isnan(shares[block]) or shares[block] >= threshold for block in order]
        count = max((i + 1 for i in range(len(order)) if wanted[i]), default=0)
    else:
        assert top_p is not None
        goal = math.ceil(top_p * float(total))
        sums = [0, *accumulate(whole[block] for block in order)]
        count = next(i for i in range(len(sums)) if sums[i] >= goal)
    count = max(count, min(min_blocks, len(order)), sum(forced))
    if max_blocks is not None:
        count = min(count, max(max_blocks, sum(forced)))
    kept = order[:count]
    return kept, sum(whole[block] for block in kept) / total if total else 1.0


def select_blocks(
    shares: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    threshold: float | None = None,
    top_p: float | None = None,
    min_blocks: int = 0,
    max_blocks: int | None = None,
    block_q: int = 128,
    block_k: int = 64,
) -> tuple[Tensor, Tensor]:
    """The packed mask int32 ``[slots, Hm, words]`` and ``kept`` fp32 ``[slots, Hm]``, on the CPU, by whole numbers:
    the op's results bit for bit. Shares of fp64 count as fp32, and so does ``threshold``."""
    threshold = None if threshold is None else torch.tensor(threshold, dtype=torch.float32).item()
    slots, heads, key_blocks = shares.shape
    words = torch.zeros(slots, heads, -(-key_blocks // 32), dtype=torch.int64)
    kept = torch.ones(slots, heads)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        n, m = bounds_q[b + 1] - bounds_q[b], bounds_k[b + 1] - bounds_k[b]
        for i in range(-(-n // block_q)):
            first, last = m - n + i * block_q, m - n + min((i + 1) * block_q, n) - 1  # positions of queries
            visible = min(last // block_k + 1, key_blocks)
            forced = [j == 0 or first // block_k <= j <= last // block_k for j in range(visible)]
            slot = bounds_q[b] // block_q + b + i
            for head in range(heads):
                row = shares[slot, head, :visible].float().tolist()
                blocks, part = kept_blocks(row, forced, threshold, top_p, min_blocks, max_blocks)
                kept[slot, head] = part
                for block in blocks:
                    words[slot, head, block // 32] |= 1 << block % 32
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int(), kept  # bit 31 is the sign


# ---- Attention over the blocks that are kept. ----


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


# ---- All of it. ----


def unique_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    *,
    method: str = "directional",
    threshold: float | None = None,
    top_p: float | None = None,
    min_blocks: int = 0,
    max_blocks: int | None = None,
    pool_q: int = 8,
    pool_k: int = 8,
    block_q: int = 128,
    block_k: int = 64,
    spread_weight: float | None = None,
    scale: float | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``lse``, ``mask`` and ``kept`` of the three steps above, one after the other. One of ``threshold`` and
    ``top_p`` is given."""
    shares = composite_blocks(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_k,
        method=method, pool_q=pool_q, pool_k=pool_k, block_q=block_q, block_k=block_k,
        spread_weight=spread_weight, scale=scale, compute_dtype=compute_dtype,
    )  # fmt: skip
    mask, kept = select_blocks(
        shares, cu_seqlens_q, cu_seqlens_k,
        threshold=threshold, top_p=top_p, min_blocks=min_blocks, max_blocks=max_blocks,
        block_q=block_q, block_k=block_k,
    )  # fmt: skip
    out, lse = block_sparse_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, mask,
        block_q=block_q, block_k=block_k, scale=scale, compute_dtype=compute_dtype,
    )  # fmt: skip
    return out, lse, mask, kept
