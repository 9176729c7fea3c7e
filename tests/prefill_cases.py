"""Cases for the prefill tests: packed chunks of prompts with a block mask, the library's runs, the oracles', and the
error bounds.

A `PrefillSpec` is what hypothesis draws and prints; `build(spec, device)` makes the tensors of it, always the same.
Rows of the mask that no query block has, and bits past a sequence's keys, are drawn too: they must not matter. An
`Estimate` is how shares are estimated, `Choice` which of them are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import DTYPES, GROUPS, HEAD_DIMS, Q_LAYOUTS, accumulator, assert_close, token_layout, typical_size
from torch import Tensor

from unique_attn import ops, reference_prefill

METHODS = ["directional", "unisparse"]
POOLS = [8, 16, 32, 64]


@dataclass(frozen=True)
class PrefillSpec:
    """Shape, dtype and layout of one case."""

    chunks: tuple[tuple[int, int], ...] = ((200, 300), (0, 0), (33, 33))  # queries and keys of each sequence
    kv_heads: int = 2
    group: int = 2
    mask_heads: str = "kv"  # one, kv or query
    head_dim: int = 16
    block_q: int = 128
    block_k: int = 64
    dtype: torch.dtype = torch.float32
    listed: float = 0.5  # share of the blocks
    diagonal: bool = True  # is listed
    spare_words: int = 0
    scale: float | None = None
    layout: str = "dense"
    seed: int = 0

    @property
    def blocks(self) -> dict[str, int]:
        return {"block_q": self.block_q, "block_k": self.block_k}


@dataclass(frozen=True)
class Estimate:
    """What `composite_blocks` takes beside the tensors and the sizes of blocks."""

    method: str = "directional"
    pool_q: int = 8
    pool_k: int = 8
    spread_weight: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """What `select_blocks` takes beside the tensors and the sizes of blocks."""

    threshold: float | None = None
    top_p: float | None = None
    min_blocks: int = 0
    max_blocks: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class PrefillCase:
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kept: Tensor  # bool [slots, Hm, key blocks]
    spec: PrefillSpec

    @property
    def max_seqlen_q(self) -> int:
        return max([0, *(n for n, _ in self.spec.chunks)])

    @property
    def max_seqlen_k(self) -> int:
        return max([0, *(m for _, m in self.spec.chunks)])

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        return self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def slots(self) -> int:
        return self.q.shape[0] // self.spec.block_q + len(self.spec.chunks)

    @property
    def mask(self) -> Tensor:
        return ops.pack_block_mask(self.kept)

    @property
    def sequences(self) -> list[tuple[slice, slice]]:
        """Queries and keys of each sequence."""
        q, k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        return [(slice(q[b], q[b + 1]), slice(k[b], k[b + 1])) for b in range(len(q) - 1)]

    def row(self, query: int) -> int:
        """The row of ``kept`` that a query goes by."""
        starts = self.cu_seqlens_q.tolist()
        b = max(b for b in range(len(starts) - 1) if starts[b] <= query < starts[b + 1])
        return starts[b] // self.spec.block_q + b + (query - starts[b]) // self.spec.block_q

    @property
    def query_blocks(self) -> list[QueryBlock]:
        """Those that there are, in the order of their rows."""
        result, size = [], self.spec.block_q
        for b, (queries, keys) in enumerate(self.sequences):
            n, m = queries.stop - queries.start, keys.stop - keys.start
            for i in range(-(-n // size)):
                end = min((i + 1) * size, n)
                rows = slice(queries.start + i * size, queries.start + end)
                result.append(QueryBlock(queries.start // size + b + i, b, rows, m - n + i * size, m - n + end - 1))
        return result

    def visible(self, key_blocks: int) -> Tensor:
        """bool ``[slots, key_blocks]``: the key blocks that a query block sees."""
        return self._blocks(key_blocks, lambda block, first: first <= block.last)

    def forced(self, key_blocks: int) -> Tensor:
        """bool ``[slots, key_blocks]``: the first block and the diagonal of those."""
        size = self.spec.block_k
        return self._blocks(
            key_blocks,
            lambda block, first: (first == 0) | ((first + size > block.first) & (first <= block.last)),
        )

    def _blocks(self, key_blocks: int, holds: Callable[[QueryBlock, Tensor], Tensor]) -> Tensor:
        flags = torch.zeros(self.slots, key_blocks, dtype=torch.bool)
        for block in self.query_blocks:
            flags[block.slot] = holds(block, torch.arange(key_blocks) * self.spec.block_k)
        return flags


@dataclass(frozen=True)
class QueryBlock:
    slot: int
    sequence: int
    queries: slice  #: in q
    first: int  #: position of its first query
    last: int


def cumulative(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def build(spec: PrefillSpec, device: str = "cpu") -> PrefillCase:
    """The tensors of ``spec``; on CUDA fp64 becomes fp32."""
    if device != "cpu" and spec.dtype == torch.float64:
        spec = replace(spec, dtype=torch.float32)
    random = torch.Generator().manual_seed(spec.seed)
    queries, keys = [n for n, _ in spec.chunks], [m for _, m in spec.chunks]

    def draw(count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, spec.head_dim, generator=random, dtype=torch.float64)

    q_heads = spec.kv_heads * spec.group
    tensors = [draw(sum(queries), q_heads), draw(sum(keys), spec.kv_heads), draw(sum(keys), spec.kv_heads)]
    tensors[1] += draw(1, spec.kv_heads)  # keys have a mean, as real ones have
    q, k, v = (token_layout(x[None].to(spec.dtype).to(device), spec.layout)[0] for x in tensors)
    cu_seqlens_q, cu_seqlens_k = cumulative(queries, device), cumulative(keys, device)
    slots = sum(queries) // spec.block_q + len(queries)
    mask_heads = {"one": 1, "kv": spec.kv_heads, "query": q_heads}[spec.mask_heads]
    key_blocks = -(-max([0, *keys]) // spec.block_k) + 32 * spec.spare_words
    kept = torch.rand(slots, mask_heads, key_blocks, generator=random) < spec.listed
    if spec.diagonal:
        starts = ops.query_block_slots(cu_seqlens_q.cpu(), spec.block_q).tolist()
        for b, (n, m) in enumerate(spec.chunks):
            for position in range(m - n, m):
                block = (position - (m - n)) // spec.block_q
                kept[starts[b] + block, :, position // spec.block_k] = True
    return PrefillCase(q, k, v, cu_seqlens_q, cu_seqlens_k, kept.to(device), spec)


def run(case: PrefillCase) -> tuple[Tensor, Tensor]:
    return ops.block_sparse_attention(
        case.q, case.k, case.v, case.cu_seqlens_q, case.cu_seqlens_k, case.max_seqlen_q, case.mask,
        **case.spec.blocks, scale=case.spec.scale,
    )  # fmt: skip


def oracle(case: PrefillCase, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return reference_prefill.block_sparse_attention(
        case.q, case.k, case.v, case.cu_seqlens_q, case.cu_seqlens_k, case.mask,
        **case.spec.blocks, scale=case.spec.scale, compute_dtype=dtype,
    )  # fmt: skip


def assert_attention(case: PrefillCase, got: tuple[Tensor, Tensor]) -> None:
    """``got`` errs at most twice as much as a PyTorch run in the inputs' precision does (lse: the accumulator's).

    Beside that, what a plain sum in the accumulator's precision may err by: sqrt(n) units in the last place for n keys,
    and the error of a logit, which is a relative error of its weight.
    """
    dtype = case.spec.dtype
    assert (got[0].dtype, got[1].dtype) == (dtype, accumulator(dtype))
    assert (got[0].shape, got[1].shape) == (case.q.shape, case.q.shape[:2])
    if case.q.numel() == 0:
        return
    out, lse = oracle(case)
    same, same_lse = oracle(case, dtype)[0], oracle(case, accumulator(dtype))[1]
    dim, scale = case.spec.head_dim, case.spec.scale or case.spec.head_dim**-0.5
    logit = scale * typical_size(case.q) * typical_size(case.k) * dim
    longest = max(m for _, m in case.spec.chunks)
    assert_close(got[0], out, same, "out", typical_size(case.v) * (longest**0.5 + logit))
    assert_close(got[1], lse, same_lse, "lse", logit)


# ---- Shares, selection, all of it. ----


def composite(case: PrefillCase, estimate: Estimate = Estimate()) -> Tensor:
    return ops.composite_blocks(
        case.q, case.k, *case.bounds, case.max_seqlen_q, case.max_seqlen_k,
        **estimate.options, **case.spec.blocks, scale=case.spec.scale,
    )  # fmt: skip


def composite_oracle(case: PrefillCase, estimate: Estimate, dtype: torch.dtype = torch.float64) -> Tensor:
    return reference_prefill.composite_blocks(
        case.q, case.k, *case.bounds, case.max_seqlen_k,
        **estimate.options, **case.spec.blocks, scale=case.spec.scale, compute_dtype=dtype,
    )  # fmt: skip


def select(case: PrefillCase, shares: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    return ops.select_blocks(shares, *case.bounds, **choice.options, **case.spec.blocks)


def select_oracle(case: PrefillCase, shares: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    return reference_prefill.select_blocks(shares.cpu(), *case.bounds, **choice.options, **case.spec.blocks)


def prefill(
    case: PrefillCase, choice: Choice = Choice(), estimate: Estimate = Estimate()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ops.unique_prefill(
        case.q, case.k, case.v, *case.bounds, case.max_seqlen_q, case.max_seqlen_k,
        **estimate.options, **choice.options, **case.spec.blocks, scale=case.spec.scale,
    )  # fmt: skip


def by_hand(
    case: PrefillCase, choice: Choice, estimate: Estimate = Estimate()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `prefill` must equal: the three ops, one after the other."""
    mask, kept = select(case, composite(case, estimate), choice)
    out, lse = ops.block_sparse_attention(
        case.q, case.k, case.v, *case.bounds, case.max_seqlen_q, mask, **case.spec.blocks, scale=case.spec.scale
    )
    return out, lse, mask, kept


