"""Cases for the training tests: packed sequences, the library's run, the oracle's, and a run in the inputs' precision.

A `TrainSpec` is what hypothesis draws and prints; `build(spec, device)` makes the tensors of it, always the same.

One thing is kept out of every case: a page on which the two best heads of a group score the same within rounding.
The score itself is continuous there (a maximum), and so are theta, the gates and the output; but the gradient goes to
the arg-max head alone, so that roundings decide which head's query gets it and whose numbers the page's keys get. Such
a query is drawn again. Exact ties have tests of their own: the lowest head wins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import DTYPES, GROUPS, accumulator, assert_close, assert_same, token_layout, typical_size
from torch import Tensor

from unique_attn import ops, reference_train, train

RULES = [rule for rule, info in ops.RULES.items() if info.trainable]
MODES = ["soft", "hard", "dense"]
LAYOUTS = ["dense", "heads_first", "fused", "channels_last_but_one", "odd_offset"]
HEAD_DIMS = [8, 16, 24, 40, 64, 72, 80, 128, 136, 256]
RESULTS = ("out", "lse", "dq", "dk", "dv")  # of `run` and `oracle`

INF = torch.inf
# Scores of the candidates, k', and the theta they give.
BOUNDARIES = [
    ("between two", [5.0, 1.0, 3.0, 2.0], 2, 2.5),
    ("ties across the boundary", [3.0, 1.0, 3.0, 3.0], 2, 3.0),
    ("ties above it", [3.0, 3.0, 1.0, 0.0], 2, 2.0),
    ("all equal", [2.0, 2.0, 2.0, 2.0], 2, 2.0),
    ("as many as wanted", [5.0, 1.0, 3.0, 2.0], 4, -INF),
    ("fewer than wanted", [5.0, 1.0], 3, -INF),
    ("no candidate", [], 1, -INF),
    ("no candidate, none wanted", [], 0, -INF),
    ("none wanted", [5.0, 1.0, 3.0, 2.0], 0, INF),
    ("NaN is the lowest", [torch.nan, 1.0, 3.0, torch.nan], 1, 2.0),
    ("NaN next to the boundary", [torch.nan, 1.0, 3.0, torch.nan], 2, -INF),
    ("all NaN", [torch.nan, torch.nan, torch.nan], 1, -INF),
    ("infinite", [INF, INF, 1.0], 1, INF),
    ("minus infinity last", [-INF, 4.0, 2.0], 1, 3.0),
    ("signed zeros", [-0.0, 0.0, -1.0], 1, 0.0),
]


@dataclass(frozen=True)
class TrainSpec:
    """Shape, dtype and layout of one case."""

    lengths: tuple[int, ...] = (75, 0, 33)
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    page_size: int = 4
    num_pages: int = 6
    sink_pages: int = 1
    recent_pages: int = 1
    dtype: torch.dtype = torch.float32
    rule: str = "directional"
    mode: str = "soft"
    tau: float = 2.0
    scale: float | None = None
    layout: str = "dense"
    seed: int = 0

    @property
    def scoring(self) -> dict[str, Any]:
        fixed = {"sink_pages": self.sink_pages, "recent_pages": self.recent_pages}
        return {"rule": self.rule, "page_size": self.page_size, **fixed}

    @property
    def weight(self) -> float:
        return ops.RULES[self.rule].weight

    @property
    def max_seqlen(self) -> int:
        return max([0, *self.lengths])


@dataclass
class TrainCase:
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    cu_seqlens: Tensor
    tau: Tensor
    spec: TrainSpec

    @property
    def packing(self) -> tuple[Tensor, int]:
        return self.cu_seqlens, self.spec.max_seqlen

    @property
    def sequences(self) -> list[slice]:
        """The tokens of each sequence."""
        return [slice(start, end) for start, end in pairwise(self.cu_seqlens.tolist())]

    def alone(self, part: slice) -> TrainCase:
        """One of the sequences as a case of its own."""
        length = part.stop - part.start
        return replace(
            self,
            **{name: getattr(self, name)[part] for name in ("q", "k", "v", "grad_out")},
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=self.q.device),
            spec=replace(self.spec, lengths=(length,)),
        )

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v that require grad, with their strides; or dense on the CPU in another dtype."""
        tensors = (self.q, self.k, self.v)
        if dtype is not None:
            tensors = tuple(x.cpu().to(dtype).contiguous() for x in tensors)
        return tuple(x.detach().requires_grad_() for x in tensors)  # type: ignore[return-value]


