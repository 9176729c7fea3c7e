"""The compressed index: its numbers and bytes, its error, keys with outliers, the attention mass that it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICES, HEAD_DIMS, Spec, build, examples
from torch import Tensor

from unique_attn import ops, reference, train
from unique_attn.index_format import decode_float8, group_channels, num_groups
from unique_attn.reference_index import encode_float8

COMPRESSIBLE = ["mean", "unique", "directional"]


def index_of(keys: Tensor, rule: str, index_format: str, page_size: int = 8) -> Tensor:
    """The op's index ``[pages, H, 1, entry_bytes]`` of keys ``[H, tokens, D]``, one page per block."""
    heads, tokens, dim = keys.shape
    pages = tokens // page_size
    cache = keys.view(heads, pages, page_size, dim).transpose(0, 1)
    index = ops.new_index(cache, rule=rule, page_size=page_size, index_format=index_format)
    table = torch.arange(pages, dtype=torch.int32, device=keys.device)[None]
    lens = torch.tensor([tokens], dtype=torch.int32, device=keys.device)
    paging = {"rule": rule, "page_size": page_size, "index_format": index_format}
    ops.page_index(cache, index, table, 0 * lens, lens, max_new_tokens=tokens, **paging)
    return index


def scores_of(q: Tensor, keys: Tensor, rule: str, index_format: str) -> Tensor:
    """Scores ``[n, H, pages]`` of queries ``[n, H, D]``, each of which sees all keys."""
    index = index_of(keys, rule, index_format)
    table = torch.arange(index.shape[0], dtype=torch.int32, device=q.device).repeat(len(q), 1)
    lens = torch.full((len(q),), keys.shape[1], dtype=torch.int32, device=q.device)
    scoring = {"rule": rule, "page_size": 8, "index_format": index_format}
    return ops.page_scores(q[:, None], index, table, lens, **scoring)[:, 0]


# ---- Numbers and bytes. ----


def test_float8() -> None:
    codes = torch.arange(0xF8)
    numbers = decode_float8(codes)
    assert numbers[0] == 0
    assert numbers[1] == 2.0**-17
    assert numbers[0x78] == 1
    assert numbers[0xF7] == 61440
    assert bool((numbers.diff() > 0).all())
    for up in (False, True):
        assert torch.equal(encode_float8(numbers, up=up), codes)
        assert torch.equal(encode_float8(torch.tensor([61441.0, 1e30]), up=up), torch.tensor([0xF7, 0xF7]))
    x = torch.cat([numbers[:-1] + f * numbers.diff() for f in (0.01, 0.49, 0.51, 0.99)])
    distance = (numbers - x[:, None]).abs()
    assert torch.equal(encode_float8(x), distance.argmin(1))
    assert torch.equal(encode_float8(x, up=True), (numbers < x[:, None]).sum(1))
    ties = (numbers[:-1] + numbers[1:]) / 2
    assert bool((encode_float8(ties) % 2 == 0).all())


def test_entry_sizes() -> None:
    def size(dim: int, rule: str = "directional") -> int:
        return ops.index_entry_bytes(rule, dim, torch.bfloat16, "compressed")

    assert [size(dim) for dim in (64, 128, 256)] == [64, 112, 224]
    assert [size(dim, "unique") for dim in (64, 128, 256)] == [48, 80, 160]
    assert all(size(dim, rule) % 16 == 0 for dim in range(8, 264, 8) for rule in COMPRESSIBLE)


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_of_a_page(device: str) -> None:
    """An example by hand: 16 channels, one outlier, channel 1 with a spread of 2, channel 2 with one of 1."""
    keys = torch.zeros(1, 8, 16, device=device)
    keys[0, :, :5] = torch.tensor([96.0, 7, -7, 3, -1])
    keys[0, :, 1] += torch.tensor([2.0, -2] * 4, device=device)
    keys[0, :, 2] += torch.tensor([1.0, -1] * 4, device=device)
    scales = [0x00, 0x56, 0x78, 0x70]  # 96 in fp16, a step of 1 = 7 / 7, a spread scale of 0.5 = 2 / 4
    means = [0x78, 0x39, 0x0F, 0, 0, 0, 0, 0]  # -8 and 7, -7 and 3, -1 and 0
    # Codes 3 (four times 0.5), 1 (twice) in channels 1 and 2, else 0: min(0.5, 1), which is closest to no spread.
    spreads = [3 << 2 | 1 << 4, 0, 0, 0]
    assert index_of(keys, "directional", "compressed").flatten().tolist() == scales + means + spreads
    mean, std = ops.decode_index(
        index_of(keys, "directional", "compressed"),
        rule="directional", dtype=torch.float32, index_format="compressed", head_dim=16,
    )  # fmt: skip
    assert mean.flatten().tolist() == [96, 7, -7, 3, -1] + [0] * 11
    assert std.flatten().tolist() == [0.5, 2, 1] + [0.5] * 13
    # `unique`: sqrt(4 + 1) lies between 2.25, code 0x79 + 0x08 - 0x00 of it, and 2.
    got = index_of(keys, "unique", "compressed").flatten().tolist()
    assert got[:12] == [*scales[:3], 0x81, *means]
    assert decode_float8(torch.tensor(0x81)) == 2.25


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@examples(30)
def test_error_of_every_channel(device: str, data: st.DataObject) -> None:
    """Means err by a twelfth of their group's second largest, spreads by 0.3 of the largest; outliers like fp16."""
    dim = data.draw(st.sampled_from(HEAD_DIMS), label="D")
    sizes = data.draw(st.lists(st.sampled_from([1e-3, 1.0, 1.0, 1.0, 30.0]), min_size=dim, max_size=dim), label="sizes")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    keys = (torch.randn(2, 24, dim, generator=random) + torch.randn(dim, generator=random)) * torch.tensor(sizes)
    index = index_of(keys.to(device), "directional", "compressed").cpu()
    stored = {"rule": "directional", "dtype": torch.float32}
    got = ops.decode_index(index, **stored, index_format="compressed", head_dim=dim)
    exact = ops.decode_index(index_of(keys.to(device), "directional", "exact").cpu(), **stored)
    size = group_channels(dim)
    for first in range(0, dim, size):
        (mean, std), (m, s) = ([part[..., first : first + size] for part in parts] for parts in (got, exact))
        largest = m.abs().sort(-1, descending=True).values
        second = largest[..., 1:2]
        tolerance = torch.where(m.abs() == largest[..., :1], 2.0**-11 * m.abs(), second / 12 + 2.0**-17)
        assert bool(((mean - m).abs() <= tolerance + 1e-6).all())
        assert bool(((std - s).abs() <= 0.3 * s.amax(-1, keepdim=True) + 2.0**-17).all())
    assert num_groups(dim) * size >= dim