def share_heads(case: PrefillCase, estimate: Estimate) -> int:
    return case.spec.kv_heads * (1 if estimate.method == "unisparse" else case.spec.group)


def assert_shares(case: PrefillCase, estimate: Estimate, got: Tensor) -> None:
    """``got`` errs at most twice as much as a PyTorch run that rounds as the op must; an error of a logit is a relative
    error of a share, which is at most 1.

    Beside that, what roundings of the means to 16 bits do to a logit: of few numbers a run can have lucky ones.
    """
    dtype = case.spec.dtype
    key_blocks = -(-case.max_seqlen_k // case.spec.block_k)
    assert (got.dtype, got.shape) == (accumulator(dtype), (case.slots, share_heads(case, estimate), key_blocks))
    if got.numel() == 0:
        return
    dim, scale = case.spec.head_dim, abs(case.spec.scale or case.spec.head_dim**-0.5)
    weight = abs(2.0 if estimate.spread_weight is None else estimate.spread_weight)
    sizes = [typical_size(x) for x in (case.q, case.k)]
    terms = 1 + scale * sizes[0] * sizes[1] * dim * (1 + weight)
    if dtype.itemsize == 2:
        means = [
            typical_size(torch.stack([part.double().mean(0) for part in x.split(size)]))
            for x, size in ((case.q, estimate.pool_q), (case.k, estimate.pool_k))
        ]
        error = torch.finfo(dtype).eps / 4 * scale * means[0] * (dim**0.5 * means[1] + weight * sizes[1])
        error += torch.finfo(torch.float16).eps / 4  # weights are rounded, too, before they are divided by their sum
        terms += error / (4 * torch.finfo(torch.float32).eps)
    assert_close(got, composite_oracle(case, estimate), composite_oracle(case, estimate, dtype), "shares", terms)


# ---- What hypothesis draws. ----


@st.composite
def chunks(draw: st.DrawFn, block_q: int, block_k: int, longest: int = 400) -> tuple[tuple[int, int], ...]:
    """1 to 3 sequences with lengths on and around the borders of blocks, all of whose tokens, or the last, or none are
    queries."""
    near = st.builds(
        lambda unit, n, d: max(0, unit * n + d),
        st.sampled_from([block_q, block_k]),
        st.integers(0, 3),
        st.integers(-1, 1),
    )
    length = st.one_of(near, st.integers(0, longest), st.sampled_from([0, 1, 2]))
    result = []
    for _ in range(draw(st.integers(1, 3))):
        keys = draw(length)
        queries = draw(st.one_of(st.just(keys), length, st.sampled_from([0, 1])))
        result.append((min(queries, keys), keys))
    return tuple(result)


@st.composite
def estimates(draw: st.DrawFn) -> Estimate:
    method = draw(st.sampled_from(METHODS))
    weight = None if method == "unisparse" else draw(st.sampled_from([None, None, 0.0, 0.5, 3.0]))
    return Estimate(method, draw(st.sampled_from(POOLS)), draw(st.sampled_from(POOLS)), weight)


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """A threshold or a part of the whole, at the ends and between, and sometimes a least and a most number."""
    least, most = draw(st.sampled_from([0, 0, 1, 3, 1000])), draw(st.sampled_from([None, None, 0, 1, 2, 5, 1000]))
    number = draw(st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.25]), st.floats(0, 1), st.floats(0, 0.1)))
    by_threshold = draw(st.booleans())
    return Choice(
        threshold=number if by_threshold else None,
        top_p=None if by_threshold else number,
        min_blocks=least if most is None else min(least, most),
        max_blocks=most,
    )


