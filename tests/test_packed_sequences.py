"""What a packed batch promises: no sequence sees another, whatever that holds; any number of sequences; any strides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from op_cases import CUDA_DTYPES, DEVICES, assert_same
from training_cases import MODES, RESULTS, RULES, TrainCase, TrainSpec, assert_all_same, build, library_mask, run

from unique_attn import ops, train

# Group, head dimension, page size: the shapes of every kernel, and tiles with and without rows to spare.
SHAPES = [(2, 64, 8), (3, 128, 4), (1, 128, 64), (16, 64, 16), (3, 40, 8), (2, 256, 8)]


def plain_case(spec: TrainSpec, device: str) -> TrainCase:
    """No gradient is compared with the oracle's, so the best head of a group may be in doubt."""
    case = build(replace(spec, mode="hard"), device)
    return replace(case, spec=replace(case.spec, mode=spec.mode))


# ---- A neighbour's NaN and infinities. ----


def assert_unhurt(case: TrainCase, clean: dict[str, torch.Tensor], hurt: int) -> None:
    got = run(case)
    for b, part in enumerate(case.sequences):
        if b != hurt:
            for name in RESULTS:
                assert_same(got[name][part], clean[name][part], f"{name} of sequence {b}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("group", "head_dim", "page_size"), SHAPES)
def test_a_sequence_does_not_hurt_its_neighbours(
    device: str, dtype: torch.dtype, mode: str, group: int, head_dim: int, page_size: int
) -> None:
    """Tiles of tokens reach past the end of a sequence into the next one, where a weight of 0 times NaN is NaN. Every
    tensor of the sequence in the middle is bad in turn, then all of them; of its neighbours every result is finite and
    has the same bits."""
    spec = TrainSpec((150, 70, 203), 2, group, head_dim, page_size, num_pages=4, dtype=dtype, mode=mode)
    for rule in ["directional", "unique"] if mode == "soft" else ["directional"]:
        case = plain_case(replace(spec, rule=rule), device)
        clean = run(case)
        assert all(bool(clean[name].isfinite().all()) for name in RESULTS)
        good = {name: getattr(case, name).clone() for name in ("q", "k", "v", "grad_out")}
        for poison in (torch.nan, torch.inf, -torch.inf):
            for names in (["q"], ["k"], ["v"], ["grad_out"], list(good)):
                for name, tensor in good.items():
                    getattr(case, name).copy_(tensor)
                    if name in names:
                        getattr(case, name)[150:220] = poison
                assert_unhurt(case, clean, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_where_tiles_end(device: str, mode: str, length: int) -> None:
    """A sequence of every length around the borders of tiles, between bad ones."""
    for dtype, head_dim in [(torch.bfloat16, 64), (torch.float16, 128)]:
        spec = TrainSpec((40, length, 90), 1, 4, head_dim, 8, num_pages=3, dtype=dtype, mode=mode)
        case = plain_case(spec, device)
        middle = slice(40, 40 + length)
        clean = run(case)
        for name in ("q", "k", "v", "grad_out"):
            tensor = getattr(case, name)
            tensor[:40], tensor[40 + length :] = torch.nan, torch.inf
        got = run(case)
        for name in RESULTS:
            assert bool(got[name][middle].isfinite().all()), name
            assert_same(got[name][middle], clean[name][middle], name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_slots_of_no_page_may_hold_anything(device: str, dtype: torch.dtype, rule: str) -> None:
    """Between the pages of two sequences, and behind the last ones. An incomplete last page has no gate either."""
    for group, head_dim, page_size in SHAPES:
        spec = TrainSpec((150, 1, 90), 2, group, head_dim, page_size, num_pages=4, dtype=dtype, rule=rule)
        case = plain_case(spec, device)
        mask = library_mask(case)
        clean = run(case, mask)
        first = train.page_slots(case.cu_seqlens, page_size).tolist()
        used = {slot + page for slot, n in zip(first, spec.lengths, strict=True) for page in range(n // page_size)}
        index = mask["index"].clone()
        index[[slot for slot in range(len(index)) if slot not in used]] = 0xFF
        assert_all_same(run(case, {**mask, "index": index}), clean)
        theta = ops.page_boundary(case.q, index, *case.packing, spec.num_pages, **spec.scoring)
        assert_same(theta, mask["theta"])


# ---- Many sequences. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_more_sequences_than_a_grid_has_in_z(device: str, mode: str) -> None:
    """65,535 is the most that CUDA takes there."""
    count = 65_539
    lengths = tuple(1 + (b * b) % 3 for b in range(count))
    shapes = [(torch.float32, 8)] if device == "cpu" else [(torch.bfloat16, 64), (torch.float32, 64)]
    for dtype, head_dim in shapes:
        case = plain_case(TrainSpec(lengths, 1, 2, head_dim, 4, num_pages=2, dtype=dtype, mode=mode), device)
        got = run(case)
        padded = [torch.zeros(count, 3, x.shape[1], head_dim, device=device) for x in (case.q, case.k, case.v)]
        real = torch.arange(3, device=device) < torch.tensor(lengths, device=device)[:, None]
        for to, x in zip(padded, (case.q, case.k, case.v), strict=True):
            to[real] = x.float()
            to.requires_grad_()
        q, k, v = (x.transpose(1, 2) for x in padded)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)[real]
        grads = torch.autograd.grad(out, padded, case.grad_out.float())
        tolerance = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        for name, expected in zip(("out", "dq", "dk", "dv"), (out, *(x[real] for x in grads)), strict=True):
            torch.testing.assert_close(got[name].float(), expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_gates_of_many_sequences(device: str) -> None:
    """The last of 65,541 sequences is long enough to have gates: it is as if alone."""
    lengths = (*(1 + b % 3 for b in range(65_540)), 77)
    dtypes = [torch.float32] if device == "cpu" else [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        case = plain_case(TrainSpec(lengths, 1, 2, 64, 8, num_pages=4, dtype=dtype), device)
        last = case.sequences[-1]
        mask = library_mask(case)
        assert bool(mask["theta"][last].isfinite().any())
        assert_all_same(run(case.alone(last)), run(case, mask), last)


# ---- Strides. ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_tensors(device: str, dtype: torch.dtype, mode: str, dim: int) -> None:
    """Strides of 0, over tokens, heads or channels: the same bits as of a copy."""
    for head_dim in (64, 128, 40):
        case = plain_case(TrainSpec((75, 40), 2, 2, head_dim, 8, num_pages=3, dtype=dtype, mode=mode), device)
        for name in ("q", "k", "v"):
            tensor = getattr(case, name)
            repeated = tensor.narrow(dim, 0, 1).expand_as(tensor)
            got = run(replace(case, **{name: repeated}))
            assert_all_same(got, run(replace(case, **{name: repeated.contiguous()})))
        if mode == "soft":
            index = library_mask(case)["index"]
            repeated = index.narrow(1, 0, 1).expand_as(index)
            args = (*case.packing, case.spec.num_pages)
            expected = ops.page_boundary(case.q, repeated.contiguous(), *args, **case.spec.scoring)
            assert_same(ops.page_boundary(case.q, repeated, *args, **case.spec.scoring), expected)
            masks = [{"index": x, "theta": expected, "tau": case.tau} for x in (repeated, repeated.contiguous())]
            assert_all_same(run(case, masks[0]), run(case, masks[1]))
