"""``benchmarks.measure.block_shares``: estimates of shares of attention are what they are called, one of them what the
shipped op computes."""

from __future__ import annotations

import math

import pytest
import torch
from bench_prefill_cases import some_layer
from torch import Tensor

from benchmarks.measure.block_choice import SHIPPED, Way, select
from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.block_shares import AGGREGATES, block_shares, pool, value_weights
from benchmarks.measure.next_tokens import Layer
from unique_attn import ops

LENGTHS = [640, 300]  # whole blocks, and 44 queries, 4 pages and a half at the end
AGGREGATED = {"max": Tensor.amax, "mean": Tensor.mean}


def bounds(tokens: int, device: torch.device | None = None) -> Tensor:
    return torch.tensor([0, tokens], dtype=torch.int32, device=device)


def by_hand(layer: Layer, logits: Tensor, last: Tensor, size: int, of_block: Tensor, aggregate: str) -> Tensor:
    """``logits`` ``[Hq, P, groups of keys]`` of all pooled queries; ``of_block`` ``[P]``: their query blocks."""
    blocks = Blocks(len(layer.q))
    found = torch.zeros(blocks.slots, layer.q.shape[1], blocks.keys, dtype=torch.float64)
    first = size * torch.arange(logits.shape[-1])
    weights = (layer.scale * logits.double()).masked_fill(first > last[:, None], -torch.inf).softmax(-1)
    for block in range(blocks.queries):
        for key_block in range(blocks.keys):
            part = weights[:, of_block == block][..., first // 64 == key_block].sum(-1)
            found[block, :, key_block] = AGGREGATED[aggregate](part, 1)
    return found.float()


def per_head(layer: Layer) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[Hq, N, D]``."""
    return layer.q.transpose(0, 1), layer.k.repeat_interleave(layer.q.shape[1] // layer.k.shape[1], 1).transpose(0, 1)


# ---- Estimates. ----


@pytest.mark.parametrize("tokens", LENGTHS)
def test_oracle_is_true_attention(tokens: int):
    layer = some_layer(tokens)
    found = block_shares("oracle", layer, Blocks(tokens), ["max", "rms", "mean"])
    q, k = per_head(layer)
    position = torch.arange(tokens)
    for each in ("max", "mean"):
        wanted = by_hand(layer, q @ k.mT, position, 1, position // 128, each)
        torch.testing.assert_close(found[each], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found["mean"].sum(-1)[: Blocks(tokens).queries], torch.ones(Blocks(tokens).queries, 4), rtol=1e-5, atol=0
    )
    assert bool((found["mean"] <= found["rms"] + 1e-6).all())
    assert bool((found["rms"] <= found["max"] + 1e-6).all())


def test_aggregates():
    shares = torch.tensor([[[0.1, 0.9], [0.3, 0.7]]])
    assert AGGREGATES["mean"](shares).flatten().tolist() == pytest.approx([0.2, 0.8])
    assert AGGREGATES["rms"](shares).flatten().tolist() == pytest.approx([math.sqrt(0.05), math.sqrt(0.65)])
    assert AGGREGATES["max"](shares).flatten().tolist() == pytest.approx([0.3, 0.9])


@pytest.mark.parametrize("tokens", LENGTHS)
def test_shipped_way_is_the_shipped_op(device: torch.device, tokens: int):
    layer, blocks, cu = some_layer(tokens, device=device), Blocks(tokens), bounds(tokens, device)
    shares = block_shares("directional", layer, blocks, ["max"])["max"]
    op = ops.composite_blocks(layer.q, layer.k, cu, cu, tokens, tokens, scale=layer.scale)
    torch.testing.assert_close(shares, op, rtol=1e-3, atol=1e-5)
    for threshold in (0.02, 0.1):
        mask = select(SHIPPED, shares, blocks, threshold)
        _, _, wanted, _ = ops.unique_prefill(
            layer.q, layer.k, layer.v, cu, cu, tokens, tokens, scale=layer.scale, threshold=threshold
        )
        assert torch.equal(mask[: blocks.queries], wanted[: blocks.queries])
        flags = blocks.seen(device)[:, None] & (blocks.forced(device)[:, None] | (op[: blocks.queries] >= threshold))
        assert torch.equal(mask[: blocks.queries], ops.pack_block_mask(flags))


@pytest.mark.parametrize("tokens", LENGTHS)
def test_other_poolings_are_those_of_the_op(tokens: int):
    layer, cu = some_layer(tokens), bounds(tokens)
    wanted = ops.composite_blocks(layer.q, layer.k, cu, cu, tokens, tokens, pool_q=16, scale=layer.scale)
    found = block_shares("directional_16", layer, Blocks(tokens), ["max"])["max"]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    layer = some_layer(tokens, (2, 2))  # without groups, UniSparse pools no heads
    wanted = ops.composite_blocks(layer.q, layer.k, cu, cu, tokens, tokens, method="unisparse", scale=layer.scale)
    found = block_shares("mean", layer, Blocks(tokens), ["mean"])["mean"]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def ends(tokens: int, size: int) -> Tensor:
    return (size * torch.arange(1, -(-tokens // size) + 1)).clamp(max=tokens) - 1


@pytest.mark.parametrize("tokens", LENGTHS)
def test_antidiagonals(tokens: int):
    layer = some_layer(tokens)
    q, k = per_head(layer)
    groups = -(-tokens // 8)
    logits = torch.zeros(4, groups, groups)
    for a in range(groups):
        rows = min(8, tokens - 8 * a)
        for t in range(rows):  # query t of the group meets key 7 - t of each page
            keys = 7 - t + 8 * torch.arange(groups)
            there = keys < tokens
            logits[:, a, there] += torch.einsum("hd,hnd->hn", q[:, 8 * a + t], k[:, keys[there]]) / rows
    last = ends(tokens, 8)
    for each in ("max", "mean"):
        wanted = by_hand(layer, logits, last, 8, torch.arange(groups) // 16, each)
        found = block_shares("xattention", layer, Blocks(tokens), [each])[each]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_pooled_has_one_query_for_every_key(tokens: int):
    layer = some_layer(tokens)
    q, k = per_head(layer)
    logits = torch.stack(
        [
            torch.einsum("hd,hnd->hn", part.mean(1), k)
            + 2 * torch.einsum("hd,hnd->hn", part.var(1, correction=0), k.square()).sqrt()
            for part in q.split(128, 1)
        ],
        1,
    )
    wanted = by_hand(layer, logits, ends(tokens, 128), 1, torch.arange(logits.shape[1]), "mean")
    found = block_shares("pooled", layer, Blocks(tokens), [""])[""]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_extremes_are_the_queries_that_are_farthest_from_the_mean(tokens: int):
    layer = some_layer(tokens)
    q, k = per_head(layer)
    pooled, last, of_block = [], [], []
    for start in range(0, tokens, 16):
        part = q[:, start : start + 16]
        middle = part.mean(1)
        place = (part - middle[:, None]).norm(dim=-1).argmax(-1)
        pooled += [middle, part[torch.arange(4), place]]
        last += [min(start + 16, tokens) - 1] * 2
        of_block += [start // 128] * 2
    queries = torch.stack(pooled, 1)
    mean, var = pool(k, 8)
    logits = queries @ mean.mT + 2 * (queries.square() @ var.mT).sqrt()
    wanted = by_hand(layer, logits, torch.tensor(last), 8, torch.tensor(of_block), "max")
    found = block_shares("extreme", layer, Blocks(tokens), ["max"])["max"]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_combinations_and_values():
    layer, blocks = some_layer(300), Blocks(300)
    directional = block_shares("directional", layer, blocks, ["max"])["max"]
    pooled = block_shares("pooled", layer, blocks, [""])[""]
    union = block_shares("union", layer, blocks, [""])[""]
    mask = select(Way("union", ""), union, blocks, 0.1)
    both = select(SHIPPED, directional, blocks, 0.1) | select(Way("pooled", ""), pooled, blocks, 0.1)
    assert torch.equal(mask, both)
    torch.testing.assert_close(block_shares("average", layer, blocks, [""])[""], (directional + pooled) / 2)
    weights = value_weights(layer, blocks)
    norms = layer.v.norm(dim=-1)
    assert float(weights[2, 3]) == pytest.approx(float(norms[192:256, 1].mean() / norms[:, 1].mean()))
    assert float(weights[1, 4]) == pytest.approx(float(norms[256:, 0].mean() / norms[:, 0].mean()))
    torch.testing.assert_close(block_shares("directional_v", layer, blocks, ["max"])["max"], directional * weights)
    drawn = [block_shares("random", layer, blocks, [""], seed=seed)[""] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
