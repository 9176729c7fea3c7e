"""One long prompt of one attention layer, whose attention is as uneven as a model's, and the oracle on parts of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import checks
from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.harness import sets_needed
from unique_attn import reference_prefill

STRUCTURE = (
    "queries and keys are random vectors drawn every 512 tokens and joined by straight lines, plus white noise of half "
    "their size; queries are scaled so that logits have a standard deviation of about 2 in the first head and 5 in the "
    "last; values are white noise. So few blocks get most of the attention, in some heads more so than in others"
)
SPAN = 512  # tokens between two anchors
NOISE = 0.5
SHARPNESS = (2.0, 5.0)  # of the first and the last query head


def smooth(tokens: int, heads: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """fp32 ``[tokens, heads, head_dim]`` along the sequence, with variance 1 at the anchors, and noise."""
    device = generator.device
    anchors = torch.randn(heads, head_dim, tokens // SPAN + 2, generator=generator, device=device)
    line = F.interpolate(anchors, scale_factor=SPAN, mode="linear", align_corners=False)[..., :tokens]
    out = line.permute(2, 0, 1).contiguous()
    return out.add_(torch.randn(out.shape, generator=generator, device=device), alpha=NOISE)


class Prompt:
    """Input sets of one prompt, packed for us, and heads first for others.

    Attributes:
        blocks: how it is cut.
        sets: ``(q [N, Hq, D], k [N, H, D], v [N, H, D])`` of each.
        rows: the same as ``[1, heads, N, D]``, contiguous.
        cu_seqlens: int32 ``[2]``.
    """

    def __init__(self, blocks: Blocks, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device):
        self.blocks = blocks
        self.q_heads, self.kv_heads = heads
        self.head_dim, self.dtype, self.device = head_dim, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.bytes = blocks.tokens * (heads[0] + 2 * heads[1]) * head_dim * dtype.itemsize
        self.sets = [self._draw() for _ in range(sets_needed(self.bytes, device))]
        self.rows = [[x.transpose(0, 1)[None].contiguous() for x in qkv] for qkv in self.sets]
        self.cu_seqlens = torch.tensor([0, blocks.tokens], dtype=torch.int32, device=device)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        tokens, dim = self.blocks.tokens, self.head_dim
        q = smooth(tokens, self.q_heads, dim, self.generator)
        q *= torch.linspace(*SHARPNESS, self.q_heads, device=self.device)[:, None]
        k = smooth(tokens, self.kv_heads, dim, self.generator)
        v = torch.randn(tokens, self.kv_heads, dim, generator=self.generator, device=self.device)
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)


class Expected:
    """What the oracle says of some query blocks and heads of one input set under a mask.

    Args:
        prompt: the inputs.
        number: of the input set.
        mask: packed ``[slots, Hm, words]``; None for dense attention.
    """

    def __init__(self, prompt: Prompt, number: int, mask: Tensor | None) -> None:
        self.prompt = prompt
        blocks = prompt.blocks
        rows = sorted({(blocks.queries - 1) // 2, blocks.queries - 1})  # query blocks in the middle and at the end
        heads = sorted({0, prompt.kv_heads - 1})
        self.parts = [
            (*self._part(row, head), *self._oracle(row, head, number, mask)) for row in rows for head in heads
        ]
        self.dtype = prompt.dtype

    def _part(self, row: int, head: int) -> tuple[slice, slice]:
        """Queries and query heads."""
        block, group = self.prompt.blocks.block_q, self.prompt.q_heads // self.prompt.kv_heads
        return slice(row * block, min((row + 1) * block, self.prompt.blocks.tokens)), slice(
            head * group, (head + 1) * group
        )

    def _oracle(self, row: int, head: int, number: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slice as a sequence of its own: its queries are the last of the tokens up to it."""
        queries, q_heads = self._part(row, head)
        q, k, v = self.prompt.sets[number]
        if mask is None:
            words = -(-self.prompt.blocks.keys // 32)
            lists = torch.full((1, 1, words), -1, dtype=torch.int32)
        else:
            heads = {self.prompt.q_heads: q_heads, self.prompt.kv_heads: slice(head, head + 1)}
            lists = mask[row : row + 1, heads.get(mask.shape[1], slice(None))]
        options: dict[str, Any] = {"block_q": self.prompt.blocks.block_q, "block_k": self.prompt.blocks.block_k}
        return reference_prefill.block_sparse_attention(
            q[queries, q_heads],
            k[: queries.stop, head : head + 1],
            v[: queries.stop, head : head + 1],
            torch.tensor([0, queries.stop - queries.start]),
            torch.tensor([0, queries.stop]),
            lists,
            compute_dtype=checks.compute_dtype(self.prompt.dtype),
            **options,
        )

    def check(self, out: Tensor, lse: Tensor | None = None) -> None:
        """``out`` ``[N, Hq, D]`` and ``lse`` ``[N, Hq]`` are right.

        Raises:
            AssertionError: they are not, or values were not written.
        """
        assert not out.isnan().any(), "out: NaN, or values were not written"
        assert lse is None or not lse.isnan().any(), "lse: NaN, or values were not written"
        tolerance = checks.TOLERANCE[self.dtype]
        for queries, heads, wanted, wanted_lse in self.parts:
            checks.close("out", out[queries, heads].cpu(), wanted, tolerance)
            if lse is not None:
                checks.close("lse", lse[queries, heads].cpu(), wanted_lse, tolerance)