# ---- Awkward keys. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", COMPRESSIBLE)
def test_huge_and_tiny_keys(device: str, rule: str) -> None:
    """Numbers that the scales cannot hold are cut, not lost: the other pages keep their scores."""
    random = torch.Generator().manual_seed(0)
    q, keys = torch.randn(3, 1, 64, generator=random).to(device), torch.randn(1, 64, 64, generator=random).to(device)
    clean = scores_of(q, keys, rule, "compressed")
    for factor in (1e8, 1e-8, 1e30):
        changed = keys.clone()
        changed[:, 16:24] *= factor
        scores = scores_of(q, changed, rule, "compressed")
        others = [0, 1, 3, 4, 5, 6, 7]
        assert torch.equal(scores[..., others], clean[..., others])
        if factor < 1e30:  # whose variance has no fp32 number
            assert bool(scores.isfinite().all())
    assert float(scores_of(q, keys * 1e-8, rule, "compressed").abs().max()) < 1e-3


def kept_mass(q: Tensor, keys: Tensor, rule: str, index_format: str, budget: int) -> float:
    """Attention mass, mean over queries and heads, of the pages with the best scores."""
    weights = (torch.einsum("nhd,hld->nhl", q.double(), keys.double()) * q.shape[-1] ** -0.5).softmax(-1)
    best = scores_of(q, keys, rule, index_format).topk(budget // 8).indices
    return float(weights.unflatten(-1, (-1, 8)).sum(-1).gather(-1, best).sum(-1).mean())


def synthetic(dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries ``[64, 4, D]`` and keys ``[4, 4096, D]``: neighbouring keys are alike, and queries look for some."""
    random = torch.Generator().manual_seed(seed)
    topics = torch.randn(4, 256, dim, generator=random).repeat_interleave(16, 1)
    keys = topics + torch.randn(4, 4096, dim, generator=random) + torch.randn(4, 1, dim, generator=random)
    q = keys[:, ::64].transpose(0, 1) * 0.5 + torch.randn(64, 4, dim, generator=random)
    return q * (64 / dim) ** 0.5, keys


def shifted(q: Tensor, keys: Tensor, channels: list[int]) -> tuple[Tensor, Tensor]:
    """A key bias: some channels are a hundred times as large. It moves all logits of a query alike."""
    keys = keys.clone()
    keys[..., channels] += 100 * keys.std() * torch.tensor([(-1.0) ** i for i in range(len(channels))])
    return q, keys


def scaled(q: Tensor, keys: Tensor, channels: list[int]) -> tuple[Tensor, Tensor]:
    """Channels of keys a hundred times as large and of queries a hundred times as small: the logits stay."""
    q, keys = q.clone(), keys.clone()
    q[..., channels] /= 100
    keys[..., channels] *= 100
    return q, keys


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("outliers", [None, shifted, scaled])
@pytest.mark.parametrize("rule", COMPRESSIBLE)
def test_mass_kept(device: str, dim: int, outliers: object, rule: str) -> None:
    """What a compressed index selects holds nearly as much attention as what an exact one selects: also with an outlier
    channel in each half of a head, which is what rotary embeddings make of a bias."""
    q, keys = synthetic(dim)
    if outliers is not None:
        q, keys = outliers(q, keys, [5, 5 + dim // 2])  # type: ignore[operator]
    q, keys = q.to(device), keys.to(device)
    for budget in (128, 512):
        exact, compressed = (kept_mass(q, keys, rule, each, budget) for each in ("exact", "compressed"))
        assert compressed > exact - 0.008


# ---- Where it does not go. ----


def test_training_takes_exact_entries_only() -> None:
    case = build(Spec(lengths=(40,), dtype=torch.float32))
    bounds = torch.tensor([0, 40], dtype=torch.int32)
    k, q = torch.randn(40, 2, 16), torch.randn(40, 4, 16)
    paging = {"rule": case.spec.rule, "page_size": 4}
    index = train.packed_index(k, bounds, 40, **paging, index_format="compressed")
    with pytest.raises(ValueError, match=r"^page_boundary: index: expected size 128 \(bytes of an exact entry"):
        ops.page_boundary(q, index, bounds, 40, 4, **paging)
    with pytest.raises(ValueError, match=r"^masked_attention: index_format: expected exact for mode 'soft'"):
        train.masked_attention(q, k, k, bounds, 40, 4, tau=torch.tensor(1.0), index_format="compressed")
    with pytest.raises(ValueError, match=r"^rule: expected mean, unique or directional for a compressed index"):
        reference.compress(k, k, "minmax")
