"""What others offer for the same work, found at run time: FlashInfer if it can be imported, and PyTorch.

With ``UNIQUE_ATTN_FLASHINFER_PREBUILT=1`` FlashInfer loads the modules in its cache as they are and compiles none; a
module that is not there is reported as failed.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PREBUILT = "UNIQUE_ATTN_FLASHINFER_PREBUILT"
WORKSPACE = 256 << 20  # FlashInfer's scratch memory
NHD_BLOCK = 16  # tokens of a block in the layout that FlashInfer's examples use
TOPK_PEERS = {"flashinfer": "FlashInfer", "torch": "torch.topk"}
DENSE_PEERS = {"flashinfer": "FlashInfer, dense", "sdpa": "SDPA"}

TopK = Callable[[int], torch.Tensor]
Dense = Callable[[int], torch.Tensor]


# ---- Finding them. ----


@functools.cache
def _import_flashinfer() -> tuple[Any, str | None]:
    try:
        module = importlib.import_module("flashinfer")
        if os.environ.get(PREBUILT) == "1":
            core = importlib.import_module("flashinfer.jit.core")
            core.JitSpecNvcc.build = lambda self, *args, **kwargs: None
    except Exception as error:  # an installation that does not import is an absent one
        return None, f"{type(error).__name__}: {str(error)[:200]}"
    return module, None


def flashinfer(device: torch.device) -> Any:
    """The module, or None if it cannot be used on ``device``."""
    return _import_flashinfer()[0] if device.type == "cuda" else None


def versions(device: torch.device) -> dict[str, str]:
    """For the JSON: each peer's version, or why it is absent."""
    module, reason = _import_flashinfer()
    if device.type != "cuda":
        found = "absent: needs CUDA"
    elif module is None:
        found = f"absent: {reason}"
    else:
        found = str(getattr(module, "__version__", "unknown"))
    return {"flashinfer": found, "torch": torch.__version__}


def notes(peers: Mapping[str, str]) -> list[str]:
    """Lines that say which peers a table lacks."""
    return [f"{name} {version}" for name, version in peers.items() if version.startswith("absent")]


# ---- Top-k. ----


def topk_ways(scores: Sequence[torch.Tensor], k: int) -> dict[str, TopK]:
    """Every way to select ``k`` of each row of each of ``scores`` ``[rows, pages]``, returning positions."""
    ways: dict[str, TopK] = {
        "torch_sorted": lambda i: torch.topk(scores[i], k, dim=-1).indices,
        "torch_unsorted": lambda i: torch.topk(scores[i], k, dim=-1, sorted=False).indices,
    }
    module = flashinfer(scores[0].device)
    if module is None:
        return ways
    rows, pages = scores[0].shape
    device = scores[0].device
    table = torch.arange(pages, dtype=torch.int32, device=device).repeat(rows, 1)
    lengths = torch.full((rows,), pages, dtype=torch.int32, device=device)

    def transformed(i: int, **flags: Any) -> torch.Tensor:
        return module.top_k_page_table_transform(scores[i], table, lengths, k, **flags)

    def selected(i: int, **flags: Any) -> torch.Tensor:
        return module.top_k(scores[i], k, **flags)[1]

    ways["flashinfer_top_k"] = selected
    ways["flashinfer_top_k_lowest_ties"] = partial(selected, deterministic=True, tie_break=1)
    ways["flashinfer_top_k_graph_safe"] = partial(selected, dsa_graph_safe=True)
    ways["flashinfer_page_table"] = transformed
    ways["flashinfer_page_table_lowest_ties"] = partial(transformed, deterministic=True, tie_break=1)
    ways["flashinfer_page_table_graph_safe"] = partial(transformed, dsa_graph_safe=True)
    return ways


# ---- Dense decode attention. ----


