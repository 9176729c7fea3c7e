"""Cases for the op tests: hypothesis strategies, a builder of poisoned paged caches, and the error bound.

A `Spec` is what hypothesis draws and prints; `build(spec, device)` makes the tensors of it, always the same.
In a `Case` every byte that an op must not look at is poison: NaN in slots past a sequence's end and in unused
blocks, 0xFF in the rest of the index, -1 or numbers far out of range in the rest of the block table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from unique_attn import ops, reference

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device on this machine")
RULES = list(ops.RULES)
FORMATS = ["exact", "compressed"]
COMPRESSIBLE = [rule for rule in RULES if ops.RULES[rule].compressible]
# The rules of docs/page-index.md: tests of what is special about one of them name it; a rule that is added is not here.
NAMED_RULES = ["mean", "unique", "directional", "minmax"]
INDEXES = [(rule, "exact") for rule in RULES] + [(rule, "compressed") for rule in COMPRESSIBLE]
NAMED_INDEXES = [index for index in INDEXES if index[0] in NAMED_RULES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CUDA_DTYPES = DTYPES[:3]
PAGE_SIZES = [4, 8, 16, 32, 64]
HEAD_DIMS = [8, 16, 24, 40, 64, 72, 80, 96, 128, 136, 192, 248, 256]
GROUPS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 16]
Q_LAYOUTS = ["dense", "heads_first", "fused", "channels_last_but_one", "odd_offset"]
CACHE_LAYOUTS = ["heads_first", "tokens_first", "padded"]
JUNK = [-1, -(2**31), 2**31 - 1, 2**30]

_examples = os.environ.get("UNIQUE_ATTN_TEST_EXAMPLES")


def examples(count: int) -> settings:
    """Hypothesis settings: ``count`` fixed examples, or UNIQUE_ATTN_TEST_EXAMPLES fresh ones if set."""
    return settings(
        max_examples=int(_examples) if _examples else count,
        derandomize=not _examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Spec:
    """Shape, dtype and layout of one case."""

    lengths: tuple[int, ...] = (37, 5)
    num_tokens: int = 1
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    page_size: int = 4
    pages_per_block: int = 2
    k: int = 4
    dtype: torch.dtype = torch.float32
    rule: str = "directional"
    index_format: str = "exact"
    window: int = 0
    q_layout: str = "dense"
    cache_layout: str = "heads_first"
    shared: bool = False
    seed: int = 0


@dataclass
class Case:
    """The tensors of a spec. ``k`` and ``v`` are the last T tokens, which the caches hold already."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    index: Tensor
    block_table: Tensor
    seq_lens: Tensor
    spec: Spec

    def to(self, device: str) -> Case:
        """A copy on ``device``; the caches keep their strides."""
        moved = {f.name: copy_strided(getattr(self, f.name), device) for f in fields(self)[:-1]}
        return Case(**moved, spec=self.spec)

    def clone(self) -> Case:
        return self.to(self.q.device.type)

    @property
    def scoring(self) -> dict[str, Any]:
        return {**self.paging, "window": self.spec.window}

    @property
    def paging(self) -> dict[str, Any]:
        return {"rule": self.spec.rule, "page_size": self.spec.page_size, "index_format": self.spec.index_format}

    @property
    def stored(self) -> dict[str, Any]:
        """What tells `decode_index` how to read the index."""
        spec = self.spec
        return {
            "rule": spec.rule, "dtype": spec.dtype, "index_format": spec.index_format, "head_dim": spec.head_dim,
        }  # fmt: skip

    @property
    def attending(self) -> dict[str, Any]:
        return {"page_size": self.spec.page_size, "window": self.spec.window}