# ---- Building. ----


def head_margin(q: Tensor, keys: Tensor, spec: TrainSpec) -> Tensor:
    """For each query ``[L, H]``: whether on some page its two best heads are closer than roundings may move them."""
    args = (spec.rule, spec.page_size, spec.weight, spec.dtype)
    exact = reference_train.head_scores(q.double(), keys.double(), *args)
    square = torch.bfloat16 if spec.dtype.itemsize == 2 else None
    run = accumulator(spec.dtype)
    rounded = reference_train.head_scores(q.to(run), keys.to(run), *args, square_dtype=square).double()
    if exact.numel() == 0 or spec.group == 1:
        return torch.zeros(exact.shape[:2], dtype=torch.bool)
    error = 4 * (rounded - exact).abs().max() + 1e-12 * exact.abs().max()
    best = exact.topk(2, dim=2).values
    return (best[:, :, 0] - best[:, :, 1] <= 2 * error).any(-1)


def build(spec: TrainSpec, device: str = "cpu") -> TrainCase:
    """The tensors of ``spec``; on CUDA fp64 becomes fp32."""
    if device != "cpu" and spec.dtype == torch.float64:
        spec = replace(spec, dtype=torch.float32)
    random = torch.Generator().manual_seed(spec.seed)
    tokens = sum(spec.lengths)

    def draw(count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, spec.head_dim, generator=random, dtype=torch.float64)

    q_heads = spec.kv_heads * spec.group
    offset = draw(1, spec.kv_heads)  # keys have a mean, as real ones have
    k, v = (draw(tokens, spec.kv_heads) + offset).to(spec.dtype), draw(tokens, spec.kv_heads).to(spec.dtype)
    q, grad_out = draw(tokens, q_heads).to(spec.dtype), draw(tokens, q_heads).to(spec.dtype)
    cu_seqlens = torch.tensor([0, *spec.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for start, end in pairwise(cu_seqlens.tolist()):
        part = slice(start, end)
        for _ in range(100 if spec.mode == "soft" else 0):
            unclear = head_margin(q[part], k[part], spec).repeat_interleave(spec.group, 1)
            if not unclear.any():
                break
            q[part][unclear] = draw(end - start, q_heads).to(spec.dtype)[unclear]
        else:
            assert spec.mode != "soft", "no queries with clear best heads"
    tensors = [token_layout(x[None].to(device), spec.layout)[0] for x in (q, k, v, grad_out)]
    return TrainCase(*tensors, cu_seqlens.to(device), torch.tensor(spec.tau, device=device), spec)


# ---- Running. ----


def library_mask(case: TrainCase) -> dict[str, Tensor]:
    """What the library's ops hand to `ops.soft_mask_attention` in the case's mode."""
    spec = case.spec
    if spec.mode == "dense":
        return {}
    index = train.packed_index(case.k, *case.packing, rule=spec.rule, page_size=spec.page_size)
    if spec.mode == "hard":
        return {"pages": train.select_pages(case.q, index, *case.packing, spec.num_pages, **spec.scoring)}
    theta = ops.page_boundary(case.q, index, *case.packing, spec.num_pages, **spec.scoring)
    return {"index": index, "theta": theta, "tau": case.tau}


def run(case: TrainCase, mask: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv of the library."""
    leaves = case.leaves()
    mask = library_mask(case) if mask is None else mask
    out, lse = ops.soft_mask_attention(*leaves, *case.packing, **mask, **case.spec.scoring, scale=case.spec.scale)
    grads = torch.autograd.grad(out, leaves, case.grad_out)
    return dict(zip(RESULTS, (out.detach(), lse, *grads)))


def oracle_mask(case: TrainCase, mask: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    if "pages" in mask:
        return {"pages": mask["pages"].cpu()}
    return {"theta": mask["theta"].cpu().to(dtype), "tau": float(mask["tau"])} if mask else {}


def cuda_roundings(case: TrainCase, dtype: torch.dtype) -> dict[str, Any]:
    """What the CUDA kernels store in 16 bits for 16-bit inputs: squares, and on Hopper the log-gates."""
    if dtype == torch.float64 or case.spec.dtype.itemsize != 2 or not case.q.is_cuda:
        return {}
    hopper = torch.cuda.get_device_capability() == (9, 0) and case.spec.head_dim in (64, 128)
    return {"square_dtype": torch.bfloat16, "gate_dtype": torch.float16 if hopper else None}


def oracle(case: TrainCase, mask: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same from the oracle in ``dtype``, with the library's theta or pages (which have tests of their own)."""
    spec, leaves = case.spec, case.leaves(dtype)
    out, lse = reference_train.soft_mask_attention(
        *leaves, case.cu_seqlens.cpu(), **oracle_mask(case, mask, dtype), **spec.scoring, scale=spec.scale,
        entry_dtype=spec.dtype, compute_dtype=dtype, **cuda_roundings(case, dtype),
    )  # fmt: skip
    grads = torch.autograd.grad(out, leaves, case.grad_out.cpu().to(dtype))
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *grads)))


