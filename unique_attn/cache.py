"""The Hugging Face cache on paged storage: dense like a DynamicCache at first, pages once decoding pays."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unique_attn.config import UniqueConfig
from unique_attn.decode import Change, LayerPages, OutOfStepError, PagedTable
from unique_attn.hf.cache_state import CacheState
from unique_attn.hf.compat import DynamicCache, DynamicLayer, cropped_length, warn_once


@dataclass(frozen=True)
class Call:
    """What the hook of an attention module tells its cache layer of the call that is about to come."""

    mask: Tensor | None  # the attention mask that the module was given
    dense_reason: str | None  # why the module cannot use pages; None if it can


class UniqueLayer(DynamicLayer):
    """A cache layer that holds one tensor of keys and one of values at first, and pages later.

    It turns to pages in the first decode step (see :class:`UniqueConfig`) whose attention module can use them and
    has said so through :meth:`announce`. On pages, :meth:`update` of a decode step returns only the new keys and
    values and the attention function calls :meth:`decode`. An update that nobody announced takes the layer off pages.
    """

    is_sliding = False

    def __init__(self, state: CacheState, layer_idx: int) -> None:
        self.state = state
        self.layer_idx = layer_idx
        self.returned: tuple[Tensor, Tensor] | None = None  # by the last announced update, for the attention function
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._pages: LayerPages | None = None  # together with the next three: set while on pages
        self._table: PagedTable | None = None
        self._version = 0  # operations of the table that this layer has done
        self._length = 0  # tokens of a row, padding included
        self._new: tuple[Tensor, Tensor] | None = None  # the table has room for them, but they are not written yet
        self._call: Call | None = None
        self.lost_graph = False  # keys or values that required a gradient went through pages
        super().__init__()

    @classmethod
    def adopt(cls, layer: DynamicLayer, state: CacheState, layer_idx: int) -> UniqueLayer:
        """A layer with the contents of a plain ``DynamicLayer``."""
        adopted = cls(state, layer_idx)
        for name, value in vars(layer).items():
            setattr(adopted, name, value)
        return adopted

    # ---- What transformers sees. ----

    @property
    def keys(self) -> Tensor | None:
        """``[B, H, length, D]``. Gathered anew at every access while the layer is on pages."""
        return self._keys if self._pages is None else self.gather()[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._leave_pages()
        self._keys = value

    @property
    def values(self) -> Tensor | None:
        """Like :attr:`keys`."""
        return self._values if self._pages is None else self.gather()[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._leave_pages()
        self._values = value

    def get_seq_length(self) -> int:
        """Tokens of a row, padding included."""
        return int(super().get_seq_length()) if self._pages is None else self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, T, D]`` keys and values; returns all of them, or only the new ones if pages will be read."""
        call, self._call, self.returned = self._call, None, None
        on_pages = self._stay(call, key_states) if self._pages is not None else self._enter_pages(call, key_states)
        if not on_pages:
            self._leave_pages()
            result = super().update(key_states, value_states, *args, **kwargs)
        else:
            result = self._append(key_states, value_states)
        if call is not None:
            self.returned = result
        return result

    def crop(self, amount: int) -> None:
        """Drop tokens at the end; ``amount`` as in the installed transformers."""
        if self._pages is None:
            super().crop(amount)
            return
        length = cropped_length(amount, self._length)
        if length < self._length:
            self._flush()
            self._apply(self._paged()[1].truncate(self._version, length))
            self._length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by the rows ``beam_idx``, for beam search."""
        if self._pages is None:
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # annotated as LongTensor, which no tensor is
        else:
            self._select(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep only the rows ``indices``."""
        if self._pages is None:
            super().batch_select_indices(indices)
        else:
            self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times; on pages the copies share their blocks."""
        if self._pages is None:
            super().batch_repeat_interleave(repeats)
        else:
            self._flush()
            self._apply(self._paged()[1].repeat(self._version, repeats))

    def reset(self) -> None:
        """Forget everything; the layer is dense and empty again."""
        self._pages = self._table = self._new = self._call = self.returned = None
        self._keys = self._values = None
        self.is_initialized = self.lost_graph = False
        self.state.reset()

    # ---- For the attention module and function. ----

    @property
    def on_pages(self) -> bool:
        return self._pages is not None

    @property
    def awaits_decode(self) -> bool:
        """Whether the last update returned only the new keys and values, for :meth:`decode`."""
        return self._new is not None

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[B]``: stored tokens of each row, padding not included. Only while on pages."""
        pages, table = self._paged()
        return table.seq_lens(pages.device)

    def announce(self, call: Call | None) -> None:
        """Say what the coming call of the attention module is like; ``None`` takes it back."""
        self._call = call
        self.returned = None

    def decode(self, q: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attend with ``q`` ``[B, T, Hq, D]`` of the tokens just updated: ``out``, ``lse`` and the ``pages`` read."""
        assert self._new is not None
        pages, table = self._paged()
        k, v = self._new
        self._new = None
        return pages.decode(q, k.transpose(1, 2), v.transpose(1, 2), table, scale)

    def gather(self) -> tuple[Tensor, Tensor]:
        """Copies of all keys and values ``[B, H, length, D]`` while on pages, zeros in the padding."""
        self._flush()
        pages, table = self._paged()
        return pages.gather(table, self._length)

    # ---- On and off pages. ----

    def _paged(self) -> tuple[LayerPages, PagedTable]:
        assert self._pages is not None
        assert self._table is not None
        if self._version != self._table.version and self._new is not None:
            raise OutOfStepError("new tokens of a layer were neither attended to nor written")
        return self._pages, self._table

    def _is_step(self, call: Call | None, num_tokens: int) -> bool:
        """Whether an update is a decode step on a context long enough for pages."""
        config, length = self.state.config, self.get_seq_length()
        return (
            call is not None
            and call.dense_reason is None
            and length > 0
            and 0 < num_tokens <= config.max_decode_tokens
            and length + num_tokens >= config.dense_limit
        )

    def _enter_pages(self, call: Call | None, key_states: Tensor) -> bool:
        batch, _, num_tokens, _ = key_states.shape
        state, keys, values = self.state, self._keys, self._values
        if state.refused or call is None or not self._is_step(call, num_tokens):
            return False
        if keys is None or values is None or keys.dtype != key_states.dtype or keys.device != key_states.device:
            return False
        length = self.get_seq_length()
        padding = state.padding(call.mask, batch, num_tokens, length + num_tokens)
        if padding is None:
            if num_tokens == 1:  # with more tokens the mask may be special to this call, a tree of drafts for example
                state.refused = True
                warn_once("an attention mask is not causal with left padding: dense attention for this cache", "mask")
            return False
        if state.table is None:
            state.table = PagedTable.create(length, padding, state.config.block_size)
        self._join(state.table, keys, values, num_tokens)
        return True

    def _join(self, table: PagedTable, keys: Tensor, values: Tensor, num_tokens: int) -> None:
        """Write the dense contents to pages, before or after the table made room for ``num_tokens`` more."""
        length = keys.shape[-2]
        ahead = table.length - length
        if table.batch != keys.shape[0] or ahead not in (0, num_tokens):
            raise OutOfStepError(f"layer {self.layer_idx} holds {length} tokens, others {table.length}")
        pages = LayerPages(table.pool, keys, self.state.config)
        pages.write(keys, values, table, 0)
        self._pages, self._table, self._length = pages, table, length
        self._version = table.version - (ahead > 0)
        self._keys = self._values = None
        self.lost_graph |= keys.requires_grad

    def _stay(self, call: Call | None, key_states: Tensor) -> bool:
        """Whether an update can go to the pages that the layer is on."""
        num_tokens = key_states.shape[2]
        self._flush()
        pages, table = self._paged()
        if call is None or call.dense_reason is not None:
            return False
        if key_states.shape[0] != table.batch:
            raise ValueError(f"key_states: expected the {table.batch} rows of the cache, got {key_states.shape[0]}")
        if pages.k.dtype != key_states.dtype or pages.device != key_states.device:
            return False
        length = self._length + num_tokens
        return length >= self.state.config.dense_limit and self.state.agrees(call.mask, table, num_tokens, length)

    def _leave_pages(self) -> None:
        if self._pages is not None:
            keys, values = self.gather()
            self._pages = self._table = self.state.table = None
            self._keys, self._values = keys, values

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens, begin = key_states.shape[2], self._length
        pages, table = self._paged()
        self._apply(table.append(self._version, num_tokens))
        self._length += num_tokens
        self.lost_graph |= key_states.requires_grad
        if num_tokens <= self.state.config.max_decode_tokens:
            self._new = (key_states.detach(), value_states.detach())
            return key_states, value_states
        pages.write(key_states, value_states, table, begin)
        return self.gather()

    def _apply(self, change: Change) -> None:
        self._version += 1
        self._paged()[0].apply(change)

    def _select(self, rows: Any) -> None:
        self._flush()
        self._apply(self._paged()[1].select(self._version, rows))

    def _flush(self) -> None:
        """Write new tokens that no decode has written."""
        if self._new is not None:
            pages, table = self._paged()
            (k, v), self._new = self._new, None
            pages.write(k, v, table, self._length - k.shape[2])

    # ---- Copies. ----

    def __deepcopy__(self, memo: dict[int, Any]) -> UniqueLayer:
        self.announce(None)
        if self._pages is not None:
            self._flush()
        layer = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            # Blocks are copied on write, so the copy of a layer on pages shares its storage.
            layer.__dict__[name] = value if name == "_pages" else copy.deepcopy(value, memo)
        return layer

    def __getstate__(self) -> dict[str, Any]:
        dense: dict[str, Any] = {"_keys": self.keys, "_values": self.values}
        gone = ("_pages", "_table", "_new", "_call", "returned")
        return {**vars(self), **dense, **dict.fromkeys(gone)}


class UniqueCache(DynamicCache):
    """A transformers cache whose full-attention layers can turn to pages.

    ``model.generate()`` needs none: hooks give the cache it makes the same layers. Pass one to share it between calls,
    to fork it, or to give a cache settings of its own.

    Args:
        config: settings; the defaults if None. They win over those of ``unique_attn.enable``.
        model_config: the model's ``config``. With it, sliding-window layers keep only their window.

    Raises:
        TypeError: ``config`` is no :class:`UniqueConfig`.
    """

    def __init__(self, config: UniqueConfig | None = None, model_config: Any = None) -> None:
        if config is not None and not isinstance(config, UniqueConfig):
            raise TypeError(f"config: expected a UniqueConfig or None, got {type(config).__name__}")
        if model_config is not None and not hasattr(model_config, "get_text_config"):
            raise TypeError(f"model_config: expected a transformers config or None, got {type(model_config).__name__}")
        super().__init__(config=model_config)
        self._unique_attn = CacheState(UniqueConfig() if config is None else config)
        self.layers = [
            UniqueLayer(self._unique_attn, i) if type(layer) is DynamicLayer else layer
            for i, layer in enumerate(self.layers)
        ]
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = self._new_layer  # type: ignore[assignment]  # it is only called

    def _new_layer(self) -> UniqueLayer:
        return UniqueLayer(self._unique_attn, len(self.layers))

    @property
    def unique_config(self) -> UniqueConfig:
        """The settings of this cache."""
        return self._unique_attn.config

    def fork(self) -> UniqueCache:
        """A copy that continues on its own. Blocks of pages are shared until one of the two writes to them.

        ``copy.deepcopy`` does the same, for this and for any cache that hooks have adopted.
        """
        return copy.deepcopy(self)


def adopt(cache: Any, layer_idx: int, config: UniqueConfig) -> UniqueLayer | None:
    """The layer of ``cache`` as a :class:`UniqueLayer`, put in its place if it was a plain ``DynamicLayer``.

    The cache object itself stays, because ``generate`` holds on to it. None if cache or layer are of another kind.
    """
    if cache is None:
        return None
    if hasattr(cache, "is_static_pages"):
        return cache.layers[layer_idx]  # stands in for one
    if type(cache) not in (DynamicCache, UniqueCache) or cache.offloading:
        kind = "offloaded " * bool(getattr(cache, "offloading", False)) + type(cache).__name__
        warn_once(f"{kind} has no pages: dense attention", "cache", kind)
        return None
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if type(layer) is DynamicLayer:
        state = vars(cache).setdefault("_unique_attn", CacheState(config))
        layer = cache.layers[layer_idx] = UniqueLayer.adopt(layer, state, layer_idx)
    return layer if type(layer) is UniqueLayer else None
