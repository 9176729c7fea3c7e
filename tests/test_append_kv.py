"""append_kv writes exactly the slots it is given, in every layout, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CACHE_LAYOUTS,
    CUDA_DTYPES,
    DEVICES,
    DTYPES,
    HEAD_DIMS,
    Q_LAYOUTS,
    assert_same,
    copy_strided,
    empty_cache,
    examples,
    token_layout,
)
from torch import Tensor

from unique_attn import ops, reference


def check(
    device: str, dtype: torch.dtype, dim: int, heads: int, cache_layout: str, layout: str, slots: list[int]
) -> None:
    dtype = torch.float32 if device == "cuda" and dtype == torch.float64 else dtype
    random = torch.Generator().manual_seed(len(slots) + dim)
    shape = (5, heads, 6, dim)

    def tokens() -> Tensor:
        dense = torch.randn(1, len(slots), heads, dim, generator=random, dtype=torch.float64).to(dtype)
        return copy_strided(token_layout(dense, layout)[0], device)

    caches = [empty_cache(shape, cache_layout, dtype) for _ in range(2)]
    for i, cache in enumerate(caches):
        cache.copy_(torch.arange(cache.numel()).view(shape) % 97 + 100 * i)
    k, v, mapping = tokens(), tokens(), torch.tensor(slots, dtype=torch.int64)
    got = [copy_strided(cache, device) for cache in caches]
    ops.append_kv(k, v, *got, mapping.to(device))
    reference.append_kv(k.cpu(), v.cpu(), *caches, mapping)
    for name, written, expected in zip(("k_cache", "v_cache"), got, caches, strict=True):
        whole = torch.as_strided(written, (written.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0)
        wanted = torch.as_strided(expected, whole.shape, (1,), 0)
        assert_same(whole, wanted, name)  # the memory between the elements too


@pytest.mark.parametrize("device", DEVICES)
@given(
    dtype=st.sampled_from(DTYPES),
    dim=st.sampled_from(HEAD_DIMS),
    heads=st.integers(1, 4),
    cache_layout=st.sampled_from(CACHE_LAYOUTS),
    layout=st.sampled_from(Q_LAYOUTS),
    slots=st.lists(st.integers(0, 29), unique=True, max_size=12),
    skips=st.lists(st.integers(0, 12), max_size=3),
)
@examples(40)
def test_equals_the_oracle(
    device: str, dtype: torch.dtype, dim: int, heads: int, cache_layout: str, layout: str,
    slots: list[int], skips: list[int],
) -> None:  # fmt: skip
    for i, place in enumerate(skips):
        slots.insert(min(place, len(slots)), [-1, -7, -(2**62)][i])
    check(device, dtype, dim, heads, cache_layout, layout, slots)


@pytest.mark.parametrize("device", DEVICES)
def test_bits_are_copied(device: str) -> None:
    """NaN payloads, infinities, -0 and denormals arrive as they were."""
    for dtype in CUDA_DTYPES:
        kind = torch.int32 if dtype == torch.float32 else torch.int16
        bits = torch.randint(-(2**15), 2**15, (3, 2, 8), generator=torch.Generator().manual_seed(0)).to(kind)
        tokens = bits.view(dtype).to(device)
        k_cache, v_cache = (torch.zeros(2, 2, 4, 8, dtype=dtype, device=device) for _ in range(2))
        ops.append_kv(tokens, tokens, k_cache, v_cache, torch.tensor([5, 0, 3], device=device))
        for cache in (k_cache, v_cache):
            assert_same(torch.stack([cache[1, :, 1], cache[0, :, 0], cache[0, :, 3]]), tokens)


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens(device: str) -> None:
    """A prefill: every slot of the cache once, in random order."""
    slots = torch.randperm(30 * 64, generator=torch.Generator().manual_seed(2))
    k_cache, v_cache = (torch.zeros(30, 3, 64, 40, device=device, dtype=torch.bfloat16) for _ in range(2))
    k = torch.randn(len(slots), 3, 40, device=device, dtype=torch.bfloat16)
    ops.append_kv(k, -k, k_cache, v_cache, slots.to(device))
    flat = k_cache.transpose(1, 2).flatten(0, 1)[slots.to(device)]
    assert_same(flat, k)
    assert_same(v_cache, -k_cache)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_append(device: str) -> None:
    caches = [torch.ones(2, 2, 4, 8, device=device) for _ in range(2)]
    none = torch.zeros(0, 2, 8, device=device)
    ops.append_kv(none, none, *caches, torch.zeros(0, dtype=torch.int64, device=device))
    some = torch.zeros(3, 2, 8, device=device)
    ops.append_kv(some, some, *caches, torch.full((3,), -1, device=device))
    assert all(bool((cache == 1).all()) for cache in caches)
