"""select_blocks against the oracle, which it must equal bit for bit, and against what must hold of a selection."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICES, assert_same, assert_threads_agree, examples, needs_cuda, poisoned
from prefill_cases import Choice, PrefillCase, PrefillSpec, build, choices, prefill_specs, select, select_oracle
from torch import Tensor

from unique_attn import ops, reference_prefill

KINDS = ["uniform", "peaked", "ties", "zeros", "ones", "odd", "tiny"]


def draw_shares(
    case: PrefillCase, heads: int, key_blocks: int, kind: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Shares ``[slots, heads, key_blocks]`` on the device of ``case``; what no query sees is junk."""
    random = torch.Generator().manual_seed(case.spec.seed)
    uniform = torch.rand(case.slots, heads, key_blocks, generator=random)
    normal = torch.randn(case.slots, heads, key_blocks, generator=random)
    shares = {
        "uniform": lambda: uniform / max(1, key_blocks) * 2,
        "peaked": lambda: (normal * 4).softmax(-1),
        "ties": lambda: (uniform * 4).round() / 4,
        "zeros": lambda: torch.where(uniform < 0.2, uniform, -0.0),
        "ones": lambda: (normal * 4).clamp(-1, 2),
        "odd": lambda: torch.where(
            uniform < 0.7,
            uniform,
            torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 1.5])[(normal.abs() * 9).int() % 5],
        ),
        "tiny": lambda: uniform * 2.0**-31 + (normal.abs() > 1.5) * 2.0**-33,
    }[kind]()
    junk = torch.tensor([torch.nan, 7.0, -1.0, torch.inf])[torch.arange(key_blocks) % 4]
    return torch.where(case.visible(key_blocks)[:, None], shares, junk).to(dtype).to(case.q.device)


def flags(case: PrefillCase, mask: Tensor, key_blocks: int) -> Tensor:
    """The mask as bool ``[slots, Hm, key_blocks]`` on the CPU; there are no other bits in it."""
    assert (mask.dtype, mask.shape[-1]) == (torch.int32, math.ceil(key_blocks / 32))
    every = ops.unpack_block_mask(mask.cpu(), 32 * mask.shape[-1])
    assert not every[..., key_blocks:].any()
    seen = case.visible(key_blocks)[:, None]
    assert not (every[..., :key_blocks] & ~seen).any()
    return every[..., :key_blocks]


