"""One training step of one attention layer: the page mask against causal scaled_dot_product_attention."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from unique_attn import ops, train
from unique_attn.bench._harness import DTYPES, Timing, environment, measure

TRAINING_RULES = [rule for rule in ops.RULES if rule != "minmax"]
BACKENDS = {"flash_attention": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PEER = "flash_attention"  # what times are compared with
Runs = tuple[Callable[[], object], Callable[[], object]]  # forward, and forward with backward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the one sequence")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=8, help="tokens per page")
    parser.add_argument("--budget", type=int, default=512, help="tokens that a KV head selects")
    parser.add_argument("--rule", default="directional", choices=TRAINING_RULES)
    parser.add_argument("--tau", type=float, default=1.0, help="temperature of the gates")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))


class Layer:
    """Random inputs of one attention layer, packed for us and ``[1, heads, N, D]`` for SDPA."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.o = options
        try:
            self.q_heads, self.kv_heads = (int(n) for n in options.heads.split("/"))
        except ValueError:
            raise SystemExit(f"error: --heads: expected QUERY/KV such as 32/8, got {options.heads!r}") from None
        device, dtype = torch.device(options.device), DTYPES[options.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def random(heads: int) -> torch.Tensor:
            shape = (options.tokens, heads, options.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        heads = (self.q_heads, self.kv_heads, self.kv_heads)
        self.inputs = [random(n).requires_grad_() for n in heads]
        self.grad = random(self.q_heads)
        self.cu_seqlens = torch.tensor([0, options.tokens], dtype=torch.int32, device=device)
        self.tau = torch.tensor(options.tau, device=device)
        self.rows = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in self.inputs]
        self.grad_rows = self.grad.transpose(0, 1)[None].contiguous()

    def masked(self, mode: train.Mode) -> torch.Tensor:
        o, (q, k, v) = self.o, self.inputs
        return train.masked_attention(
            q, k, v, self.cu_seqlens, o.tokens, o.budget // o.page_size,
            mode=mode, tau=self.tau, rule=o.rule, page_size=o.page_size,
        )  # fmt: skip

    def sdpa(self, backend: SDPBackend) -> torch.Tensor:
        q, k, v = self.rows
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def candidates(self) -> dict[str, Runs]:
        """Both runs of every side. Index and boundary are part of ours."""

        def runs(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor) -> Runs:
            def without_graph() -> None:
                with torch.no_grad():
                    forward()

            return without_graph, lambda: torch.autograd.grad(forward(), inputs, grad)

        modes: tuple[train.Mode, ...] = ("soft", "hard", "dense")
        sides = {str(mode): runs(partial(self.masked, mode), self.inputs, self.grad) for mode in modes}
        for name in BACKENDS if self.grad.is_cuda else (PEER,):
            sides[f"sdpa_{name}"] = runs(partial(self.sdpa, BACKENDS[name]), self.rows, self.grad_rows)
        return sides

    def largest_error(self) -> float:
        """Of our dense mode against SDPA, so that both sides are known to compute attention."""
        with torch.no_grad():
            difference = self.masked("dense").transpose(0, 1)[None] - self.sdpa(BACKENDS[PEER])
        return float(difference.abs().max())


def run(options: argparse.Namespace) -> dict[str, Any]:
    layer = Layer(options)
    device = layer.grad.device
    sides = layer.candidates()
    steps = {f"{name}/{part}": call for name, runs in sides.items() for part, call in zip(("forward", "step"), runs)}
    timings: dict[str, Timing] = measure(steps, device, rounds=options.repeats)
    peer = f"sdpa_{PEER}"
    fields = ("tokens", "heads", "head_dim", "page_size", "budget", "rule", "tau", "dtype")
    return {
        "bench": "soft_mask",
        "options": {name: getattr(options, name) for name in fields},
        "environment": environment(device),
        "times": {name: timing.to_json() for name, timing in timings.items()},
        "peer": peer,
        "step_times_peer": {
            name: round(timings[f"{name}/step"].median / timings[f"{peer}/step"].median, 3) for name in sides
        },
        "largest_error": layer.largest_error(),
    }


def report(result: dict[str, Any]) -> str:
    o, times = result["options"], result["times"]
    lines = [
        f"{o['tokens']} tokens, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}; rule {o['rule']}, budget "
        f"{o['budget']} in pages of {o['page_size']}; {result['environment']['device']}",
        "",
        f"{'':24}{'forward':>12}{'with backward':>16}{'x ' + result['peer']:>24}",
    ]
    for name, ratio in result["step_times_peer"].items():
        forward, step = times[f"{name}/forward"]["median_ms"], times[f"{name}/step"]["median_ms"]
        lines.append(f"{name:24}{forward:9.3f} ms{step:13.3f} ms{ratio:24.2f}")
    lines.append(f"\nlargest error of our dense mode against {result['peer']}: {result['largest_error']:.1e}")
    return "\n".join(lines)