class PagedDense:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper over caches in blocks, one plan for all input sets.

    Args:
        queries: ``[B, Hq, D]`` of each input set.
        caches: keys and values of each input set, ``[blocks, H, block_size, D]`` (layout HND) or
            ``[blocks, block_size, H, D]`` (NHD).
        table: int32 ``[B, blocks of a sequence]``, the same for all sets; sequences fill their blocks.
    """

    def __init__(
        self,
        queries: Sequence[torch.Tensor],
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        table: torch.Tensor,
        layout: str,
        workspace: torch.Tensor,
    ) -> None:
        self.queries, self.caches, self.layout, self.workspace = queries, caches, layout, workspace
        self.outputs = [torch.full_like(q, torch.nan) for q in queries]
        batch, blocks = table.shape
        device = table.device
        self.indices = table.flatten().contiguous()
        self.indptr = torch.arange(0, batch * blocks + 1, blocks, dtype=torch.int32, device=device)
        k_cache = caches[0][0]
        self.block_size, self.kv_heads = (k_cache.shape[2], k_cache.shape[1])
        if layout == "NHD":
            self.block_size, self.kv_heads = self.kv_heads, self.block_size
        self.last = torch.full((batch,), self.block_size, dtype=torch.int32, device=device)

    def way(self, backend: str, tensor_cores: bool) -> Dense:
        """A planned call. Planning happens at the first call, which is never captured."""
        wrapper: Any = None

        def run(i: int) -> torch.Tensor:
            nonlocal wrapper
            if wrapper is None:
                wrapper = self._plan(backend, tensor_cores)
            return wrapper.run(self.queries[i], self.caches[i], out=self.outputs[i])

        return run

    def _plan(self, backend: str, tensor_cores: bool) -> Any:
        q = self.queries[0]
        module = flashinfer(q.device)
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, self.layout, use_tensor_cores=tensor_cores, backend=backend
        )
        wrapper.plan(
            self.indptr, self.indices, self.last, q.shape[1], self.kv_heads, q.shape[2], self.block_size,
            pos_encoding_mode="NONE", q_data_type=q.dtype, kv_data_type=q.dtype,
        )  # fmt: skip
        return wrapper


def flashinfer_dense(
    queries: Sequence[torch.Tensor],
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    table: torch.Tensor,
    *,
    second_layout: bool,
) -> dict[str, Dense]:
    """Every way of FlashInfer to attend to whole caches ``[blocks, H, block_size, D]``; none where it is absent.

    ``second_layout``: also with copies of the caches in its examples' layout, NHD in blocks of 16 tokens.
    """
    if flashinfer(table.device) is None:
        return {}
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=table.device)
    paged = {"hnd": PagedDense(queries, caches, table, "HND", workspace)}
    if second_layout:
        block_size = caches[0][0].shape[2]
        if block_size % NHD_BLOCK == 0:
            copies = [(nhd(k), nhd(v)) for k, v in caches]
            paged["nhd16"] = PagedDense(queries, copies, nhd_table(table, block_size), "NHD", workspace)
    ways: dict[str, Dense] = {}
    for name, caches_of in paged.items():
        ways[f"flashinfer_{name}_tensor_cores"] = caches_of.way("fa2", True)
        ways[f"flashinfer_{name}_cuda_cores"] = caches_of.way("fa2", False)
        if os.environ.get(PREBUILT) != "1":  # on Hopper this may pick FlashAttention-3
            ways[f"flashinfer_{name}_auto"] = caches_of.way("auto", True)
    return ways


def planned_for_graph(
    table: torch.Tensor,
    last_page_len: torch.Tensor,
    layout: str,
    block_size: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    tensor_cores: bool,
) -> Any:
    """FlashInfer's wrapper for CUDA graphs, planned for full blocks; a graph may count ``last_page_len`` up to them.

    Args:
        table: int32 ``[B, blocks of a sequence]``.
        last_page_len: int32 ``[B]``, read at every run: tokens in the last block.
        layout: ``HND`` or ``NHD``.
        block_size: tokens of a block.
        heads: query heads, KV heads, head dim.
        dtype: of queries, keys and values.
        tensor_cores: whether to use them.
    """
    batch, blocks = table.shape
    device = table.device
    indptr = torch.arange(0, batch * blocks + 1, blocks, dtype=torch.int32, device=device)
    indices = table.flatten().contiguous()
    wrapper = flashinfer(device).BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(WORKSPACE, dtype=torch.uint8, device=device),
        layout,
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last_page_len,
        backend="fa2",
    )
    now = last_page_len.clone()
    wrapper.plan(
        indptr, indices, torch.full_like(now, block_size), *heads, block_size, pos_encoding_mode="NONE",
        q_data_type=dtype, kv_data_type=dtype,
    )  # fmt: skip
    last_page_len.copy_(now)  # the plan has put its own there
    return wrapper


def nhd(cache: torch.Tensor) -> torch.Tensor:
    """``[blocks, H, block_size, D]`` as ``[blocks * block_size / 16, 16, H, D]``, contiguous."""
    return cache.transpose(1, 2).reshape(-1, NHD_BLOCK, cache.shape[1], cache.shape[3]).contiguous()


def nhd_table(table: torch.Tensor, block_size: int) -> torch.Tensor:
    """The block table of a cache that went through :func:`nhd`."""
    parts = block_size // NHD_BLOCK
    offsets = torch.arange(parts, dtype=torch.int32, device=table.device)
    return (table[..., None] * parts + offsets).flatten(1).contiguous()


def sdpa_dense(queries: Sequence[torch.Tensor], rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Dense]:
    """Every way to hand a decode step with grouped heads to SDPA.

    Args:
        queries: ``[B, Hq, D]`` of each input set.
        rows: keys and values of each, ``[B, H, context, D]``.
    """
    batch, q_heads, head_dim = queries[0].shape
    kv_heads = rows[0][0].shape[1]
    group = q_heads // kv_heads
    cuda = queries[0].is_cuda
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

    def attend(q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], **flags: Any) -> torch.Tensor:
        if not cuda:
            return F.scaled_dot_product_attention(q, *kv, **flags)
        with sdpa_kernel(fused):  # the plain one would write the logits out
            return F.scaled_dot_product_attention(q, *kv, **flags)

    def grouped(i: int) -> torch.Tensor:
        return attend(queries[i].view(batch, kv_heads, group, head_dim), rows[i])

    def gqa(i: int) -> torch.Tensor:
        return attend(queries[i][:, :, None], rows[i], enable_gqa=True)

    ways: dict[str, Dense] = {"group_as_rows": grouped, "enable_gqa": gqa}
    if not cuda:
        wide = [(k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for k, v in rows]
        ways["expanded_before"] = lambda i: attend(queries[i][:, :, None], wide[i])
    return ways
