"""Names, defaults and sizes of the page-scoring rules and index formats, shared by every op wrapper."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unique_attn import reference_index
from unique_attn._load import load_library

load_library()


@dataclass(frozen=True)
class RuleInfo:
    """What a caller must know of a rule; what it computes is csrc/core/rules.h."""

    id: int  # the op library's enum (csrc/core/types.h)
    vectors: int  # vectors of D channels in an exact index entry
    scalar: bool  # whether that also holds one scalar
    spread: float  # default of lambda (`unique`) or c (`directional`); unused by the others


RULES: dict[str, RuleInfo] = {
    "mean": RuleInfo(id=0, vectors=1, scalar=False, spread=0.0),
    "unique": RuleInfo(id=1, vectors=1, scalar=True, spread=0.5),
    "directional": RuleInfo(id=2, vectors=2, scalar=False, spread=2.0),
    "minmax": RuleInfo(id=3, vectors=2, scalar=False, spread=0.0),
}
KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAGE_SIZES = (4, 8, 16, 32, 64)
INDEX_FORMATS = {name: number for number, name in enumerate(reference_index.INDEX_FORMATS)}  # csrc/core/types.h


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise if the tensors are not on one device. The dispatcher sends a mix of meta and real tensors to the fake
    kernels, which would return without computing anything."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    for name, device in given.items():
        if device != given[first]:
            raise ValueError(f"{op}: {name}: expected the device of {first}, {given[first]}, got {device}")


def softmax_scale(q: torch.Tensor) -> float:
    """``1 / sqrt(D)``; 1 for what the op will refuse."""
    return 1.0 if q.dim() == 0 or q.shape[-1] == 0 else float(q.shape[-1] ** -0.5)


def rule_info(rule: str) -> RuleInfo:
    """The :class:`RuleInfo` of ``rule``. Raises ValueError for an unknown name."""
    try:
        return RULES[rule]
    except (KeyError, TypeError):
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}") from None


def format_id(index_format: str, rule: str) -> int:
    """The op library's number of ``index_format``. Raises ValueError for an unknown one, or one without the rule."""
    try:
        number = INDEX_FORMATS[index_format]
    except (KeyError, TypeError):
        raise ValueError(f"index_format: expected one of {', '.join(INDEX_FORMATS)}, got {index_format!r}") from None
    if index_format == "compressed" and rule == "minmax":
        raise ValueError("rule: expected mean, unique or directional for a compressed index, got 'minmax'")
    return number


def index_entry_bytes(rule: str, head_dim: int, dtype: torch.dtype, index_format: str = "exact") -> int:
    """Bytes of one index entry: one page and one KV head, keys of ``dtype`` with ``head_dim`` channels.

    A compressed entry is as large for every dtype.
    """
    rule_info(rule)
    format_id(index_format, rule)
    return reference_index.index_entry_bytes(rule, head_dim, dtype, index_format)


def new_index(k_cache: torch.Tensor, *, rule: str, page_size: int, index_format: str = "exact") -> torch.Tensor:
    """Allocate the page index of a paged key cache.

    Args:
        k_cache: ``[num_blocks, H, block_size, D]``, any strides with unit channel stride.
        rule: name of the scoring rule.
        page_size: tokens per page; divides ``block_size``.
        index_format: ``exact`` (the keys' dtype), or ``compressed`` (4-bit means and 2-bit spreads with shared scales,
            described in ``csrc/core/index/format.h``; every rule but ``minmax``).

    Returns:
        uint8 ``[num_blocks, H, block_size // page_size, entry_bytes]``, zeroed. The bytes belong to the rule;
        :func:`decode_index` shows what they hold.

    Raises:
        ValueError: unknown rule or format, wrong rank, dtype or head dimension, a page size that the ops do not take,
            or a block size that is no multiple of it.
    """
    if k_cache.dim() != 4:
        raise ValueError(f"k_cache: expected 4 dimensions [num_blocks, H, block_size, D], got {list(k_cache.shape)}")
    num_blocks, heads, block_size, head_dim = k_cache.shape
    if k_cache.dtype not in KEY_DTYPES:
        raise ValueError(f"k_cache: expected dtype {', '.join(map(str, KEY_DTYPES))}, got {k_cache.dtype}")
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"k_cache: expected a head dimension that is a multiple of 8 up to 256, got {head_dim}")
    if type(page_size) is not int or page_size not in PAGE_SIZES:
        raise ValueError(f"page_size: expected one of {', '.join(map(str, PAGE_SIZES))}, got {page_size!r}")
    if block_size % page_size:
        raise ValueError(f"page_size: expected a divisor of the block size {block_size}, got {page_size}")
    entry = index_entry_bytes(rule, head_dim, k_cache.dtype, index_format)
    shape = (num_blocks, heads, block_size // page_size, entry)
    return torch.zeros(shape, dtype=torch.uint8, device=k_cache.device)


def decode_index(
    index: torch.Tensor, *, rule: str, dtype: torch.dtype, index_format: str = "exact", head_dim: int | None = None
) -> tuple[torch.Tensor, ...]:
    """The parts of every index entry.

    Args:
        index: uint8 ``[num_blocks, H, pages_per_block, entry_bytes]``.
        rule: the rule it was written with.
        dtype: of the keys.
        index_format: ``exact`` or ``compressed``.
        head_dim: D; needed for a compressed index.

    Returns:
        ``(mean,)`` for ``mean``; ``(mean, std)`` with ``std`` ``[num_blocks, H, pages_per_block]`` for ``unique``, and
        with ``std`` per channel for ``directional``; ``(max, min)`` for ``minmax``. Vectors are
        ``[num_blocks, H, pages_per_block, D]``. Views of an exact index in ``dtype``; of a compressed one
        fp32 copies, of its scalar fp64.

    Raises:
        ValueError: unknown rule or format, or a compressed index without ``head_dim``.
    """
    rule_info(rule)
    format_id(index_format, rule)
    return reference_index.decode_index(index, rule=rule, dtype=dtype, index_format=index_format, head_dim=head_dim)
