"""Names, defaults and sizes of the page-scoring rules, shared by every op wrapper."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unique_attn._load import load_library

load_library()


@dataclass(frozen=True)
class RuleInfo:
    """What a caller must know of a rule; what it computes is csrc/core/rules.h."""

    id: int  # the op library's enum (csrc/core/types.h)
    vectors: int  # vectors of D channels in an index entry
    scalar: bool  # whether the entry also holds one scalar
    spread: float  # default of lambda (`unique`) or c (`directional`); unused by the others


RULES: dict[str, RuleInfo] = {
    "mean": RuleInfo(id=0, vectors=1, scalar=False, spread=0.0),
    "unique": RuleInfo(id=1, vectors=1, scalar=True, spread=0.5),
    "directional": RuleInfo(id=2, vectors=2, scalar=False, spread=2.0),
    "minmax": RuleInfo(id=3, vectors=2, scalar=False, spread=0.0),
}
SCALAR_BYTES = 16  # the scalar has a slot of its own, so that entries stay 16-byte aligned


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise if the tensors are not on one device. The dispatcher sends a mix of meta and real tensors to the fake
    kernels, which would return without computing anything."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    for name, device in given.items():
        if device != given[first]:
            raise ValueError(f"{op}: {name}: expected the device of {first}, {given[first]}, got {device}")


def rule_info(rule: str) -> RuleInfo:
    """The :class:`RuleInfo` of ``rule``. Raises ValueError for an unknown name."""
    try:
        return RULES[rule]
    except (KeyError, TypeError):
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}") from None


def index_entry_bytes(rule: str, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one exact index entry: one page and one KV head, keys of ``dtype`` with ``head_dim`` channels."""
    info = rule_info(rule)
    return info.vectors * head_dim * dtype.itemsize + SCALAR_BYTES * info.scalar


def new_index(k_cache: torch.Tensor, *, rule: str, page_size: int) -> torch.Tensor:
    """Allocate the page index of a paged key cache.

    Args:
        k_cache: ``[num_blocks, H, block_size, D]``, any strides with unit channel stride.
        rule: name of the scoring rule.
        page_size: tokens per page; divides ``block_size``.

    Returns:
        uint8 ``[num_blocks, H, block_size // page_size, entry_bytes]``, zeroed. The bytes belong to the rule;
        :func:`decode_index` shows what they hold.

    Raises:
        ValueError: unknown rule, wrong rank, or a block size that is no multiple of the page size.
    """
    if k_cache.dim() != 4:
        raise ValueError(f"k_cache: expected 4 dimensions [num_blocks, H, block_size, D], got {list(k_cache.shape)}")
    num_blocks, heads, block_size, head_dim = k_cache.shape
    if page_size <= 0 or block_size % page_size:
        raise ValueError(f"page_size: expected a divisor of the block size {block_size}, got {page_size}")
    entry = index_entry_bytes(rule, head_dim, k_cache.dtype)
    shape = (num_blocks, heads, block_size // page_size, entry)
    return torch.zeros(shape, dtype=torch.uint8, device=k_cache.device)


def decode_index(index: torch.Tensor, *, rule: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The parts of every index entry as tensors of ``dtype``.

    Returns:
        ``mean``: ``(mean,)``; ``unique``: ``(mean, std)`` with ``std`` ``[num_blocks, H, pages_per_block]``;
        ``directional``: ``(mean, std)`` with ``std`` per channel; ``minmax``: ``(max, min)``. Vectors are
        ``[num_blocks, H, pages_per_block, D]``. All are views of ``index``.
    """
    info = rule_info(rule)
    values = index.view(dtype)
    scalar_slot = SCALAR_BYTES // dtype.itemsize
    head_dim = (values.shape[-1] - scalar_slot * info.scalar) // info.vectors
    parts = [values[..., i * head_dim : (i + 1) * head_dim] for i in range(info.vectors)]
    if info.scalar:
        parts.append(values[..., info.vectors * head_dim])
    return tuple(parts)