@st.composite
def prefill_specs(draw: st.DrawFn, /, **fixed: Any) -> PrefillSpec:
    """Any supported shape; ``fixed`` gives fields a value or another strategy."""

    def pick(name: str, values: st.SearchStrategy[Any]) -> Any:
        wanted = fixed.get(name, values)
        return draw(wanted, label=name) if isinstance(wanted, st.SearchStrategy) else wanted

    block_q, block_k = pick("block_q", st.sampled_from([64, 128])), pick("block_k", st.sampled_from([64, 128]))
    return PrefillSpec(
        block_q=block_q,
        block_k=block_k,
        chunks=pick("chunks", chunks(block_q, block_k)),
        kv_heads=pick("kv_heads", st.integers(1, 2)),
        group=pick("group", st.sampled_from(GROUPS)),
        mask_heads=pick("mask_heads", st.sampled_from(["one", "kv", "query"])),
        head_dim=pick("head_dim", st.sampled_from(HEAD_DIMS)),
        dtype=pick("dtype", st.sampled_from(DTYPES)),
        listed=pick("listed", st.sampled_from([0.0, 0.2, 0.5, 1.0])),
        diagonal=pick("diagonal", st.booleans()),
        spare_words=pick("spare_words", st.sampled_from([0, 0, 1])),
        scale=pick("scale", st.sampled_from([None, None, 0.05, 1.5])),
        layout=pick("layout", st.sampled_from(Q_LAYOUTS)),
        seed=pick("seed", st.integers(0, 2**16)),
    )
