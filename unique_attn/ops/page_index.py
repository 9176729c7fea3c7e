"""Compute the index entries of the pages that an append touched."""

from __future__ import annotations

import torch

from unique_attn.ops._autograd import reject_grad
from unique_attn.ops._shared import same_device
from unique_attn.rules import format_id, rule_info

_OP = torch.ops.unique_attn.page_index.default


def page_index(
    k_cache: torch.Tensor,
    index: torch.Tensor,
    block_table: torch.Tensor,
    start_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_new_tokens: int,
    rule: str,
    page_size: int,
    index_format: str = "exact",
) -> None:
    """Recompute, in place, the entry of every page that holds a token at ``start_lens[b] <= i < seq_lens[b]``.

    phi(page) of the rule over the page's tokens (UNIQUE section 3): a partly filled page uses the tokens it has.
    Statistics are two-pass and accumulated in fp32 (fp64 for fp64), then rounded to the keys' dtype or compressed.
    Entries are always computed from the keys, never updated from older entries, so truncating, copying and sharing
    blocks need no care.

    Args:
        k_cache: ``[num_blocks, H, block_size, D]``, any strides with unit channel stride, D a multiple of 8 to 256.
        index: uint8 ``[num_blocks, H, block_size // page_size, entry_bytes]`` from :func:`new_index`. Written.
        block_table: int32 ``[B, max_blocks]``, physical block of each logical block; entries past a sequence's
            last token are never read.
        start_lens: int32 ``[B]``, tokens before the append.
        seq_lens: int32 ``[B]``, tokens after the append.
        max_new_tokens: host-known upper bound of ``seq_lens - start_lens`` (it sizes the launch, so that nothing is
            read back from the device).
        rule: ``mean``, ``unique``, ``directional`` or ``minmax``.
        page_size: tokens per page: 4, 8, 16, 32 or 64.
        index_format: ``exact`` or ``compressed``, what the index was made with.

    Raises:
        ValueError: a wrong rank, shape, dtype, device or stride, naming the argument; on the CPU (on CUDA with
            UNIQUE_ATTN_CHECK=1) also a length, a start or a block that is out of range.
        NotDifferentiableError: ``k_cache`` requires grad while grad mode is on.
    """
    info = rule_info(rule)
    reject_grad("page_index", k_cache=k_cache)
    storage = format_id(index_format, rule)
    _OP(k_cache, index, block_table, start_lens, seq_lens, max_new_tokens, page_size, info.id, storage)


@torch.library.register_fake("unique_attn::page_index")
def _(k_cache, index, block_table, start_lens, seq_lens, max_new_tokens, page_size, rule, index_format):  # type: ignore[no-untyped-def]
    same_device(
        "page_index", k_cache=k_cache, index=index, block_table=block_table, start_lens=start_lens, seq_lens=seq_lens
    )
    return None