class StoredOutput(torch.autograd.Function):
    """softmax(logits) v whose backward pass takes sum_j P_j dP_j from the output as it is stored, as every attention
    does that does not keep its weights. Logits fp32 ``[L, H, G, L]`` (fp64), v ``[L, H, D]``, products in v's dtype."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, v: Tensor) -> Tensor:
        weights = logits.softmax(-1)
        out = torch.einsum("lhgj,jhd->lhgd", weights.to(v.dtype), v)
        ctx.save_for_backward(weights, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, v, out = ctx.saved_tensors
        d_weights = torch.einsum("lhgd,jhd->lhgj", grad, v).to(weights.dtype)
        delta = (out.to(weights.dtype) * grad.to(weights.dtype)).sum(-1, keepdim=True)
        d_v = torch.einsum("lhgj,lhgd->jhd", weights.to(v.dtype), grad)
        return weights * (d_weights - delta), d_v


def eager(case: TrainCase, mask: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in PyTorch in the inputs' precision: products in the inputs' dtype, scores, gates and softmax in fp32
    (fp64). On CUDA the library multiplies 16-bit inputs' squares as bf16 and on Hopper keeps log-gates in fp16, and so
    does this run there: that is the whole of the allowance for it."""
    spec, leaves = case.spec, case.leaves(case.spec.dtype)
    wide = accumulator(spec.dtype)
    options = {"theta": None, "tau": None, "pages": None, **oracle_mask(case, mask, wide), **spec.scoring}
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    outs = [leaves[0][:0]]
    for part in case.sequences:
        q, k, v = (x[part] for x in leaves)
        per_query = {n: None if options[n] is None else options[n][part] for n in ("theta", "pages")}
        gates = reference_train.key_gates(
            q.to(wide), k.to(wide), **{**options, **per_query}, weight=spec.weight, entry_dtype=spec.dtype,
            **cuda_roundings(case, wide),
        )  # fmt: skip
        group_q = q.view(len(q), spec.kv_heads, spec.group, spec.head_dim)
        logits = torch.einsum("lhgd,jhd->lhgj", group_q, k).to(wide) * scale + gates[:, :, None]
        logits = logits.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1)[:, None, None], -torch.inf)
        outs.append(StoredOutput.apply(logits, v).reshape(q.shape))
    out = torch.cat(outs)
    grads = torch.autograd.grad(out, leaves, case.grad_out.cpu().contiguous())
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads)))


# ---- Comparing. ----


def assert_attention(case: TrainCase, got: dict[str, Tensor], mask: dict[str, Tensor]) -> None:
    """``got`` errs at most twice as much as a run in the inputs' precision does, for lse as the oracle in fp32 does.

    Beside that, what a plain sum in the accumulator's precision may err by: sqrt(n) units in the last place for n
    terms (PyTorch sums in blocks), and the error of a logit and of (score - theta) / tau, which is a relative error
    of a weight. The gradient of a logit is a difference of two numbers the size of grad_out . v, which may cancel.
    """
    spec, exact, same = case.spec, oracle(case, mask), eager(case, mask)
    if not sum(spec.lengths):
        assert all(value.numel() == 0 for value in got.values())
        return
    same["lse"] = oracle(case, mask, accumulator(spec.dtype))["lse"]
    scale = spec.scale or spec.head_dim**-0.5
    product = typical_size(case.q) * typical_size(case.k) * spec.head_dim**0.5
    logit = scale * product
    if spec.mode == "soft":
        logit += (1 + spec.weight * spec.head_dim**0.5) * product / spec.tau
    cancelling = scale * typical_size(case.grad_out) * typical_size(case.v) * spec.head_dim**0.5
    factor = {"dq": case.k, "dk": case.q}
    dtypes = {"lse": accumulator(spec.dtype)}
    for name, value in got.items():
        assert value.dtype == dtypes.get(name, spec.dtype), name
        size = float(exact[name].abs().max())
        if name in factor:
            size = max(size, cancelling * float(factor[name].abs().max()))
        sums = spec.max_seqlen * (spec.group if name in ("dk", "dv") else 1)
        terms = logit if name == "lse" else size * (sums**0.5 + logit)
        assert_close(value, exact[name], same[name], name, terms)


