"""Training semantics are decode semantics: the index, the selection and the outputs of unique_attn.train against the
decode ops over a paged cache, token by token; and what PyTorch asks of masked_attention."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CUDA_DTYPES,
    DEVICES,
    DTYPES,
    FORMATS,
    assert_close,
    assert_same,
    assert_threads_agree,
    examples,
    needs_cuda,
    poisoned,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from training_cases import (
    MODES,
    RULES,
    TrainCase,
    TrainSpec,
    assert_attention,
    build,
    eager,
    library_mask,
    oracle,
    run,
    train_specs,
)

from unique_attn import ops, train


def masked(case: TrainCase, *leaves: Tensor, **options: Any) -> Tensor:
    args = leaves or (case.q, case.k, case.v)
    given = {"mode": case.spec.mode, "tau": case.tau, "scale": case.spec.scale, **case.spec.scoring, **options}
    return train.masked_attention(*args, *case.packing, case.spec.num_pages, **given)


def select(case: TrainCase, index_format: str = "exact", **options: Any) -> Tensor:
    spec, stored = case.spec, {"index_format": index_format}
    index = train.packed_index(case.k, *case.packing, rule=spec.rule, page_size=spec.page_size, **stored)
    return train.select_pages(case.q, index, *case.packing, spec.num_pages, **{**spec.scoring, **stored, **options})


def decode(case: TrainCase, part: slice, index_format: str = "exact") -> tuple[Tensor, Tensor]:
    """Outputs ``[L, Hq, D]`` and selected pages ``[L, H, n]`` of decoding a sequence token by token."""
    spec, length = case.spec, part.stop - part.start
    blocks = -(-length // 64) + 1
    caches = [case.k.new_zeros(blocks, spec.kv_heads, 64, spec.head_dim) for _ in range(2)]
    index = ops.new_index(caches[0], rule=spec.rule, page_size=spec.page_size, index_format=index_format)
    table = torch.arange(blocks, device=case.q.device).flip(0).int()[None].contiguous()
    options = {**spec.scoring, "scale": spec.scale, "index_format": index_format}
    outs, pages = [], []
    for t in range(length):
        q, k, v = (x[part][t][None, None] for x in (case.q, case.k, case.v))
        lens = torch.tensor([t + 1], dtype=torch.int32, device=q.device)
        out, _, selected = ops.unique_decode(q, k, v, *caches, index, table, lens, spec.num_pages, **options)
        outs.append(out[0])
        pages.append(selected[0])
    return torch.cat(outs), torch.cat(pages)


# ---- Train equals decode. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(5)
def test_hard_mode_equals_decoding_token_by_token(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """The same pages for every token, bit for bit, and outputs within the error of PyTorch in the same precision."""
    rules = st.sampled_from(list(ops.RULES))
    case = build(data.draw(train_specs(dtype=dtype, rule=rules, mode="hard", kv_heads=2)), device)
    formats = FORMATS if ops.RULES[case.spec.rule].compressible else ["exact"]
    index_format = data.draw(st.sampled_from(formats), label="index_format")
    pages, got = select(case, index_format), masked(case, index_format=index_format)
    steps = [decode(case, part, index_format) for part in case.sequences if part.stop > part.start]
    assert_same(pages, torch.cat([step[1] for step in steps]), "selected pages")
    mask = {"pages": pages}
    exact, same = oracle(case, mask)["out"], eager(case, mask)["out"]
    for what, out in (("training", got), ("decoding", torch.cat([step[0] for step in steps]))):
        assert_close(out, exact, same, what, 2 * float(exact.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@given(data=st.data())
@examples(10)
def test_the_index_is_the_one_that_decoding_builds(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    rules = st.sampled_from(list(ops.RULES))
    case = build(data.draw(train_specs(dtype=dtype, rule=rules, mode="hard")), device)
    spec, size = case.spec, case.spec.page_size
    packed = train.packed_index(case.k, *case.packing, rule=spec.rule, page_size=size)
    for b, part in enumerate(case.sequences):
        keys = case.k[part]
        count = -(-len(keys) // size)
        cache = keys.new_zeros(count * size, spec.kv_heads, spec.head_dim)
        cache[: len(keys)] = keys
        cache = cache.view(count, size, spec.kv_heads, spec.head_dim).transpose(1, 2)
        index = ops.new_index(cache, rule=spec.rule, page_size=size)
        table = torch.arange(count, dtype=torch.int32, device=device)[None]
        lens = torch.tensor([len(keys)], dtype=torch.int32, device=device)
        ops.page_index(cache, index, table, 0 * lens, lens, max_new_tokens=len(keys), rule=spec.rule, page_size=size)
        first = part.start // size + b
        assert_same(packed[first : first + count], index)
        assert_same(train.page_slots(case.cu_seqlens, size)[b], torch.tensor(first, dtype=torch.int32))


@pytest.mark.parametrize("device", DEVICES)
def test_selection_in_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few queries fit into the memory for scores, the pages are the same; so are those of a batch's parts."""
    case = build(TrainSpec((131, 0, 17, 16, 1), group=3, dtype=torch.bfloat16, mode="hard"), device)
    expected = select(case)
    assert expected.shape == (165, 2, 6)
    assert_same(poisoned(lambda: select(case)), expected)
    for size in (1, 10_000):
        monkeypatch.setattr(train, "_SCORE_BYTES", size)
        assert_same(select(case), expected)
    loose = replace(case, spec=replace(case.spec, lengths=(1000,)))  # a bound of the lengths that is not tight
    assert_same(select(loose), expected)
    for part in case.sequences:
        assert_same(select(case.alone(part)), expected[part])


