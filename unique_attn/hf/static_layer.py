"""A layer of a static cache of transformers with a page index: what compiled models decode from."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from unique_attn.block_storage import BlockStorage
from unique_attn.config import UniqueConfig
from unique_attn.hf.cache_state import CacheState
from unique_attn.hf.compat import StockStaticLayer, is_traced, warn_once
from unique_attn.hf.handover import Refusal, Step, hand_over
from unique_attn.hf.masks import is_step_mask, visible
from unique_attn.ops._autocast import autocast_inputs
from unique_attn.paging import LayerPages, SharedPool
from unique_attn.rules import MAX_PAGES

_SHORT = Refusal("its cache is short", lasting=True, quiet=True, prompts=True)
_LONG = Refusal("the ops cannot read as many pages as dense_below asks for", lasting=True, prompts=True)
_PROMPT = Refusal("it has many new tokens", quiet=True)
_FIRST = Refusal("its cache was empty before", quiet=True)
LISTED = Refusal("listed in dense_layers", lasting=True, quiet=True)
_TREE = Refusal("its mask is special to this call", quiet=True)
_HOLES = Refusal("its attention mask is not causal with left padding", lasting=True, quiet=True)
_DTYPE = Refusal("its queries, keys and values differ in dtype", lasting=True)
COMPILED = Refusal("it is compiled, and its cache is not a StaticCache whose prompt ran uncompiled or in generate()")
ATTRIBUTE = "_unique_attn"  # of keys and values, and of a cache


class UniqueStaticLayer(StockStaticLayer):
    """A static cache layer with pages: each row of what it stores is one block.

    A block has whole pages, so it may have places behind the ``max_cache_len`` that the stock layer has. Nobody but the
    ops sees those: masks that were made for the stock layer fit.

    Until a call that is not compiled attends to it, it is a stock layer. Then the rows move to where they begin with
    their first token that is no padding, and are indexed. From there on whatever depends on the length of a sequence is
    on the device, so compiled steps hold for all lengths.
    """

    window = 0
    _keys: Any  # what the stock layer has as keys and values, in rows that are moved
    _values: Any

    def __init__(self, layer: Any, state: CacheState) -> None:
        self.state = state
        self.user: weakref.ref[nn.Module] | None = None
        self.dense: Refusal | None = None  # why the layer does not use pages until it is reset
        self.indexed = False  # it uses pages
        self.padded = False  # some row has padding, and was moved
        self.checks = False  # it looks at masks, for all layers
        self.pages: LayerPages | None = None  # around keys and values; stays, and with it the index, once it is made
        self._host_length: int | None = None  # tokens of a row, as long as no compiled step has counted
        self._pending = 0  # last tokens that are stored and not indexed, outside of compiled steps
        for name, value in vars(layer).items():
            vars(self)[{"keys": "_keys", "values": "_values"}.get(name, name)] = value
        size = state.config.page_size
        self._places = -(-self.max_cache_len // size) * size  # of a row
        if not self.is_initialized:
            self._host_length = 0
            return
        self._keys, self._values = self._whole(self._keys), self._whole(self._values)
        self._keep()

    # ---- What transformers sees. ----

    @property
    def keys(self) -> Tensor | None:
        """``[B, H, max_cache_len, D]``, each token at the place that it has in a mask."""
        return self._stock(self._keys)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._leave()
        self.pages, self._keys = None, self._whole(value)

    @property
    def values(self) -> Tensor | None:
        """Like :attr:`keys`."""
        return self._stock(self._values)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._leave()
        self.pages, self._values = None, self._whole(value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if is_traced():
            super().lazy_initialization(key_states, value_states)
            # Up to PyTorch 2.11, tracing goes past the setters.
            self._keys, self._values = self._whole(self.keys), self._whole(self.values)
            return
        with torch.inference_mode(False):  # the layer may outlive the inference mode it began in
            super().lazy_initialization(*autocast_inputs(key_states, value_states))
        self._keep()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store ``[B, H, T, D]`` new keys and values; returns what stands for all of them."""
        num_tokens = key_states.shape[2]
        if is_traced():
            self._store(key_states, value_states)
            self._host_length = None  # never read in a compiled step, or that would depend on it
            return self._keys, self._values
        self._settle()
        if self._host_length is not None:
            if self._host_length + num_tokens > self.max_cache_len:
                raise IndexError(
                    f"cache: expected at most {self.max_cache_len} tokens, got {self._host_length + num_tokens}"
                )
            self._host_length += num_tokens
        self._store(key_states, value_states)
        self._pending = num_tokens
        step = Step(key_states, value_states, self.max_cache_len)
        if num_tokens > 1:
            step.stored = self.length()
        return hand_over(self, step)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens at the end, as the stock layer."""
        self._settle()
        super().crop(tokens_to_remove)
        self._host_length = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by the rows ``beam_idx``, for beam search. Nothing moves to another address."""
        if not self.is_initialized:
            return
        self._settle()
        rows = beam_idx.to(self.device)
        parts = [self._keys, self._values]
        if self.pages is not None:
            parts += [self.pages.index, self._offsets]
        for part in parts:
            part.copy_(part.index_select(0, rows))

    def reset(self) -> None:
        """Forget all tokens. Nothing moves to another address."""
        if self.is_initialized:
            self._keys.zero_()
            self._values.zero_()
        self.cumulative_length.zero_()
        if self.pages is not None:
            self._offsets.zero_()
        self.indexed = self.padded = self.checks = False
        self.dense = self.user = None
        self._host_length = self._pending = 0
        self.state.reset()

    # ---- What the attention function sees (PagedLayer). ----

    @property
    def config(self) -> UniqueConfig:
        return self.state.config

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[B]``: stored tokens of each row, padding not included. Only while on pages."""
        return (self.cumulative_length - self._offsets).to(torch.int32)

    def refuses(self, step: Step, query: Tensor, mask: Tensor | None) -> Refusal | None:
        """Why ``query`` cannot attend to pages under ``mask``; None if it can."""
        if self.dense is not None:
            return self.dense
        if not self.indexed:
            return self.unknown(step) if is_traced() else _FIRST
        if self.checks or step.num_tokens > 1:
            agrees = self._agrees(mask, step.num_tokens)
            if is_traced() and isinstance(agrees, Tensor):
                torch._assert_async(agrees, "attention_mask: expected a causal one with the left padding of the prompt")
            elif not agrees:
                if step.num_tokens > 1:
                    return _TREE
                self.refuse_masks()
        if self.state.refused:
            return _HOLES
        if step.num_tokens > self.config.max_decode_tokens or step.stored == step.num_tokens:
            return _PROMPT
        return None if self._fits(query) else _DTYPE

    def unknown(self, step: Step) -> Refusal:
        """Why a compiled call is dense that comes before the layer turned to pages: a prompt is expected to."""
        if self.dense is not None or self.state.refused:
            return self.dense or _HOLES
        return COMPILED if step.num_tokens <= self.config.max_decode_tokens else _PROMPT

    def decode(self, step: Step, query: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attend with the queries ``[B, Hq, T, D]`` of the last T tokens, which are stored."""
        assert self.pages is not None
        (query,) = autocast_inputs(query.detach())
        config, seq_lens = self.config, self.seq_lens
        num_pages, budget_pages = config.num_pages, None
        if config.dense_limit > config.budget:
            num_pages = -(-config.dense_limit // config.page_size)
            budget_pages = torch.where(seq_lens < config.dense_limit, num_pages, config.num_pages).to(torch.int32)
        if not is_traced():
            self._pending = 0
        return self.pages.attend(
            query.transpose(1, 2), None, None, self._table, seq_lens, num_pages, scale, budget_pages=budget_pages
        )

    def lse_of_all(self, query: Tensor, scale: float | None) -> Tensor:
        """After :meth:`decode`: the logarithm of the normalizer over all tokens, ``[B, T, Hq]``."""
        assert self.pages is not None
        (query,) = autocast_inputs(query.detach())
        return self.pages.lse_of_all(query.transpose(1, 2), self._table, self.seq_lens, self.max_cache_len, scale)

    def gather(self, step: Step, refusal: Refusal) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B, H, max_cache_len, D]``, each token at the place that it has in a mask."""
        if is_traced():
            if self.indexed:
                self._index(step.num_tokens)
        elif refusal.lasting:
            self._leave()
            self.stay_dense(refusal)
        else:
            self._settle()
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys, values

    # ---- On and off pages. ----

    def stay_dense(self, refusal: Refusal) -> None:
        """Until it is reset. Compiled steps get rows of stock's length, which whoever computes with them counts on."""
        self.dense = refusal
        if self._keys.shape[2] > self.max_cache_len:
            length = self.max_cache_len
            with torch.inference_mode(False):  # as in lazy_initialization
                self._keys, self._values = (part[:, :, :length].contiguous() for part in (self._keys, self._values))
            self.pages = None
            self._keep()

    def turn(self, padding: list[int], length: int) -> None:
        """Move rows to where they have no ``padding``, and index their ``length`` tokens, padding included."""
        if self.pages is None:
            self._keys, self._values = self._whole(self._keys), self._whole(self._values)
            self._make_pages()
        self._keep()
        offsets = torch.tensor(padding)
        if any(padding):
            self._move(offsets.to(self.device))
            self.padded = True
        self._offsets.copy_(offsets)
        self.indexed, self.checks = True, not self.state.checked
        self.state.checked = True
        self._index(length)

    def may_turn(self) -> bool:
        """Whether it holds tokens, and nothing is known against pages."""
        return (
            self.is_initialized
            and not self.indexed
            and self._host_length != 0
            and self.dense is None
            and not self.state.refused
        )

    def refuse_masks(self) -> None:
        """No layer of the cache uses pages until it is reset: a mask hides what is no left padding."""
        self.state.refused = True
        warn_once("an attention mask is not causal with left padding: dense attention for this cache", "mask")

    def no_pages(self) -> Refusal | None:
        """Why the layer cannot turn to pages, by its settings and what is in it."""
        config = self.config
        if self.max_cache_len < max(config.dense_limit, config.budget):
            return _SHORT
        if config.dense_limit > MAX_PAGES * config.page_size:
            return _LONG
        return None if self._keys.dtype == self._values.dtype else _DTYPE

    def _make_pages(self) -> LayerPages:
        pool = SharedPool(num_blocks=self.batch_size, block_size=self._places)
        self.pages = LayerPages(pool, BlockStorage.around(self._keys, self._values, self.config), self.config)
        with torch.inference_mode(False):  # as keys and values
            self._table = torch.arange(self.batch_size, dtype=torch.int32, device=self.device)[:, None]
            self._offsets = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        for tensor in (self.pages.index, self._table, self._offsets):
            torch._dynamo.mark_static_address(tensor)
        return self.pages

    def _leave(self) -> None:
        """Be a stock layer again. If it looked at masks for the others, they are dense as well."""
        self.state.refused |= self.checks
        if self.padded:
            self._move(-self._offsets)
        self.indexed = self.padded = self.checks = False
        self._pending = 0

    def _move(self, by: Tensor) -> None:
        """Move the tokens of each row ``by`` ``[B]`` places to the left."""
        for part in (self._keys, self._values):
            part.copy_(self._moved(part, by))

    def _moved(self, part: Tensor, by: Tensor) -> Tensor:
        count = part.shape[2]
        places = (torch.arange(count, device=by.device) + by[:, None]).clamp(0, count - 1)
        return part.gather(2, places[:, None, :, None].expand_as(part))

    def _stock(self, part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        if self.padded:
            part = self._moved(part, -self._offsets)
        return part if part.shape[2] == self.max_cache_len else part[:, :, : self.max_cache_len]

    def _whole(self, part: Any) -> Any:
        """A stock layer's keys or values with all places of a row."""
        missing = 0 if part is None else self._places - part.shape[2]
        if not missing:
            return part
        with nullcontext() if is_traced() else torch.inference_mode(False):  # as in lazy_initialization
            return pad(part, (0, 0, 0, missing))

    def _store(self, k: Tensor, v: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        k, v = k.to(self._keys.dtype), v.to(self._values.dtype)
        new = torch.arange(k.shape[2], device=self.device) + self.cumulative_length
        if self.padded:
            rows, places = self._table, new - self._offsets[:, None]
            self._keys[rows, :, places] = k.transpose(1, 2)
            self._values[rows, :, places] = v.transpose(1, 2)
        else:  # as the stock layer, but past the views that it would make of the rows
            self._keys.index_copy_(2, new, k)
            self._values.index_copy_(2, new, v)
        self.cumulative_length.add_(k.shape[2])

    def _settle(self) -> None:
        """Index the tokens of a step that nobody attended to sparsely."""
        if self._pending and self.indexed:
            self._index(self._pending)
        self._pending = 0

    def _index(self, num_tokens: int) -> None:
        assert self.pages is not None
        self.pages.reindex(self._table, self.seq_lens, num_tokens)
        if not is_traced():
            self._pending = 0

    def length(self) -> int:
        """Tokens of a row, padding included. Waits for the device after a compiled step."""
        if self._host_length is None:
            self._host_length = int(self.cumulative_length)
        return self._host_length

    def _fits(self, query: Tensor) -> bool:
        """Whether queries are of the dtype and on the device of what is stored."""
        (query,) = autocast_inputs(query)
        return all(x.dtype == query.dtype and x.device == query.device for x in (self._keys, self._values))

    def _agrees(self, mask: Tensor | None, num_tokens: int) -> Tensor | bool:
        """Whether ``mask`` is causal with the padding of the first call."""
        if mask is None:
            return not self.padded
        if not is_step_mask(mask, self.batch_size, num_tokens, self.max_cache_len):
            return False
        shown, plain = visible(mask)
        positions = torch.arange(self.max_cache_len, device=mask.device)
        queries = (torch.arange(num_tokens, device=mask.device) + self.cumulative_length - num_tokens)[:, None]
        expected = (positions >= self._offsets[:, None, None, None]) & (positions <= queries)
        return (shown == expected).all() & plain

    # ---- Copies. ----

    def _keep(self) -> None:
        """Have keys and values lead to this layer."""
        for part in (self._keys, self._values):
            setattr(part, ATTRIBUTE, _Owner(self))
            torch._dynamo.mark_static_address(part)

    def __deepcopy__(self, memo: dict[int, Any]) -> UniqueStaticLayer:
        made = memo[id(self)] = type(self).__new__(type(self))
        left_out = ("pages", "_table", "_offsets")
        vars(made).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k not in left_out})
        made.pages = None
        if made.is_initialized:
            made._keep()
        if self.pages is not None:
            made._make_pages().index.copy_(self.pages.index)
            made._offsets.copy_(self._offsets)
        return made

    def __reduce__(self) -> Any:
        names = ("max_cache_len", "is_initialized", "device", "batch_size", "num_heads", "v_head_dim", "k_head_dim")
        stock = {name: vars(self)[name] for name in (*names, "cumulative_length") if name in vars(self)}
        return _stock_layer, ({**stock, "keys": self.keys, "values": self.values},)


class _Owner:
    """What keys and values know of their layer. It is not kept alive by them, and is not that of a copy of them."""

    def __init__(self, layer: UniqueStaticLayer | None = None) -> None:
        self.layer = None if layer is None else weakref.ref(layer)

    def __reduce__(self) -> Any:
        return _Owner, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Owner:
        return _Owner()


def _stock_layer(state: dict[str, Any]) -> Any:
    layer = StockStaticLayer.__new__(StockStaticLayer)
    vars(layer).update(state)
    return layer


def traced_step(key: Tensor, value: Tensor, num_tokens: int) -> tuple[UniqueStaticLayer, Step] | None:
    """In a compiled call: the layer and the step that keys and values are of, if a static layer returned them."""
    owner = getattr(key, ATTRIBUTE, None)
    layer = None if owner is None or owner.layer is None else owner.layer()
    if layer is None or layer._keys is not key or layer._values is not value:
        return None
    return layer, Step(key[:, :, :num_tokens], value[:, :, :num_tokens], layer.max_cache_len)
