"""One decode step of one attention layer: unique_decode against scaled_dot_product_attention."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from unique_attn import ops
from unique_attn.bench._harness import DTYPES, GB, Timing, bandwidth, environment, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--context", type=int, default=32768, help="tokens in the cache, the new one included")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=8, help="tokens per page")
    parser.add_argument("--block-size", type=int, default=64, help="tokens per physical block")
    parser.add_argument("--budget", type=int, default=512, help="tokens that a KV head reads")
    parser.add_argument("--rule", default="directional", choices=list(ops.RULES))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))


class Step:
    """Random inputs of one decode step, for both sides: a paged cache in shuffled blocks, and the same in a row."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.o = options
        self.device = torch.device(options.device)
        self.dtype = DTYPES[options.dtype]
        try:
            self.q_heads, self.kv_heads = (int(n) for n in options.heads.split("/"))
        except ValueError:
            raise SystemExit(f"error: --heads: expected QUERY/KV such as 32/8, got {options.heads!r}") from None
        o = options
        if o.context % o.block_size:
            raise SystemExit(f"error: --context: expected a multiple of the block size {o.block_size}, got {o.context}")
        if o.budget % o.page_size:
            raise SystemExit(f"error: --budget: expected a multiple of the page size {o.page_size}, got {o.budget}")
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype)

        blocks = o.context // o.block_size
        total = o.batch * blocks
        shape = (total, self.kv_heads, o.block_size, o.head_dim)
        self.k_cache, self.v_cache = random(*shape), random(*shape)
        order = torch.randperm(total, generator=generator, device=self.device)
        self.table = order.view(o.batch, blocks).to(torch.int32)
        self.lens = torch.full((o.batch,), o.context, dtype=torch.int32, device=self.device)
        self.q = random(o.batch, 1, self.q_heads, o.head_dim)
        self.k, self.v = (random(o.batch, 1, self.kv_heads, o.head_dim) for _ in range(2))
        self.index = ops.new_index(self.k_cache, rule=o.rule, page_size=o.page_size)
        starts = torch.zeros_like(self.lens)
        ops.page_index(
            self.k_cache, self.index, self.table, starts, self.lens,
            max_new_tokens=o.context, rule=o.rule, page_size=o.page_size,
        )  # fmt: skip
        self.unique()  # writes the new token, so that both sides hold the same keys
        self.k_row, self.v_row = (self._in_a_row(cache) for cache in (self.k_cache, self.v_cache))

    def _in_a_row(self, cache: torch.Tensor) -> torch.Tensor:
        """``[B, H, context, D]`` contiguous."""
        o = self.o
        rows = cache[self.table.long()].transpose(1, 2)  # [B, H, blocks, block_size, D]
        return rows.reshape(o.batch, self.kv_heads, o.context, o.head_dim).contiguous()

    # ---- What is timed. ----

    def unique(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        o = self.o
        return ops.unique_decode(
            self.q, self.k, self.v, self.k_cache, self.v_cache, self.index, self.table, self.lens,
            o.budget // o.page_size, rule=o.rule, page_size=o.page_size,
        )  # fmt: skip

    def dense(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Every way to hand a decode step with grouped heads to SDPA; the fastest counts."""
        group = self.q_heads // self.kv_heads
        q = self.q.transpose(1, 2).contiguous()  # [B, Hq, 1, D]
        grouped = q.view(self.o.batch, self.kv_heads, group, self.o.head_dim)  # heads of a group as query rows
        k_wide, v_wide = (row.repeat_interleave(group, 1) for row in (self.k_row, self.v_row))
        return {
            "group_as_rows": lambda: F.scaled_dot_product_attention(grouped, self.k_row, self.v_row),
            "enable_gqa": lambda: F.scaled_dot_product_attention(q, self.k_row, self.v_row, enable_gqa=True),
            "expanded_before": lambda: F.scaled_dot_product_attention(q, k_wide, v_wide),
        }

    def parts(self) -> dict[str, Callable[[], object]]:
        """The ops that unique_decode consists of, one by one."""
        o = self.o
        scores = ops.page_scores(self.q, self.index, self.table, self.lens, rule=o.rule, page_size=o.page_size)
        pages = ops.topk_pages(scores, self.lens, o.budget // o.page_size, page_size=o.page_size)
        starts = self.lens - 1
        return {
            "page_index": lambda: ops.page_index(
                self.k_cache, self.index, self.table, starts, self.lens,
                max_new_tokens=1, rule=o.rule, page_size=o.page_size,
            ),
            "page_scores": lambda: ops.page_scores(
                self.q, self.index, self.table, self.lens, rule=o.rule, page_size=o.page_size
            ),
            "topk_pages": lambda: ops.topk_pages(scores, self.lens, o.budget // o.page_size, page_size=o.page_size),
            "sparse_decode": lambda: ops.sparse_decode(
                self.q, self.k_cache, self.v_cache, pages, self.table, self.lens, page_size=o.page_size
            ),
        }  # fmt: skip

    # ---- What it must move, and whether it is right. ----

    def bytes_moved(self) -> dict[str, int]:
        o = self.o
        rows, pages = o.batch * self.kv_heads, o.context // o.page_size
        token = 2 * o.head_dim * self.dtype.itemsize  # key and value
        index = rows * pages * ops.index_entry_bytes(o.rule, o.head_dim, self.dtype)
        selected = rows * min(o.budget, o.context) * token
        return {"index": index, "selected_kv": selected, "unique": index + selected, "dense": rows * o.context * token}

    def check(self) -> float:
        """Largest error of unique_decode against fp32 attention over the pages that it chose."""
        o = self.o
        out, _, pages = self.unique()
        worst = 0.0
        group = self.q_heads // self.kv_heads
        for b in range(o.batch):
            for h in range(self.kv_heads):
                chosen = pages[b, 0, h][pages[b, 0, h] >= 0].long()
                tokens = (chosen[:, None] * o.page_size + torch.arange(o.page_size, device=self.device)).flatten()
                k, v = self.k_row[b, h, tokens].float(), self.v_row[b, h, tokens].float()
                q = self.q[b, 0, h * group : (h + 1) * group].float()
                expected = torch.softmax(q @ k.T * o.head_dim**-0.5, -1) @ v
                worst = max(worst, (out[b, 0, h * group : (h + 1) * group].float() - expected).abs().max().item())
        return worst


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    step = Step(options)
    ceiling = bandwidth(step.device)
    dense = step.dense()
    timings = measure({"unique": step.unique, **dense}, step.device, rounds=options.repeats)
    parts = measure(step.parts(), step.device, rounds=options.repeats)
    moved = step.bytes_moved()
    best = min(dense, key=lambda name: timings[name].median)

    def row(timing: Timing, size: int) -> dict[str, Any]:
        floor = size / (ceiling["gb_per_s"] * GB)
        return {
            **timing.to_json(),
            "bytes": size,
            "gb_per_s": round(size / timing.median / GB, 2),
            "floor_ms": round(1e3 * floor, 5),
            "times_floor": round(timing.median / floor, 2),
        }

    return {
        "bench": "decode",
        "options": {
            name: getattr(options, name)
            for name in ("batch", "context", "heads", "head_dim", "page_size", "block_size", "budget", "rule", "dtype")
        },
        "environment": environment(step.device),
        "ceiling": ceiling,
        "unique_decode": row(timings["unique"], moved["unique"]),
        "sdpa": {"way": best, **row(timings[best], moved["dense"])},
        "sdpa_ways": {name: timings[name].to_json() for name in dense},
        "parts": {name: timing.to_json() for name, timing in parts.items()},
        "bytes": moved,
        "bytes_ratio": round(moved["dense"] / moved["unique"], 2),
        "speedup": round(timings[best].median / timings["unique"].median, 2),
        "max_error_against_fp32": step.check(),
    }


def report(result: dict[str, Any]) -> str:
    o, e = result["options"], result["environment"]
    where = f"{e['cpu']}, {e['threads']} threads" if e["device"] == "cpu" else e["device"]
    lines = [
        f"one decode step, {o['batch']} x {o['context']} tokens, {o['heads']} heads, D={o['head_dim']}, {o['dtype']}",
        f"rule {o['rule']}, budget {o['budget']} in pages of {o['page_size']}; {where}; caches cold",
        "",
        f"{'':<28}{'median':>12}{'p10 .. p90':>22}{'moved':>11}{'GB/s':>9}{'x floor':>9}",
    ]
    for name, label in (("unique_decode", "unique_decode"), ("sdpa", f"SDPA ({result['sdpa']['way']})")):
        r = result[name]
        spread = f"{r['p10_ms']:.3f} .. {r['p90_ms']:.3f}"
        lines.append(
            f"{label:<28}{r['median_ms']:>9.3f} ms{spread:>22}{r['bytes'] / 2**20:>7.1f} MiB{r['gb_per_s']:>9.2f}"
            f"{r['times_floor']:>9.2f}"
        )
    for name, part in result["parts"].items():
        lines.append(f"  {name:<26}{part['median_ms']:>9.3f} ms")
    others = [f"{name} {t['median_ms']:.3f} ms" for name, t in result["sdpa_ways"].items()]
    lines += [
        "",
        f"SDPA, every way: {', '.join(others)}",
        f"bandwidth ceiling {result['ceiling']['gb_per_s']} GB/s ({result['ceiling']['way']}), largest error "
        f"{result['max_error_against_fp32']:.1e}",
        f"{result['speedup']:.1f}x faster, {result['bytes_ratio']:.1f}x fewer bytes",
    ]
    return "\n".join(lines)
