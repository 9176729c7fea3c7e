"""Cases for the tests of prefill over paged caches: the keys and values of a `PrefillCase` in the blocks of a cache.

Every number that no op may look at is poison: NaN in tokens past a sequence's end and in unused blocks, numbers out of
range in the rest of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from op_cases import JUNK, copy_strided, empty_cache
from prefill_cases import PrefillCase
from torch import Tensor

from unique_attn import ops


def gather_paged(cache: Tensor, block_table: Tensor, lens: Sequence[int]) -> Tensor:
    """The first ``lens[b]`` tokens of each sequence, packed ``[sum(lens), H, D]``."""
    size = cache.shape[2]
    places = [torch.arange(n, device=cache.device) for n in lens]
    rows = [cache[block_table[b, at // size].long(), :, at % size] for b, at in enumerate(places)]
    return torch.cat([cache.new_empty(0, cache.shape[1], cache.shape[3]), *rows])


@dataclass
class PagedCase:
    """``packed`` has the keys and values that the caches hold."""

    packed: PrefillCase
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor

    @property
    def lens(self) -> list[int]:
        return [m for _, m in self.packed.spec.chunks]

    def gathered(self) -> PagedCase:
        """With ``packed`` as the caches are now."""
        k, v = (gather_paged(x, self.block_table, self.lens) for x in (self.k_cache, self.v_cache))
        return replace(self, packed=replace(self.packed, k=k, v=v))


def page_out(case: PrefillCase, block_size: int, layout: str = "heads_first", shared: bool = False) -> PagedCase:
    """Caches with the keys and values of ``case`` in shuffled blocks; ``shared``: all sequences have the first one's
    whole blocks, as far as both reach."""
    lens = [m for _, m in case.spec.chunks]
    random = torch.Generator().manual_seed(case.spec.seed)
    used = [-(-length // block_size) for length in lens]
    num_blocks = sum(used) + 2
    free = torch.randperm(num_blocks, generator=random).tolist()
    width = max([1, *used]) + case.spec.seed % 3
    table = torch.tensor(JUNK, dtype=torch.int32).repeat(len(lens), width)[:, :width].clone()
    for b, count in enumerate(used):
        row = [free.pop() for _ in range(count)]
        if shared and b > 0:
            common = min(lens[0] // block_size, lens[b] // block_size)
            row[:common] = table[0, :common].tolist()
        table[b, :count] = torch.tensor(row, dtype=torch.int32)
    caches = []
    for packed in (case.k, case.v):
        cache = empty_cache((num_blocks, packed.shape[1], block_size, packed.shape[2]), layout, packed.dtype)
        for b, (_, keys) in enumerate(case.sequences):
            at = torch.arange(lens[b])
            cache[table[b, at // block_size].long(), :, at % block_size] = packed[keys].cpu()
        caches.append(copy_strided(cache, case.k.device.type))
    return PagedCase(case, *caches, table.to(case.k.device)).gathered()


# ---- The three ops, on packed or on paged keys. ----


def arguments(case: PrefillCase | PagedCase) -> dict[str, Any]:
    """What all of them take."""
    packed = case.packed if isinstance(case, PagedCase) else case
    lens = [m for _, m in packed.spec.chunks]
    args = {
        "q": packed.q, "k": packed.k, "v": packed.v,
        "cu_seqlens_q": packed.cu_seqlens_q, "cu_seqlens_k": packed.cu_seqlens_k,
        "max_seqlen_q": packed.max_seqlen_q, "max_seqlen_k": max([0, *lens]),
        **packed.spec.blocks, "scale": packed.spec.scale,
    }  # fmt: skip
    if isinstance(case, PagedCase):
        args |= {"k": case.k_cache, "v": case.v_cache, "block_table": case.block_table}
    return args


def arguments_of(op: str, case: PrefillCase | PagedCase) -> dict[str, Any]:
    args = arguments(case)
    if op == "block_sparse_attention":
        del args["max_seqlen_k"]
        return {**args, "mask": (case.packed if isinstance(case, PagedCase) else case).mask}
    if op == "composite_blocks":
        del args["v"]
    return args


def call(op: str, case: PrefillCase | PagedCase, **options: Any) -> list[Tensor]:
    results = getattr(ops, op)(**arguments_of(op, case), **options)
    return [results] if isinstance(results, Tensor) else list(results)