def copy_strided(tensor: Tensor, device: str) -> Tensor:
    """A copy on ``device`` with the same strides and the same offset from the start of its storage."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().cpu().clone())
    return flat.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def token_layout(dense: Tensor, layout: str) -> Tensor:
    """``dense`` ``[B, T, heads, D]`` in other memory, NaN between its elements."""
    batch, tokens, heads, dim = dense.shape
    if layout == "dense":
        return dense
    if layout == "heads_first":
        return dense.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":  # a slice of a fused qkv projection
        buffer = dense.new_full((batch, tokens, heads + 3, dim), torch.nan)
        view = buffer[:, :, 2 : 2 + heads]
    elif layout == "channels_last_but_one":  # channel stride is not 1
        view = dense.new_full((batch, tokens, dim, heads), torch.nan).transpose(2, 3)
    else:  # rows that start at odd addresses
        view = dense.new_full((batch, tokens, heads, dim + 3), torch.nan)[..., 1 : 1 + dim]
    return view.copy_(dense)


def empty_cache(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """A cache ``[num_blocks, H, block_size, D]`` full of NaN."""
    blocks, heads, size, dim = shape
    if layout == "tokens_first":
        return torch.full((blocks, size, heads, dim), torch.nan, dtype=dtype).transpose(1, 2)
    if layout == "padded":
        return torch.full((blocks, heads + 1, size + 1, dim + 8), torch.nan, dtype=dtype)[:, 1:, 1:, :dim]
    return torch.full(shape, torch.nan, dtype=dtype)


def build(spec: Spec, device: str = "cpu") -> Case:
    """The tensors of ``spec``: shuffled blocks, shared prefixes if asked for, poison where no op may look."""
    dtype = torch.float32 if device != "cpu" and spec.dtype == torch.float64 else spec.dtype
    spec = replace(spec, dtype=dtype)
    random = torch.Generator().manual_seed(spec.seed)
    block_size = spec.page_size * spec.pages_per_block
    batch = len(spec.lengths)
    used = [-(-length // block_size) for length in spec.lengths]
    width = max([1, *used]) + spec.seed % 3
    num_blocks = sum(used) + 2
    free = torch.randperm(num_blocks, generator=random).tolist()
    table = torch.tensor(JUNK, dtype=torch.int32).repeat(batch, width)[:, :width].clone()
    whole = [max(0, length - spec.num_tokens) // block_size for length in spec.lengths]  # of old tokens only
    for b in range(batch):
        row = [free.pop() for _ in range(used[b])]
        if spec.shared and b > 0:
            common = min(whole[0], whole[b])
            row[:common] = table[0, :common].tolist()
        table[b, : used[b]] = torch.tensor(row, dtype=torch.int32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    shape = (num_blocks, spec.kv_heads, block_size, spec.head_dim)
    k_cache = empty_cache(shape, spec.cache_layout, dtype)
    v_cache = empty_cache(shape, spec.cache_layout, dtype)
    seq_lens = torch.tensor(spec.lengths, dtype=torch.int32)
    offset = draw(spec.kv_heads, 1, spec.head_dim)  # keys have a mean, as real ones have
    for b, length in enumerate(spec.lengths):
        positions = torch.arange(length)
        blocks, slots = table[b, positions // block_size].long(), positions % block_size
        k_cache[blocks, :, slots] = (draw(spec.kv_heads, length, spec.head_dim) + offset).transpose(0, 1)
        v_cache[blocks, :, slots] = draw(length, spec.kv_heads, spec.head_dim)
    paging = {"rule": spec.rule, "page_size": spec.page_size, "index_format": spec.index_format}
    index = reference.new_index(k_cache, **paging).fill_(0xFF)
    reference.page_index(
        k_cache, index, table, torch.zeros_like(seq_lens), seq_lens,
        max_new_tokens=max([0, *spec.lengths]), **paging,
    )  # fmt: skip
    slots = reference.step_slots(table, seq_lens, spec.num_tokens, block_size).view(batch, spec.num_tokens)
    k = k_cache[slots // block_size, :, slots % block_size].contiguous()
    v = v_cache[slots // block_size, :, slots % block_size].contiguous()
    q = draw(batch, spec.num_tokens, spec.kv_heads * spec.group, spec.head_dim)
    q, k, v = (token_layout(each, spec.q_layout) for each in (q, k, v))
    return Case(q, k, v, k_cache, v_cache, index, table, seq_lens, spec).to(device)


# ---- What hypothesis draws. ----


@st.composite
def lengths(draw: st.DrawFn, page_size: int, block_size: int, budget: int, longest: int = 400) -> tuple[int, ...]:
    """0 to 3 sequence lengths on, one below and one above the borders of pages, blocks and the budget."""
    units = [unit for unit in (page_size, block_size, budget) if unit < longest]
    near = st.builds(
        lambda unit, n, d: max(0, unit * n + d), st.sampled_from(units), st.integers(0, 4), st.integers(-1, 1)
    )
    one = st.one_of(near.filter(lambda n: n <= longest), st.integers(0, longest), st.sampled_from([0, 1, 2]))
    return tuple(draw(st.lists(one, min_size=1, max_size=3)))


@st.composite
def specs(draw: st.DrawFn, /, **fixed: Any) -> Spec:
    """Any supported shape; ``fixed`` gives fields a value or another strategy."""

    def pick(name: str, values: st.SearchStrategy[Any]) -> Any:
        wanted = fixed.get(name, values)
        return draw(wanted, label=name) if isinstance(wanted, st.SearchStrategy) else wanted

    page_size = pick("page_size", st.sampled_from(PAGE_SIZES))
    pages_per_block = pick("pages_per_block", st.integers(1, 4))
    k = pick("k", st.integers(2, 8))
    rule = pick("rule", st.sampled_from(RULES))
    return Spec(
        page_size=page_size,
        pages_per_block=pages_per_block,
        k=k,
        lengths=pick("lengths", lengths(page_size, page_size * pages_per_block, k * page_size)),
        num_tokens=pick("num_tokens", st.sampled_from([1, 1, 1, 2, 3, 4, 5, 8, 16])),
        kv_heads=pick("kv_heads", st.integers(1, 3)),
        group=pick("group", st.sampled_from(GROUPS)),
        head_dim=pick("head_dim", st.sampled_from(HEAD_DIMS)),
        dtype=pick("dtype", st.sampled_from(DTYPES)),
        rule=rule,
        index_format=pick("index_format", st.sampled_from(FORMATS if rule in COMPRESSIBLE else ["exact"])),
        window=pick("window", st.one_of(st.just(0), st.integers(1, 200))),
        q_layout=pick("q_layout", st.sampled_from(Q_LAYOUTS)),
        cache_layout=pick("cache_layout", st.sampled_from(CACHE_LAYOUTS)),
        shared=pick("shared", st.booleans()),
        seed=pick("seed", st.integers(0, 2**16)),
    )


# ---- Comparing. ----


def assert_same(got: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal bit for bit (a NaN equals itself)."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    a, b = (x.cpu().contiguous().reshape(-1).view(torch.uint8) for x in (got, expected))
    assert torch.equal(a, b), f"{what}: {int((a != b).sum())} of {a.numel()} bytes differ"


def assert_same_step(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """(out, lse, pages) of a step and of the single ops: bit for bit, but the sums of attention where one kernel does
    the whole step. That cuts the selected pages in another way: two units in the last place of the largest number."""
    for name, a, b in zip(("out", "lse", "pages"), got, expected, strict=True):
        if name == "pages" or not a.is_cuda or got[0].dtype.itemsize > 2:
            assert_same(a, b, name)
            continue
        numbers = b[b.isfinite()].float().abs()
        unit = torch.finfo(a.dtype).eps * (numbers.max().item() if numbers.numel() else 0.0)
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=2 * unit + 1e-6, equal_nan=True)


def assert_close(got: Tensor, oracle: Tensor, same_precision: Tensor, what: str, terms: float = 0.0) -> None:
    """``got`` errs at most twice as much against the fp64 oracle as a PyTorch run in its own precision does.

    A run over few numbers can be exact by luck, so one unit in the last place of the oracle's largest number is
    always allowed (1024 in fp64, whose oracle is no better than it), and 4 units of the accumulator at ``terms``, the
    magnitude of the terms of a sum. NaN and infinity must be where the oracle has them.
    """
    got, oracle, same_precision = got.detach().cpu(), oracle.cpu(), same_precision.cpu()
    assert got.shape == oracle.shape, f"{what}: shape {list(got.shape)}, expected {list(oracle.shape)}"
    finite = oracle.isfinite()
    assert torch.equal(got.isnan(), oracle.isnan()), f"{what}: NaN where the oracle has none, or the reverse"
    special = ~finite & ~oracle.isnan()
    assert torch.equal(got[special].double(), oracle[special].double()), f"{what}: infinities differ"
    if not finite.any():
        return
    allowed = 2 * float((same_precision.double() - oracle)[finite].abs().max())
    units = 1024 if got.dtype == torch.float64 else 1
    allowed += units * torch.finfo(got.dtype).eps * float(oracle[finite].abs().max())
    allowed += 4 * torch.finfo(accumulator(got.dtype)).eps * terms
    error = float((got.double() - oracle)[finite].abs().max())
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels accumulate inputs of ``dtype`` in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_selects_best(pages: Tensor, case: Case, num_pages: int, **options: Any) -> None:
    """``pages`` are a top-k of the oracle's scores of ``case``'s index.

    Where it differs from the oracle's own choice, roundings must account for it: the pages taken instead score as
    much as the ones dropped, up to the error of two scores.
    """
    case = case.to("cpu")
    args = (case.q, case.index, case.block_table, case.seq_lens)
    exact = reference.page_scores(*args, **case.scoring, rounded=False)
    single = reference.page_scores(*args, **case.scoring, compute_dtype=accumulator(case.spec.dtype))
    eps = torch.finfo(single.dtype).eps
    selecting = {**case.attending, **{n: o.cpu() if isinstance(o, Tensor) else o for n, o in options.items()}}
    expected = reference.topk_pages(exact, case.seq_lens, num_pages, **selecting)
    rows = zip(*(x.cpu().flatten(0, 2) for x in (pages, expected, exact, single.double())), strict=True)
    for got, best, score, rounded in rows:
        assert int((got >= 0).sum()) == int((best >= 0).sum()), (got, best)
        taken, dropped = set(got.tolist()) - set(best.tolist()), set(best.tolist()) - set(got.tolist())
        if dropped:
            finite = score.isfinite()
            error = 2 * float((rounded - score)[finite].abs().max()) + eps * float(score[finite].abs().max())
            assert float(score[list(taken)].min()) >= float(score[list(dropped)].max()) - 2 * error, (got, best)


# ---- One step, by the op and checked. ----


def step(case: Case, num_pages: int, *, new_keys: bool = True, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.unique_decode` on ``case``, which it writes to."""
    from unique_attn import ops

    k, v = (case.k, case.v) if new_keys else (None, None)
    state = (case.k_cache, case.v_cache, case.index, case.block_table, case.seq_lens)
    return ops.unique_decode(case.q, k, v, *state, num_pages, **{**case.scoring, **options})