def assert_all_same(got: dict[str, Tensor], expected: dict[str, Tensor], part: slice = slice(None)) -> None:
    for name in RESULTS:
        assert_same(got[name], expected[name][part], name)


def assert_boundary(case: TrainCase, theta: Tensor) -> None:
    """theta errs at most twice as much against exact, unrounded scores as PyTorch does with rounded fp32 ones.

    theta is half the sum of two order statistics of the scores, and those move by no more than the largest error of a
    score: no allowance for pages that change places is needed.
    """
    spec = case.spec
    q, k = (x.cpu().contiguous() for x in (case.q, case.k))
    args = (q, k, case.cu_seqlens.cpu(), spec.num_pages)
    exact = reference_train.page_boundary(*args, **spec.scoring, rounded=False)
    square = torch.bfloat16 if spec.dtype.itemsize == 2 and case.q.is_cuda else None
    run = accumulator(spec.dtype)
    same = reference_train.page_boundary(*args, **spec.scoring, compute_dtype=run, square_dtype=square)
    assert theta.dtype == run
    terms = typical_size(case.q) * typical_size(case.k) * spec.head_dim * (1 + spec.weight)
    assert_close(theta, exact, same, "theta", terms)


# ---- What hypothesis draws. ----


@st.composite
def packed_lengths(draw: st.DrawFn, page_size: int, num_pages: int) -> tuple[int, ...]:
    """Mostly a sequence with more pages than selected, up to a few tokens from a page border, among up to two others:
    empty ones, single tokens, on and around the borders of pages and of the budget."""
    pages = num_pages + draw(st.integers(0, 1 + 24 // page_size))
    long = pages * page_size + draw(st.sampled_from([0, 1, page_size - 1, page_size + 1]))
    near = st.builds(lambda n, d: max(0, n * page_size + d), st.integers(0, num_pages), st.integers(-1, 1))
    others = draw(st.lists(st.one_of(near, st.sampled_from([0, 1])).filter(lambda n: n <= 130), max_size=2))
    return tuple(draw(st.permutations([long, *others])))


@st.composite
def train_specs(draw: st.DrawFn, /, **fixed: Any) -> TrainSpec:
    """Any supported shape; ``fixed`` gives fields a value or another strategy."""

    def pick(name: str, values: st.SearchStrategy[Any]) -> Any:
        wanted = fixed.get(name, values)
        return draw(wanted, label=name) if isinstance(wanted, st.SearchStrategy) else wanted

    page_size = pick("page_size", st.sampled_from([4, 4, 8, 8, 16, 32, 64]))
    sink_pages = pick("sink_pages", st.sampled_from([1, 1, 0, 2]))
    recent_pages = pick("recent_pages", st.sampled_from([1, 1, 2, 3]))
    always = sink_pages + recent_pages
    most = max(always, min(always + 6, 256 // page_size - 1))
    num_pages = pick("num_pages", st.integers(always, most))
    return TrainSpec(
        page_size=page_size,
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        num_pages=num_pages,
        lengths=pick("lengths", packed_lengths(page_size, num_pages)),
        kv_heads=pick("kv_heads", st.integers(1, 2)),
        group=pick("group", st.sampled_from(GROUPS)),
        head_dim=pick("head_dim", st.sampled_from(HEAD_DIMS)),
        dtype=pick("dtype", st.sampled_from(DTYPES)),
        rule=pick("rule", st.sampled_from(RULES)),
        mode=pick("mode", st.sampled_from(["soft", "soft", "hard", "dense"])),
        tau=pick("tau", st.sampled_from([0.5, 2.0, 10.0])),
        scale=pick("scale", st.sampled_from([None, None, 0.05])),
        layout=pick("layout", st.sampled_from(LAYOUTS)),
        seed=pick("seed", st.integers(0, 2**16)),
    )
