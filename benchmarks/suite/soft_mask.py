"""Training steps of one attention layer at several lengths: the page mask against scaled_dot_product_attention."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.measure.harness import Timing, measure
from benchmarks.measure.sweep import heads
from benchmarks.measure.text_table import text_table
from examples.support.results import DTYPES, environment
from unique_attn import ops, train

TRAINING_RULES = [rule for rule in ops.RULES if ops.RULES[rule].trainable]
BACKENDS = {"flash_attention": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PEER = "sdpa_flash_attention"  # what times are compared with
BACKWARD_PRODUCTS = 2.5  # the backward pass multiplies five matrices where the forward pass multiplies two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="lengths, each of the one sequence")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=8, help="tokens per page")
    parser.add_argument("--budget", type=int, default=512, help="tokens that a KV head selects")
    parser.add_argument("--rule", default="directional", choices=TRAINING_RULES)
    parser.add_argument("--tau", type=float, default=1.0, help="temperature of the gates")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))


class Side:
    """One way to compute attention: ``forward`` of inputs that require grad, and the gradient of its output."""

    def __init__(self, forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor) -> None:
        self.forward = forward
        self.inputs = inputs
        self.grad = grad

    def alone(self) -> None:
        with torch.no_grad():
            self.forward()

    def step(self) -> None:
        torch.autograd.grad(self.forward(), self.inputs, self.grad)

    def extra_bytes(self) -> dict[str, int]:
        """Peak CUDA memory beside inputs, output, its gradient and the inputs' gradients, of each pass. What the
        forward pass keeps for the backward pass counts in both."""
        device = self.grad.device
        self.step()  # what is allocated once and for all
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = self.forward()
        torch.cuda.synchronize(device)
        forward = torch.cuda.max_memory_allocated(device) - before - _bytes([out])
        torch.cuda.reset_peak_memory_stats(device)
        grads = torch.autograd.grad(out, self.inputs, self.grad)
        torch.cuda.synchronize(device)
        backward = torch.cuda.max_memory_allocated(device) - before - _bytes([out, *grads])
        return {"forward_bytes": forward, "backward_bytes": backward}


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


class Layer:
    """Random inputs of one attention layer, packed for us and ``[1, heads, N, D]`` for SDPA."""

    def __init__(self, options: argparse.Namespace, tokens: int) -> None:
        self.o = options
        self.tokens = tokens
        self.q_heads, self.kv_heads = heads(options.heads)
        device, dtype = torch.device(options.device), DTYPES[options.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def random(count: int) -> torch.Tensor:
            return torch.randn(tokens, count, options.head_dim, generator=generator, device=device, dtype=dtype)

        self.inputs = [random(n).requires_grad_() for n in (self.q_heads, self.kv_heads, self.kv_heads)]
        self.grad = random(self.q_heads)
        self.cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        self.tau = torch.tensor(options.tau, device=device)
        self.rows = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in self.inputs]
        self.grad_rows = self.grad.transpose(0, 1)[None].contiguous()
        self.scoring: dict[str, Any] = {"rule": options.rule, "page_size": options.page_size}
        self.packing = (self.cu_seqlens, tokens)
        self.num_pages = options.budget // options.page_size

    def masked(self, mode: train.Mode) -> torch.Tensor:
        q, k, v = self.inputs
        return train.masked_attention(q, k, v, *self.packing, self.num_pages, mode=mode, tau=self.tau, **self.scoring)

    def sdpa(self, backend: SDPBackend) -> torch.Tensor:
        q, k, v = self.rows
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def sides(self) -> dict[str, Side]:
        """Index and boundary are part of ours. Backends that this machine lacks are left out."""
        modes: tuple[train.Mode, ...] = ("soft", "hard", "dense")
        sides = {str(mode): Side(partial(self.masked, mode), self.inputs, self.grad) for mode in modes}
        for name in BACKENDS if self.grad.is_cuda else ("flash_attention",):
            side = Side(partial(self.sdpa, BACKENDS[name]), self.rows, self.grad_rows)
            try:
                side.step()
            except RuntimeError as error:
                if f"sdpa_{name}" == PEER or isinstance(error, torch.OutOfMemoryError):
                    raise
                tqdm.write(f"left out sdpa_{name}: {error}", file=sys.stderr)
            else:
                sides[f"sdpa_{name}"] = side
        return sides

    def parts(self) -> dict[str, Callable[[], object]]:
        """What comes before attention: the index, soft mode's boundary, hard mode's selection."""
        q, k, _ = (x.detach() for x in self.inputs)
        index = train.packed_index(k, *self.packing, **self.scoring)
        return {
            "index": lambda: train.packed_index(k, *self.packing, **self.scoring),
            "boundary": lambda: ops.page_boundary(q, index, *self.packing, self.num_pages, **self.scoring),
            "selection": lambda: train.select_pages(q, index, *self.packing, self.num_pages, **self.scoring),
        }

    def largest_error(self) -> float:
        """Of our dense mode against SDPA, so that both sides are known to compute attention."""
        with torch.no_grad():
            difference = self.masked("dense").transpose(0, 1)[None] - self.sdpa(BACKENDS["flash_attention"])
        return float(difference.abs().max())


def flops(tokens: int, q_heads: int, head_dim: int) -> dict[str, float]:
    """Multiplications and additions of causal attention, whatever the mask hides beyond that."""
    forward = 2.0 * tokens**2 * head_dim * q_heads
    return {"forward": forward, "backward": BACKWARD_PRODUCTS * forward, "step": (1 + BACKWARD_PRODUCTS) * forward}


def _rate(work: float, seconds: float) -> float | None:
    """TFLOP/s; None where a difference of two medians is no time."""
    return float(f"{work / seconds / 1e12:.4g}") if seconds > 0 else None


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Of the least-squares line through the points."""
    x = [n - sum(lengths) / len(lengths) for n in lengths]
    return sum(a * b for a, b in zip(x, values)) / sum(a * a for a in x)


