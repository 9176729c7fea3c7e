"""The ops, in the order the data flows.

Decoding: append -> index -> scores -> top-k -> attention. Training: index -> boundary -> soft mask attention.
Prefill: composite blocks -> select blocks -> block sparse attention.
"""

from unique_attn.index_format import decode_index, index_entry_bytes, new_index
from unique_attn.ops._autograd import NotDifferentiableError
from unique_attn.ops.append_kv import append_kv
from unique_attn.ops.block_sparse_attention import (
    block_sparse_attention,
    pack_block_mask,
    query_block_slots,
    unpack_block_mask,
)
from unique_attn.ops.composite_blocks import composite_blocks
from unique_attn.ops.page_boundary import page_boundary
from unique_attn.ops.page_index import page_index
from unique_attn.ops.page_scores import page_scores, score_dtype
from unique_attn.ops.select_blocks import select_blocks
from unique_attn.ops.soft_mask_attention import soft_mask_attention
from unique_attn.ops.sparse_decode import sparse_decode
from unique_attn.ops.topk_pages import topk_pages
from unique_attn.ops.unique_decode import unique_decode
from unique_attn.ops.unique_prefill import unique_prefill
from unique_attn.prefill_methods import PREFILL_METHODS
from unique_attn.rules import INDEX_FORMATS, RULES

__all__ = [
    "INDEX_FORMATS",
    "PREFILL_METHODS",
    "RULES",
    "NotDifferentiableError",
    "append_kv",
    "block_sparse_attention",
    "composite_blocks",
    "decode_index",
    "index_entry_bytes",
    "new_index",
    "pack_block_mask",
    "page_boundary",
    "page_index",
    "page_scores",
    "query_block_slots",
    "score_dtype",
    "select_blocks",
    "soft_mask_attention",
    "sparse_decode",
    "topk_pages",
    "unique_decode",
    "unique_prefill",
    "unpack_block_mask",
]
