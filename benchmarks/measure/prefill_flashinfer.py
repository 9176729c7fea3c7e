"""FlashInfer's ``VariableBlockSparseAttentionWrapper`` over blocks of a prompt, if it can be imported.

It takes a list for every query block and **KV head**, so what it is compared with is our attention over the same lists:
rows of a mask that the query heads of a group share. It reads the listed keys one by one, in the order of the sequence,
and its causal mask counts from the end of a list: of n queries the last sees all listed keys, the one before all but
one, and so on. Where a list holds the diagonal and nothing after it, as those of :func:`block_lists.random_lists` do,
that is the causal mask of the sequence, and so the same work and the same output as ours.

Planning, which writes out the position of every listed key, is measured by itself and is no part of a call; copying the
queries to its own layout and the output back is, for the wrapper does it in every call.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peers
from benchmarks.measure.block_lists import Blocks
from benchmarks.measure.prompts import Prompt

DTYPES = (torch.bfloat16, torch.float16)  # what it has tensor-core kernels for
# Of a listed key of a query block and KV head: positions as int32 for each backend, and int64 parts while it plans.
PLAN_BYTES = 48
COPIES = 3  # of queries or outputs that a call makes


def unusable(device: torch.device, dtype: torch.dtype) -> str:
    """Why it is not measured; empty if it is."""
    if peers.flashinfer(device) is None:
        return peers.versions(device)["flashinfer"].removeprefix("absent: ")
    return "" if dtype in DTYPES else f"no kernels for {dtype}"


def described(device: torch.device, dtype: torch.dtype) -> str:
    """For the JSON: its version and how it is called, or why it is not measured."""
    why = unusable(device, dtype)
    if why:
        return f"not measured: {why}"
    return (
        f"{peers.versions(device)['flashinfer']}: VariableBlockSparseAttentionWrapper, backends "
        f"{' and '.join(backends(device))}, causal from the end of a list, which is the causal mask of these lists; a "
        "list per KV head, as ours (shared_lists) has beside it; planning is not timed, its copies of queries and "
        "output are"
    )


def backends(device: torch.device) -> tuple[str, ...]:
    """FlashAttention-3, which it would choose by itself and has on Hopper alone, and FlashAttention-2."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return ("fa3", "fa2") if hopper else ("fa2",)


def needed(blocks: Blocks, heads: tuple[int, int], head_dim: int, density: float, device: torch.device) -> int:
    """Bytes of its plans and copies, for query and KV ``heads`` and at most that ``density``, from 0 to 1."""
    keys = int(blocks.visible().sum()) * blocks.block_k * heads[1] * density
    copies = COPIES * blocks.tokens * heads[0] * head_dim * 2
    return int(PLAN_BYTES * keys) + len(backends(device)) * (copies + peers.WORKSPACE)


class BlockSparse:
    """The wrapper, planned for lists.

    Args:
        prompt: the inputs.
        kept: bool ``[slots, H, key_blocks]``; every row holds its diagonal and nothing after it.
        backend: one of :func:`backends`.

    Attributes:
        plan_ms: what planning takes once its kernels are loaded.

    Raises:
        ValueError: a list lacks a block of its diagonal, or has one after it, where its causal mask is another.
    """

    def __init__(self, prompt: Prompt, kept: Tensor, backend: str) -> None:
        blocks, device = prompt.blocks, prompt.device
        flags, seen = kept[: blocks.queries], blocks.seen(device)
        diagonal = seen & (torch.arange(blocks.keys, device=device) >= blocks.diagonal(device)[:, None])
        if bool((diagonal[:, None] & ~flags | flags & ~seen[:, None]).any()):
            raise ValueError("kept: expected rows that hold their diagonal and nothing after it")
        self.prompt = prompt
        workspace = torch.zeros(peers.WORKSPACE, dtype=torch.uint8, device=device)
        self.wrapper = peers.flashinfer(device).VariableBlockSparseAttentionWrapper(workspace, backend=backend)
        lists = flags.transpose(0, 1).contiguous()
        rows, columns = (
            sizes(blocks.tokens, size).to(device).expand(prompt.kv_heads, -1).contiguous()
            for size in (blocks.block_q, blocks.block_k)
        )
        heads = prompt.q_heads, prompt.kv_heads, prompt.head_dim
        dtypes: dict[str, Any] = {"q_data_type": prompt.dtype, "kv_data_type": prompt.dtype}
        for _ in range(2):  # the first loads its kernels, too
            start = time.perf_counter()
            self.wrapper.plan(lists, rows, columns, *heads, causal=True, **dtypes)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.plan_ms = round(1e3 * (time.perf_counter() - start), 3)

    def __call__(self, number: int) -> Tensor:
        """``[Hq, N, D]`` of an input set."""
        q, k, v = self.prompt.rows[number]
        out: Tensor = self.wrapper.run(q[0], k[0], v[0])
        return out


def sizes(tokens: int, block: int) -> Tensor:
    """int32: the tokens of each block; the last may have fewer."""
    starts = torch.arange(0, tokens, block)
    return (tokens - starts).clamp(max=block).int()