def assert_step(
    before: Case, after: Case, result: tuple[Tensor, Tensor, Tensor], num_pages: int, **options: Any
) -> None:
    """The step that turned ``before`` into ``after``: caches and index written, the best pages selected by the index
    that is now there, and attention over the selected pages within the error of PyTorch in the same precision."""
    before, after, (out, lse, pages) = before.to("cpu"), after.to("cpu"), result
    spec = before.spec
    reference.unique_decode(
        before.q, before.k, before.v, before.k_cache, before.v_cache, before.index, before.block_table,
        before.seq_lens, num_pages, **before.scoring, compute_dtype=accumulator(spec.dtype),
    )  # fmt: skip
    assert_same(after.k_cache, before.k_cache, "k_cache")
    assert_same(after.v_cache, before.v_cache, "v_cache")
    for part, expected in zip(
        *(reference.decode_index(c.index, **before.stored) for c in (after, before)), strict=True
    ):
        units = 2 if spec.dtype.itemsize == 2 else 64  # test_page_index has the exact bound
        tolerance = units * torch.finfo(spec.dtype).eps
        torch.testing.assert_close(part, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert_selects_best(pages, after, num_pages, **options)
    assert_attention(after, pages, (out, lse))


def assert_attention(case: Case, pages: Tensor, got: tuple[Tensor, Tensor], **options: Any) -> None:
    """``got`` is attention of ``case`` over ``pages``, within the error of PyTorch in the same precision."""
    case, dtype = case.to("cpu"), case.spec.dtype
    args = (case.q, case.k_cache, case.v_cache, pages.cpu(), case.block_table, case.seq_lens)
    options = {**case.attending, **options}
    out, lse = reference.sparse_decode(*args, **options)
    same, _ = reference.sparse_decode(*args, **options, compute_dtype=dtype)
    _, same_lse = reference.sparse_decode(*args, **options, compute_dtype=accumulator(dtype))
    assert (got[0].dtype, got[1].dtype) == (dtype, accumulator(dtype))
    dim = case.spec.head_dim
    term = (options.get("scale") or dim**-0.5) * typical_size(case.q) * typical_size(case.k_cache)
    # An error of a logit is a relative error of its weight.
    assert_close(got[0], out, same, "out", typical_size(case.v_cache) * max(1.0, term * dim**0.5))
    assert_close(got[1], lse, same_lse, "lse", term * dim)


def typical_size(tensor: Tensor) -> float:
    """Mean magnitude of the finite numbers."""
    finite = tensor.double()[tensor.isfinite()]
    return float(finite.abs().mean()) if len(finite) else 0.0


def poisoned(call: Callable[[], Any]) -> Any:
    """The result of ``call`` when the memory that its outputs get held NaN before."""
    first = call()
    outputs = [first] if isinstance(first, Tensor) else list(first)
    sizes = [out.untyped_storage().nbytes() for out in outputs]
    device = outputs[0].device
    del first, outputs
    junk = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes * 4]
    del junk
    return call()


def assert_threads_agree(call: Callable[[], Any]) -> None:
    """The same bits with 1, 2 and 3 threads, and again with 1."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            result = call()
            results.append([result] if isinstance(result, Tensor) else list(result))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        for got, first in zip(again, results[0], strict=True):
            assert_same(got, first, "results with another number of threads")