# ---- The whole. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(8)
def test_masked_attention_is_its_parts(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = build(data.draw(train_specs(dtype=dtype)), device)
    leaves = case.leaves()
    out = masked(case, *leaves)
    expected = run(case)
    grads = torch.autograd.grad(out, leaves, case.grad_out)
    for name, value in zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True):
        assert_same(value, expected[name], name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(device: str, mode: str) -> None:
    for lengths in ((), (0,), (0, 0)):
        case = build(TrainSpec(lengths, mode=mode), device)
        leaves = case.leaves()
        out = masked(case, *leaves)
        assert out.shape == (0, 4, 16)
        assert all(grad.shape[0] == 0 for grad in torch.autograd.grad(out, leaves, case.grad_out))


def test_threads_do_not_change_bits() -> None:
    case = build(TrainSpec((131, 0, 57), group=3, head_dim=40, dtype=torch.bfloat16, mode="hard"))
    assert_threads_agree(lambda: select(case))
    assert_threads_agree(lambda: train.packed_index(case.k, *case.packing, rule="directional", page_size=4))


@pytest.mark.parametrize("device", DEVICES)
def test_training_lowers_a_loss(device: str) -> None:
    """Gradients point the right way: a few steps on q, k and v through the soft mask."""
    case = build(TrainSpec((60,), group=2), device)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    losses = []
    for _ in range(12):
        loss = (masked(case, *leaves) - case.grad_out).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(after < before for before, after in pairwise(losses))


# ---- Autocast. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_in_scaled_dot_product_attention(device: str, mode: str, dtype: torch.dtype) -> None:
    """Mixed inputs run in autocast's dtype; gradients come back in each input's own; fp64 stays."""
    case = build(TrainSpec((75, 22), group=3, dtype=dtype, mode=mode), device)
    low = case.leaves()
    expected = masked(case, *low)
    expected_grads = torch.autograd.grad(expected, low, case.grad_out)
    leaves = (case.q.detach().requires_grad_(), *(x.detach().float().requires_grad_() for x in (case.k, case.v)))
    with torch.autocast(device, dtype=dtype):
        out = masked(case, *leaves)
        mask = library_mask(replace(case, k=leaves[1]))
        parts = ops.soft_mask_attention(*leaves, *case.packing, **mask, **case.spec.scoring)[0]
    assert_same(out, expected)
    assert_same(parts, expected)
    grads = torch.autograd.grad(out, leaves, case.grad_out)
    for grad, leaf, other in zip(grads, leaves, expected_grads, strict=True):
        assert_same(grad, other.to(leaf.dtype))
    if device == "cpu":
        with torch.autocast(device, dtype=dtype):
            assert masked(case, *(x.detach().double() for x in leaves)).dtype == torch.float64
    with torch.autocast(device, dtype=dtype, enabled=False), pytest.raises(ValueError, match="k: expected dtype"):
        masked(case, *leaves)


# ---- torch.compile. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole_with_its_backward(device: str, mode: str) -> None:
    """One graph, the same bits, and no recompilation when tau, values or packing bounds on the device change."""
    torch._dynamo.reset()
    case = build(TrainSpec((75, 22), group=3, dtype=torch.bfloat16, mode=mode), device)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, tau: Tensor) -> Tensor:
        out = train.masked_attention(q, k, v, cu_seqlens, 75, 6, mode=mode, tau=tau, rule="directional", page_size=4)
        return out.float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for tau, border in [(2.0, 75), (1.0, 75), (0.25, 60), (0.25, 22)]:
        cu_seqlens = torch.tensor([0, border, 97], dtype=torch.int32, device=device)
        results = []
        for function in (loss, compiled):
            leaves = case.leaves()
            value = function(*leaves, cu_seqlens, torch.tensor(tau, device=device))
            results.append([value, *torch.autograd.grad(value, leaves)])
        for got, expected in zip(results[1], results[0], strict=True):
            assert_same(got.detach(), expected.detach())
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_with_inductor_and_autocast(device: str) -> None:
    torch._dynamo.reset()
    case = build(TrainSpec((40, 0, 22, 9), dtype=torch.bfloat16), device)
    leaves = [x.detach().float().requires_grad_() for x in (case.q, case.k, case.v)]

    def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return train.masked_attention(2 * q, k, v, cu_seqlens, 40, 6, page_size=4, tau=case.tau).float() + 1

    out, expected = (f(*leaves, case.cu_seqlens) for f in (torch.compile(function, fullgraph=True), function))
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(x, leaves, case.grad_out.float()) for x in (out, expected))
    for got, other in zip(*grads, strict=True):
        torch.testing.assert_close(got, other)