def assert_selected(case: PrefillCase, shares: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """The op's choice, which is the oracle's. What must hold of it whatever the shares are, is asserted too."""
    mask, kept = poisoned(lambda: select(case, shares, choice))
    expected_mask, expected_kept = select_oracle(case, shares, choice)
    assert_same(mask, expected_mask, "mask")
    assert_same(kept, expected_kept, "kept")
    assert mask.device == kept.device == shares.device
    blocks = flags(case, mask, shares.shape[-1])
    forced = case.forced(shares.shape[-1])[:, None].expand_as(blocks)
    assert bool(blocks[forced].all())
    if choice.max_blocks is not None:
        assert bool((blocks.sum(-1) <= forced.sum(-1).clamp(min=choice.max_blocks)).all())
    return blocks, kept.cpu()


# ---- Values. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@examples(25)
def test_equals_the_oracle(device: str, kind: str, data: st.DataObject) -> None:
    spec = prefill_specs(dtype=torch.float32, head_dim=8, layout="dense", group=1, kv_heads=1, diagonal=False)
    case = build(data.draw(spec), device)
    heads = data.draw(st.integers(1, 3), label="heads")
    enough = -(-case.max_seqlen_k // case.spec.block_k)
    key_blocks = data.draw(st.sampled_from([enough, enough, enough + 1, 40, max(0, enough - 1)]), label="key_blocks")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64])) if device == "cpu" else torch.float32
    assert_selected(case, draw_shares(case, heads, key_blocks, kind, dtype), data.draw(choices()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_blocks", [31, 32, 33, 300, 2049])
def test_rows_of_many_blocks(device: str, kind: str, key_blocks: int) -> None:
    """A chunk in the middle of a long cache: the queries are few, the keys many."""
    keys = 64 * key_blocks - 5
    case = chunk_case(((150, keys), (20, keys // 2)), device)
    shares = draw_shares(case, 2, key_blocks, kind)
    for choice in (Choice(threshold=0.02), Choice(threshold=1e-4, max_blocks=20), Choice(top_p=0.9)):
        assert_selected(case, shares, choice)
    assert_selected(case, shares, Choice(top_p=0.3, min_blocks=25))


def chunk_case(chunks: tuple[tuple[int, int], ...], device: str, block_q: int = 128, block_k: int = 64) -> PrefillCase:
    """A case whose queries and keys do not matter."""
    return build(PrefillSpec(chunks, 1, 1, "one", 8, block_q, block_k, diagonal=False), device)


CHUNKS = ((1, 1), (300, 300), (0, 50), (130, 1000), (64, 64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
def test_the_ends_of_threshold_and_top_p(device: str, block_q: int, block_k: int) -> None:
    case = chunk_case(CHUNKS, device, block_q, block_k)
    shares = draw_shares(case, 3, -(-1000 // block_k), "peaked").clamp(max=0.99)
    visible, forced = (x(shares.shape[-1])[:, None] for x in (case.visible, case.forced))
    everything, kept = assert_selected(case, shares, Choice(threshold=0.0))
    assert torch.equal(everything, visible.expand_as(everything))
    assert bool((kept == 1.0).all())
    for choice in (Choice(threshold=1.0), Choice(top_p=0.0), Choice(threshold=0.0, max_blocks=0)):
        few, _ = assert_selected(case, shares, choice)
        assert torch.equal(few, forced.expand_as(few))
    shares[shares > 0.5] = 0.0  # all of the sum, and what does not count in it
    whole, kept = assert_selected(case, shares, Choice(top_p=1.0))
    assert torch.equal(whole, visible.expand_as(whole))
    assert bool((kept == 1.0).all())


@pytest.mark.parametrize("device", DEVICES)
def test_the_shortest_prefix(device: str) -> None:
    """One query block of 64 queries that sees 6 blocks, the last of which is its diagonal."""
    case = chunk_case(((64, 384),), device, 64)
    shares = torch.tensor([0.1, 0.125, 0.25, 0.0625, 0.25, 0.125]).view(1, 1, 6).to(device)
    shares = torch.cat([shares, torch.ones_like(shares)])  # of two slots one is no block

    def chosen(**choice: float) -> list[int]:
        blocks, _ = assert_selected(case, shares, Choice(**choice))  # type: ignore[arg-type]
        assert not blocks[1].any()
        return blocks[0, 0].nonzero().flatten().tolist()

    assert chosen(threshold=0.25) == [0, 2, 4, 5]
    assert chosen(threshold=0.125) == [0, 1, 2, 4, 5]
    assert chosen(threshold=0.126) == [0, 2, 4, 5]
    assert chosen(threshold=0.06) == [0, 1, 2, 3, 4, 5]
    # Ties: the lowest first.
    assert chosen(threshold=0.25, max_blocks=3) == [0, 2, 5]
    assert chosen(threshold=1.0, min_blocks=3) == [0, 2, 5]
    assert chosen(threshold=1.0, min_blocks=5) == [0, 1, 2, 4, 5]
    assert chosen(threshold=1.0, min_blocks=77) == [0, 1, 2, 3, 4, 5]
    assert chosen(threshold=0.25, min_blocks=3, max_blocks=3) == [0, 2, 5]
    assert chosen(threshold=1.0, min_blocks=4, max_blocks=5) == [0, 2, 4, 5]
    # Forced blocks count towards both, and are kept against max_blocks.
    assert chosen(threshold=0.0, max_blocks=1) == [0, 5]
    assert chosen(top_p=0.24) == [0, 5]  # which have .225 of .9125, or 24.66%
    assert chosen(top_p=0.25) == [0, 2, 5]
    assert chosen(top_p=0.53) == [0, 2, 4, 5]  # .475 are 52.05%
    assert chosen(top_p=0.8, min_blocks=5) == [0, 1, 2, 4, 5]
    assert chosen(top_p=0.99) == [0, 1, 2, 3, 4, 5]
    mask, kept = select(case, shares, Choice(top_p=0.25))
    assert mask.tolist() == [[[0b100101]], [[0]]]
    assert kept.flatten().tolist() == pytest.approx([0.475 / 0.9125, 1.0])


@pytest.mark.parametrize("device", DEVICES)
def test_top_p_of_exactly_the_sum(device: str) -> None:
    """Powers of two: sums are exact, so the prefix that has just enough is taken, not one more."""
    case = chunk_case(((64, 512),), device, 64)
    shares = torch.tensor([0.0, 2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-5, 0.0]).repeat(2, 1, 1).to(device)
    for count in range(1, 6):
        blocks, kept = assert_selected(case, shares, Choice(top_p=1 - 2.0**-count))
        assert blocks[0, 0].nonzero().flatten().tolist() == [0, *range(1, count + 1), 7]
        assert kept[0, 0] == 1 - 2.0**-count
        blocks, _ = assert_selected(case, shares, Choice(top_p=1 - 2.0**-count + 1e-9))
        assert blocks[0, 0].sum() == count + 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("offset", [0, 1, 63, 64, 100])
def test_the_diagonal_is_forced(device: str, block_q: int, block_k: int, offset: int) -> None:
    """Every block in which a query of the query block stands, and the first, however small their shares are."""
    case = chunk_case(((300, 300 + offset),), device, block_q, block_k)
    key_blocks = -(-(300 + offset) // block_k)
    shares = torch.zeros(case.slots, 1, key_blocks, device=device)
    blocks, kept = assert_selected(case, shares, Choice(threshold=0.5))
    for i in range(-(-300 // block_q)):
        positions = range(offset + i * block_q, offset + min((i + 1) * block_q, 300))
        assert blocks[i, 0].nonzero().flatten().tolist() == sorted({0, *(p // block_k for p in positions)})
    assert bool((kept == 1.0).all())  # all of nothing


@pytest.mark.parametrize("device", DEVICES)
def test_nan_comes_before_numbers(device: str) -> None:
    case = chunk_case(((64, 384),), device, 64)
    shares = torch.tensor([0.5, 0.25, torch.nan, 0.5, torch.nan, torch.nan]).repeat(2, 1, 1).to(device)

    def chosen(**choice: float) -> list[int]:
        blocks, _ = assert_selected(case, shares, Choice(**choice))  # type: ignore[arg-type]
        return blocks[0, 0].nonzero().flatten().tolist()

    assert chosen(threshold=1.0) == [0, 2, 4, 5]
    assert chosen(threshold=0.3) == [0, 2, 3, 4, 5]
    assert chosen(threshold=1.0, max_blocks=3) == [0, 2, 5]
    assert chosen(top_p=0.4) == [0, 5]  # block 0 has .5 of 1.25; NaN counts nothing
    assert chosen(top_p=0.41) == [0, 2, 3, 4, 5]
    shares[:] = torch.nan
    assert chosen(top_p=0.99) == [0, 5]
    assert select(case, shares, Choice(top_p=0.99))[1].tolist() == [[1.0], [1.0]]
    assert chosen(top_p=1.0) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_that_are_no_shares(device: str) -> None:
    """They count as the nearest share: 0 or 1."""
    case = chunk_case(((64, 448),), device, 64)
    odd = torch.tensor([0.0, -3.0, torch.inf, 1.5, -torch.inf, 1.0, 0.0]).repeat(2, 1, 1).to(device)
    for choice in (Choice(threshold=1.0), Choice(top_p=0.5), Choice(top_p=0.9, max_blocks=3), Choice(threshold=0.0)):
        blocks, kept = assert_selected(case, odd, choice)
        same, same_kept = assert_selected(case, odd.clamp(0.0, 1.0), choice)
        assert torch.equal(blocks, same)
        assert torch.equal(kept, same_kept)


@pytest.mark.parametrize("device", DEVICES)
def test_no_queries_no_keys_no_sequences(device: str) -> None:
    for chunks in ((), ((0, 0),), ((0, 70), (0, 0))):
        case = chunk_case(chunks, device)
        for key_blocks in (0, 2):
            shares = torch.rand(len(chunks), 3, key_blocks).to(device)
            blocks, kept = assert_selected(case, shares, Choice(threshold=0.0))
            assert not blocks.any()
            assert bool((kept == 1.0).all())


# ---- Packing, determinism, many rows. ----


@pytest.mark.parametrize("device", DEVICES)
def test_packed_sequences_are_as_if_alone(device: str) -> None:
    case = chunk_case(CHUNKS, device)
    shares = draw_shares(case, 2, 16, "peaked")
    choice = Choice(top_p=0.8, max_blocks=9)
    mask, kept = select(case, shares, choice)
    starts = ops.query_block_slots(case.cu_seqlens_q).tolist()
    for b, chunk in enumerate(CHUNKS):
        alone = chunk_case((chunk,), device)
        blocks = -(-chunk[0] // 128)
        part = torch.full((alone.slots, 2, 16), torch.nan, device=device)
        part[:blocks] = shares[starts[b] :][:blocks]
        for got, expected in zip(select(alone, part, choice), (mask, kept), strict=True):
            assert_same(got[:blocks], expected[starts[b] :][:blocks])


def test_deterministic_with_any_number_of_threads() -> None:
    case = chunk_case(((3000, 3000), (1, 1), (500, 3000)), "cpu")
    for kind in KINDS:
        shares = draw_shares(case, 8, 47, kind)
        assert_threads_agree(lambda shares=shares: select(case, shares, Choice(top_p=0.7)))


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_on_cuda_and_as_on_the_cpu(kind: str) -> None:
    case = chunk_case(((3000, 3000), (1, 1), (500, 3000)), "cuda")
    shares = draw_shares(case, 8, 47, kind)
    for choice in (Choice(top_p=0.7), Choice(threshold=0.02)):
        first = select(case, shares, choice)
        on_cpu = select(replace(case, cu_seqlens_q=case.cu_seqlens_q.cpu(), cu_seqlens_k=case.cu_seqlens_k.cpu()),
                        shares.cpu(), choice)  # fmt: skip
        for _ in range(3):
            for got, expected in zip(select(case, shares, choice), first, strict=True):
                assert_same(got, expected)
        for got, expected in zip(first, on_cpu, strict=True):
            assert_same(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ["sequences", "heads"])
def test_more_rows_than_a_grid_has(device: str, rows: str) -> None:
    """65,535 is the most that CUDA takes in y and z. The far rows are as if alone."""
    many = 65_540
    few = chunk_case(((77, 300),), device)
    case = chunk_case((*((1 + b % 3,) * 2 for b in range(many)), (77, 300)), device) if rows == "sequences" else few
    heads = 1 if rows == "sequences" else many
    shares = draw_shares(case, heads, 5, "uniform")
    choice = Choice(threshold=0.2)
    mask, kept = select(case, shares, choice)
    row = case.query_blocks[-1].slot
    assert (mask.shape, kept.shape) == ((case.slots, heads, 1), (case.slots, heads))
    last = shares[row : row + 1, -3:]
    for got, all_of_them in zip(select(few, last.contiguous(), choice), (mask, kept), strict=True):
        assert_same(got, all_of_them[row : row + 1, -3:])
    if rows == "sequences":
        slots = [block.slot for block in case.query_blocks[:-1]]
        assert bool((mask[slots] == 1).all())
        assert bool((kept[slots] == 1.0).all())
        unused = torch.ones(case.slots, dtype=torch.bool).index_fill_(0, torch.tensor([*slots, row]), False)
        assert not mask.cpu()[unused].any()


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_refused(device: str) -> None:
    case = chunk_case(((64, 384),), device)
    shares = torch.rand(1, 2, 6).to(device).requires_grad_()
    with pytest.raises(ops.NotDifferentiableError, match=r"unique_attn::select_blocks .*has no gradient"):
        select(case, shares, Choice(threshold=0.5))[1].sum().backward()


# ---- The oracle. ----


def test_the_oracle_by_hand() -> None:
    shares, forced = [0.1, 0.5, 0.3, math.nan, 0.3], [True, False, False, False, True]
    kept, part = reference_prefill.kept_blocks(shares, forced, 0.4, None, 0, None)
    assert kept == [4, 0, 3, 1]
    assert part == pytest.approx(0.9 / 1.2)
    assert reference_prefill.kept_blocks(shares, forced, None, 0.0, 0, None)[0] == [4, 0]
    assert reference_prefill.kept_blocks(shares, forced, None, 1.0, 0, None) == ([4, 0, 3, 1, 2], 1.0)
    assert reference_prefill.kept_blocks(shares, forced, None, 1.0, 0, 1)[0] == [4, 0]
    assert reference_prefill.kept_blocks(shares, forced, 1.0, None, 4, None)[0] == [4, 0, 3, 1]
    assert reference_prefill.kept_blocks([], [], 0.0, None, 3, None) == ([], 1.0)