def measure_length(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Times, rates and memory at one length."""
    layer = Layer(options, tokens)
    device = layer.grad.device
    sides = layer.sides()
    memory = {name: side.extra_bytes() for name, side in sides.items()} if device.type == "cuda" else None
    runs: dict[str, Callable[[], object]] = {f"{name}/forward": side.alone for name, side in sides.items()}
    runs |= {f"{name}/step": side.step for name, side in sides.items()} | layer.parts()
    timings: dict[str, Timing] = measure(runs, device, rounds=options.repeats)
    work = flops(tokens, layer.q_heads, options.head_dim)

    def seconds(name: str) -> dict[str, float]:
        forward, step = timings[f"{name}/forward"].median, timings[f"{name}/step"].median
        return {"forward": forward, "backward": step - forward, "step": step}

    peer = seconds(PEER)
    found = {}
    for name in sides:
        taken = seconds(name)
        found[name] = {
            "forward": timings[f"{name}/forward"].to_json(),
            "step": timings[f"{name}/step"].to_json(),
            "backward_ms": round(1e3 * taken["backward"], 5),
            "times_peer": {part: round(taken[part] / peer[part], 3) if peer[part] > 0 else None for part in taken},
            "tflops": {part: _rate(work[part], taken[part]) for part in taken},
            "memory": memory[name] if memory else None,
        }
    return {
        "tokens": tokens,
        "sides": found,
        "parts": {name: timings[name].to_json() for name in layer.parts()},
        "largest_error": layer.largest_error(),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    heads(options.heads)
    if options.budget % options.page_size:
        raise SystemExit(
            f"error: --budget: expected a multiple of the page size {options.page_size}, got {options.budget}"
        )
    options.tokens = sorted(set(options.tokens))
    if options.tokens[0] < 1:
        raise SystemExit(f"error: --tokens: expected at least 1, got {options.tokens[0]}")
    device = torch.device(options.device)
    lengths = []
    for tokens in tqdm(options.tokens, desc="soft_mask", unit="length"):
        lengths.append(measure_length(options, tokens))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    fields = ("tokens", "heads", "head_dim", "page_size", "budget", "rule", "tau", "dtype")
    return {
        "bench": "soft_mask",
        "options": {name: getattr(options, name) for name in fields},
        "environment": environment(device),
        "peer": PEER,
        "lengths": lengths,
        "bytes_per_token": _bytes_per_token(lengths),
    }


def _bytes_per_token(lengths: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]] | None:
    """Least-squares slopes of the extra memory; None without it, or at a single length."""
    if len(lengths) < 2 or lengths[0]["sides"]["soft"]["memory"] is None:
        return None
    names = [name for name in lengths[0]["sides"] if all(name in each["sides"] for each in lengths)]
    tokens = [each["tokens"] for each in lengths]
    return {
        name: {
            part: round(slope(tokens, [each["sides"][name]["memory"][f"{part}_bytes"] for each in lengths]), 2)
            for part in ("forward", "backward")
        }
        for name in names
    }


def report(result: dict[str, Any]) -> str:
    o = result["options"]
    lines = [
        f"{o['heads']} heads, D={o['head_dim']}, {o['dtype']}; rule {o['rule']}, budget {o['budget']} in pages of "
        f"{o['page_size']}; {result['environment']['device']}"
    ]
    for each in result["lengths"]:
        tokens = f"{each['tokens']} tokens"
        rows = []
        for name, side in each["sides"].items():
            memory = side["memory"]
            rows.append(
                {
                    tokens: name,
                    "forward": f"{side['forward']['median_ms']:.3f} ms",
                    "backward": f"{side['backward_ms']:.3f} ms",
                    "total": f"{side['step']['median_ms']:.3f} ms",
                    f"x {result['peer']}": f"{side['times_peer']['step']:.2f}",
                    "TFLOP/s": f"{side['tflops']['step']:.2f}",
                    "extra MiB": "" if memory is None else f"{max(memory.values()) / 2**20:.0f}",
                }
            )
        lines += ["", *text_table(rows, left=[tokens])]
        parts = ", ".join(f"{name} {part['median_ms']:.3f} ms" for name, part in each["parts"].items())
        lines.append(f"{parts}; largest error of our dense mode: {each['largest_error']:.1e}")
    if result["bytes_per_token"]:
        soft = result["bytes_per_token"]["soft"]
        lines.append(f"\nsoft mode, extra bytes per token: {soft['forward']} forward, {soft['backward']} backward")
    return "\n".join(lines)