# ---- Memory. ----


@needs_cuda
@pytest.mark.parametrize("mode", MODES)
def test_memory_is_linear_in_the_sequence_length(mode: str) -> None:
    """Beside a bounded chunk of scores (256 MiB), forward and backward allocate a fixed number of bytes a token."""
    extra = {}
    for length in (8192, 16384, 32768, 65536):
        q, k, v = (
            torch.randn(length, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (16, 8, 8)
        )
        grad_out = torch.randn_like(q)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        tau = torch.tensor(1.0, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = train.masked_attention(q, k, v, cu_seqlens, length, 64, mode=mode, tau=tau)
        out.backward(grad_out)
        torch.cuda.synchronize()
        extra[length] = torch.cuda.max_memory_allocated() - before
        del q, k, v, grad_out, out
    chunk = 256 << 20
    tensors = 64 * 2 * (16 + 8 + 8)  # bytes a token of q, k and v
    for length, used in extra.items():
        assert used <= 1.05 * chunk + 8 * tensors * length, extra
    assert extra[65536] - extra[32768] <= 8 * tensors * 32768, extra
    assert extra[32768] - extra[16384] <= 2.1 * max(extra[16384] - extra[8192], tensors * 8192), extra


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_a_longer_sequence(device: str, rule: str) -> None:
    """Several tiles and many pages on both sides of the boundary."""
    case = build(TrainSpec((700,), 1, 2, 64, 8, num_pages=12, dtype=torch.bfloat16, rule=rule), device)
    mask = library_mask(case)
    assert_attention(case, run(case, mask), mask)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_mode_is_refused(device: str) -> None:
    """Custom ops would lose the tangent and say nothing."""
    q, k, v = (torch.randn(40, heads, 16, device=device) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 40], dtype=torch.int32, device=device)

    def attend(x: Tensor) -> Tensor:
        return train.masked_attention(q, x, v, bounds, 40, 3, tau=torch.tensor(4.0, device=device))

    with pytest.raises(ops.NotDifferentiableError, match=r"masked_attention: k: .*jvp"):
        torch.func.jvp(attend, (k,), (torch.ones_like(k),))


def test_more_pages_than_the_ops_take() -> None:
    """Before their memory is asked for."""
    q, k, v = (torch.randn(40, heads, 16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 40], dtype=torch.int32)
    with pytest.raises(ValueError, match="num_pages: expected at most 4096, got 1000000000"):
        train.masked_attention(q, k, v, bounds, 40, 10**9, mode="hard")
    with pytest.raises(TypeError, match="num_pages: expected an integer"):
        train.masked_attention(q, k, v, bounds, 40, 3.5, mode="hard")  # type: ignore[arg-type]
