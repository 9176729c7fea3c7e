"""What the layers of a cache share, and what the attention masks of its calls mean for pages."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unique_attn.block_storage import BlockStorage
from unique_attn.config import UniqueConfig
from unique_attn.hf.masks import MaskMemo, MaskWatch, is_step_mask, showing_new, shows_padding
from unique_attn.paging import PagedTable

if TYPE_CHECKING:
    from unique_attn.hf.arena import Lease
    from unique_attn.hf.hooks import CacheHook


class CacheState:
    """What the layers of one cache share: the config, the table of pages, and what the masks said."""

    def __init__(self, config: UniqueConfig, *, plain_prompts: bool = False) -> None:
        self.config = config
        self.plain_prompts = plain_prompts  # a first prompt is stored and attended to as stock does
        self.table: PagedTable | None = None  # the table that layers join when they turn to pages
        self.met = False  # an enabled model was given the cache
        self.hook: CacheHook | None = None  # of the last one, to see whether it is enabled still
        self.lease: Lease | None = None  # what the next table has its storage from, if not each layer by itself
        self.refused = False  # a mask with holes was seen: no pages until reset
        self.checked = False  # some layer of a static cache looks at the masks of its steps
        self._trusted: tuple[weakref.ref[Tensor], list[int]] | None = None  # see trust()
        self._masks = MaskMemo()
        self._last_row: tuple[weakref.ref[Tensor], int, Tensor] | None = None  # of the mask asked about last
        self._watched: Tensor | None = None  # mask that was given to a MaskWatch last
        self._watches: dict[torch.device, MaskWatch] = {}

    def storage(self, table: PagedTable, like: Tensor) -> BlockStorage:
        """For the blocks of the next layer that turns to pages, whose keys are as ``like`` ``[B, H, 0, D]``."""
        if not table.storages:
            table.lease, self.lease = self.lease, None
        if table.lease is not None:
            return table.lease.storage(len(table.storages), table.pool, like, self.config)
        return BlockStorage.create(table.pool.num_blocks, like, table.pool.block_size, self.config)

    def reset(self) -> None:
        self.table, self.refused, self._masks, self._watched = None, False, MaskMemo(), None
        self._trusted = self._last_row = None
        self.checked = False
        self._watches.clear()

    def padding(self, mask: Tensor | None, batch: int, num_tokens: int, length: int, layer: object) -> list[int] | None:
        """Left padding of each row by ``mask``, looked at once for all layers; None for any other kind of mask."""
        found = self._masks.padding(mask, batch, num_tokens, length, layer)
        return showing_new(found, num_tokens, length)

    def has_holes(self, mask: Tensor | None, num_tokens: int) -> bool:
        """Where :meth:`padding` has none to tell: whether the mask, looked at once for all layers, hides tokens that
        are stored and come after some that it shows: holes, or an earlier level of a tree of drafts."""
        return self._masks.holes(mask, num_tokens)

    def hides_new(self, mask: Tensor | None, batch: int, num_tokens: int, length: int) -> bool:
        """Where :meth:`padding` has none to tell: whether that is since new tokens of some row are padding."""
        return self._masks.padding(mask, batch, num_tokens, length, None) is not None

    def padding_of_call(self, mask: Any, batch: int, length: int, layer: object) -> list[int] | None:
        """Left padding of rows of ``length`` tokens by the ``attention_mask`` of a call, looked at once for all layers.

        Args:
            mask: None, ``[B, >= length]``, ``[B or 1, 1, T, >= length]``, or such by the kind of layer. Of a mask with
                queries, what the last one sees counts.
        """
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", False)
        if isinstance(mask, Tensor):
            if self._last_row is None or self._last_row[0]() is not mask or self._last_row[1] != length:
                last = mask[:, None, None, :length].bool() if mask.dim() == 2 else mask[..., -1:, :length].clone()
                self._last_row = weakref.ref(mask), length, last
            mask = self._last_row[2]
        return None if mask is False else self._masks.padding(mask, batch, 1, length, layer)

    def agrees(self, mask: Tensor | None, table: PagedTable, num_tokens: int, length: int, layer: object) -> bool:
        """Whether ``mask`` is causal with the padding of ``table``.

        A single-token step on a GPU is not waited for: it is taken to agree, and checked in the background.

        Raises:
            ValueError: the mask shows padding, whose keys and values were not kept.
        """
        if mask is None:
            agrees = not any(table.padding)
        elif num_tokens == 1 and mask.is_cuda and is_step_mask(mask, table.batch, 1, length):
            if self._watched is not mask:
                self._watched = mask
                watch = self._watches.setdefault(mask.device, MaskWatch(mask.device))
                if watch.submit(mask, table.padding_on(mask.device)):
                    raise ValueError(
                        "attention_mask: expected the left padding to stay as it was when this cache turned to pages, "
                        "got other tokens hidden or shown in an earlier step; use dense attention for such masks"
                    )
            return True
        else:
            agrees = self.padding(mask, table.batch, num_tokens, length, layer) == table.padding
        if not agrees and any(table.padding):
            padding = table.padding_on(mask.device if mask is not None else torch.device("cpu"))
            if shows_padding(mask, padding):
                raise ValueError(
                    f"attention_mask: expected the left padding of {table.padding} tokens to stay hidden, got "
                    f"{'no mask' if mask is None else 'a mask that shows it'}: a cache on pages does not keep padding"
                )
        return agrees

    def trust(self, mask: Tensor | None) -> None:
        """``mask`` ``[B, length]`` agrees with the padding of the table."""
        self._trusted = None if mask is None or self.table is None else (weakref.ref(mask), self.table.padding)

    def trusts(self, mask: Tensor) -> bool:
        """Whether ``mask`` is known to agree with the padding of the table, which is still the same."""
        known, table = self._trusted, self.table
        return known is not None and table is not None and known[0]() is mask and known[1] is table.padding

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheState:
        state = memo[id(self)] = CacheState(self.config, plain_prompts=self.plain_prompts)
        state.table, state.refused, state.met = copy.deepcopy(self.table, memo), self.refused, self.met
        state.checked, state.hook = self.checked, self.hook
        return state

    def __reduce__(self) -> Any:
        return CacheState, (self.config,)  # pages do not survive pickling: layers are pickled dense
