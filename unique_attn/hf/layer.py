"""A layer of a growing cache: dense keys and values at first, pages from the first decode step on."""

from __future__ import annotations

import copy
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unique_attn.block_storage import BlockStorage
from unique_attn.config import UniqueConfig
from unique_attn.hf.cache_state import CacheState
from unique_attn.hf.compat import DynamicLayer, cropped_length, is_traced, warn_once
from unique_attn.hf.handover import READ, Refusal, Step, hand_over, undifferentiable
from unique_attn.ops._autocast import autocast_inputs
from unique_attn.paging import LayerPages, OutOfStepError, PagedTable

_SHORT = Refusal("its context is short", quiet=True)
_PREFILL = Refusal("it has many new tokens", quiet=True)
_TREE = Refusal("its mask is special to this call", quiet=True)  # a tree of drafts, for example
_HOLES = Refusal("its attention mask is not causal with left padding", quiet=True)
_DTYPE = Refusal("its keys come in another dtype than before", quiet=True)
_OUTSIDE = Refusal("a model that was not enabled attends to it", quiet=True)
_STEP = Refusal("nobody attended to its last tokens", quiet=True)
CAPTURES = ("cuda",)  # types of devices where steps on pages are captured


class UniqueLayer(DynamicLayer):
    """A cache layer that holds one tensor of keys and one of values at first, and pages later.

    :meth:`update` hands over the new keys and values as a :class:`~unique_attn.hf.handover.Step`; what becomes of it
    is decided by whoever attends. The attention function has a decode step (see :class:`UniqueConfig`) attend to pages
    with :meth:`decode`, the first of which turns the layer to pages. Everybody else gets all keys and values by
    :meth:`gather`, and a layer whose module computes with them stays dense.
    """

    is_sliding = False
    window = 0

    def __init__(self, state: CacheState) -> None:
        self.state = state
        self.user: weakref.ref[nn.Module] | None = None
        self.dense: Refusal | None = None  # why the layer does not use pages until it is reset
        self.lost_graph = False  # keys or values that required a gradient went through pages
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._pages: LayerPages | None = None  # together with the next three: set while on pages
        self._table: PagedTable | None = None
        self._version = 0  # operations of the table that this layer has done
        self._length = 0  # tokens of a row, padding included
        self._dtypes = (torch.float32, torch.float32)  # of keys and values; pages hold autocast's
        self._listed = False  # on pages for captured steps alone: the other layers stay if this one leaves
        self._given: tuple[Tensor, Tensor, tuple[int, int]] | None = None  # last read from pages, and their versions
        self._step: Step | None = None  # handed over, and neither stored nor attended to yet
        super().__init__()

    @classmethod
    def adopt(cls, layer: DynamicLayer, state: CacheState) -> UniqueLayer:
        """A layer with the contents of a plain ``DynamicLayer``."""
        adopted = cls(state)
        for name, value in vars(layer).items():
            setattr(adopted, name, value)
        return adopted

    # ---- What transformers sees. ----

    @property
    def keys(self) -> Tensor | None:
        """``[B, H, length, D]``. Gathered while the layer is on pages, which it leaves if they are written to."""
        return self._read()[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._settle()
        self._leave_pages()
        self._keys = value

    @property
    def values(self) -> Tensor | None:
        """Like :attr:`keys`."""
        return self._read()[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._settle()
        self._leave_pages()
        self._values = value

    def get_seq_length(self) -> int:
        """Tokens of a row, padding included."""
        if self._step is not None:
            return self._step.length
        return self._stored()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take ``[B, H, T, D]`` new keys and values; returns what stands for all of them."""
        self._settle()
        if is_traced():
            self._leave_pages()
            return super().update(key_states, value_states)
        if self._table is not None and key_states.shape[0] != self._table.batch:
            raise ValueError(
                f"key_states: expected the {self._table.batch} rows of the cache, got {key_states.shape[0]}"
            )
        stored = self._stored()
        if stored == 0 and self.state.plain_prompts and not torch.is_grad_enabled():
            return super().update(key_states, value_states)  # whoever gets them does what stock would
        step = Step(key_states, value_states, stored + key_states.shape[2])
        self._step = step
        if self._pages is None:
            step.refusal = self.dense or (_HOLES if self.state.refused else self._is_no_step(step))
            if step.refusal is not None:
                step.full = self.gather(step, step.refusal)
        return hand_over(self, step)

    def crop(self, amount: int) -> None:
        """Drop tokens at the end; ``amount`` as in the installed transformers."""
        self._settle()
        if self._pages is None:
            super().crop(amount)
            return
        length = cropped_length(amount, self._length)
        if length < self._length:
            with self._alone():
                self._paged()[1].truncate(self._version, length)
                self._version += 1
            self._length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by the rows ``beam_idx``, for beam search."""
        if not self._select(beam_idx):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # annotated as LongTensor, which no tensor is

    def batch_select_indices(self, indices: Any) -> None:
        """Keep only the rows ``indices``."""
        if not self._select(indices):
            super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times; on pages the copies share their blocks."""
        self._settle()
        if self._pages is None:
            super().batch_repeat_interleave(repeats)
            return
        with self._alone():
            self._paged()[1].repeat(self._version, repeats)
            self._version += 1

    def reset(self) -> None:
        """Forget everything; the layer is dense and empty again."""
        self._pages = self._table = self._step = self._given = self.dense = None
        self._keys = self._values = None
        self.is_initialized = self.lost_graph = False
        self.state.reset()

    # ---- What the attention function sees (PagedLayer). ----

    @property
    def config(self) -> UniqueConfig:
        return self.state.config

    @property
    def on_pages(self) -> bool:
        return self._pages is not None

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[B]``: stored tokens of each row, padding not included. Only while on pages."""
        pages, table = self._paged()
        return table.seq_lens(pages.device)

    def refuses(self, step: Step, query: Tensor, mask: Tensor | None) -> Refusal | None:
        """Why ``query`` cannot attend to pages under ``mask``; None if it can.

        Raises:
            ValueError: the mask shows padding, whose keys and values were not kept.
        """
        if step.refusal is not None or step is not self._step:
            return step.refusal or READ
        if self._pages is None:
            return self._cannot_enter(step, query, mask)
        pages, table = self._paged()
        table.check(self._version, "append", step.num_tokens)
        masked = step.length if mask is None or mask.shape[-1] == 1 else mask.shape[-1]
        if masked < step.length or masked == step.length + step.num_tokens:  # a step more than others, or one less
            raise OutOfStepError(f"attention_mask: expected {step.length} tokens as in this layer, got {masked}")
        if not self.state.agrees(mask, table, step.num_tokens, step.length, self):
            return _HOLES if step.num_tokens == 1 else self._tree(step, mask)
        return self._is_no_step(step) if self._fits(step, query, pages.k) else _DTYPE

    def decode(self, step: Step, query: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Store the tokens of a step that the layer did not refuse, and attend with their queries ``[B, Hq, T, D]``."""
        query, k, v = autocast_inputs(query.detach(), step.k.detach(), step.v.detach())
        if self._pages is None:
            self._enter_pages(step, k.dtype)
        self.lost_graph |= step.k.requires_grad
        with self._alone():
            pages, table = self._make_room(step)
            found = pages.decode(query.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), table, scale)
            self._count(step)
        return found

    def lse_of_all(self, query: Tensor, scale: float | None) -> Tensor:
        """After :meth:`decode`: the logarithm of the normalizer over all tokens, ``[B, T, Hq]``."""
        pages, table = self._paged()
        (query,) = autocast_inputs(query.detach())
        with self._alone():
            blocks, lens = table.block_table(pages.device), table.seq_lens(pages.device)
            return pages.lse_of_all(query.transpose(1, 2), blocks, lens, table.length, scale)

    def gather(self, step: Step, refusal: Refusal) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B, H, length, D]``, those of the step included, and zeros in padding on pages.

        The layer leaves its pages unless the reason is one that passes.
        """
        if step is not self._step and step.length != self.get_seq_length():
            raise RuntimeError(
                f"cache: expected what update() returned, {step.length} tokens, to be read before its next call, got "
                f"{self.get_seq_length()} tokens by now: clone() what is to be kept"
            )
        if refusal is READ and not self.state.met:
            warn_once("a UniqueCache was given to a model that was not enabled: it stays dense", "met")
        if refusal is READ and self.state.hook is not None and not self.state.hook.attached:
            refusal = _OUTSIDE  # disabled meanwhile
        if refusal.lasting:
            self.dense = refusal
        if refusal.lasting or refusal in (_SHORT, _HOLES, _DTYPE, _OUTSIDE):
            self._leave_pages(but=step)
        if self._pages is not None:
            self.lost_graph |= step.k.requires_grad
            self._settle()
        if self._pages is not None:
            keys, values = self._contents()
        else:
            if step is self._step:
                self._step = None
                super().update(step.k, step.v)
            assert self._keys is not None
            assert self._values is not None
            keys, values = self._keys, self._values
        if self._pages is not None or self.lost_graph:
            return undifferentiable(keys, step.k), undifferentiable(values, step.k)
        return keys, values

    # ---- On and off pages. ----

    def _stored(self) -> int:
        """Tokens of a row without those of a step that nobody has attended to."""
        if self._pages is not None:
            return self._length
        return 0 if self._keys is None or self._keys.numel() == 0 else self._keys.shape[-2]

    def _paged(self) -> tuple[LayerPages, PagedTable]:
        assert self._pages is not None
        assert self._table is not None
        return self._pages, self._table

    def _alone(self) -> AbstractContextManager[None]:
        """No fork of this cache is at work in another thread meanwhile."""
        return nullcontext() if self._pages is None else self._pages.exclusive()

    def _is_no_step(self, step: Step) -> Refusal | None:
        """Why this is no decode step on a context long enough for pages."""
        config = self.state.config
        if step.num_tokens > config.max_decode_tokens:
            return _PREFILL
        limit = config.dense_limit
        if step.k.device.type in CAPTURES and limit <= config.budget:
            limit = 0  # all pages are read as long as there are no more: as fast as any other captured step
        return _SHORT if step.length == step.num_tokens or step.length < limit else None

    @staticmethod
    def _fits(step: Step, query: Tensor, stored: Tensor) -> bool:
        """Whether queries, new keys and new values are of the dtype and on the device of what is stored."""
        new = autocast_inputs(query, step.k, step.v)
        return all(x.dtype == stored.dtype and x.device == stored.device for x in new)

    def _cannot_enter(self, step: Step, query: Tensor, mask: Tensor | None) -> Refusal | None:
        assert self._keys is not None
        if not self._fits(step, query, autocast_inputs(self._keys)[0]):
            return _DTYPE
        state = self.state
        padding = state.padding(mask, step.k.shape[0], step.num_tokens, step.length, self)
        if padding is None:
            if state.hides_new(mask, step.k.shape[0], step.num_tokens, step.length):
                return _TREE
            if step.num_tokens > 1:
                return self._tree(step, mask)
            state.refused = True
            warn_once("an attention mask is not causal with left padding: dense attention for this cache", "mask")
            return _HOLES
        step.padding = padding
        return None

    def _tree(self, step: Step, mask: Tensor | None) -> Refusal:
        if self.state.has_holes(mask, step.num_tokens):
            warn_once(
                "an attention mask hides tokens in the middle: dense attention for steps of several tokens", "tree"
            )
        return _TREE

    def _enter_pages(self, step: Step, dtype: torch.dtype) -> None:
        """Write the dense contents to pages of ``dtype``, before or after the table made room for the step's tokens."""
        state, keys, values = self.state, self._keys, self._values
        assert keys is not None
        assert values is not None
        assert step.padding is not None
        length = keys.shape[-2]
        if state.table is None:
            state.table = PagedTable.create(length, step.padding, state.config.block_size)
        table = state.table
        ahead = table.length - length
        if table.batch != keys.shape[0] or ahead not in (0, step.num_tokens):
            raise OutOfStepError(f"a layer holds {length} tokens, others {table.length}")
        with table.pool.lock:
            pages = LayerPages(table.pool, state.storage(table, keys[:, :, :0].to(dtype)), state.config)
            pages.write(keys.to(dtype), values.to(dtype), table, 0)
            table.storages.append(pages)
        self._pages, self._table, self._length = pages, table, length
        self._version = table.version - (ahead > 0)
        self._dtypes = keys.dtype, values.dtype
        self._keys = self._values = None
        self.lost_graph |= keys.requires_grad

    def _make_room(self, step: Step) -> tuple[LayerPages, PagedTable]:
        """Have blocks for the tokens of a step. Until it is counted it is to be settled, if storing them fails say."""
        pages, table = self._paged()
        table.append(self._version, step.num_tokens)
        pages.fit()
        return pages, table

    def _count(self, step: Step) -> None:
        """The tokens of a step are stored: it is settled."""
        self._version += 1
        self._length, self._step = step.length, None

    # ---- Steps that go past the layers. ----

    def settled(self) -> tuple[LayerPages, PagedTable] | None:
        """Pages and table with all that was handed over; None if the layer is not on pages."""
        self._settle()
        return None if self._pages is None else self._paged()

    def enter(self, table: PagedTable) -> bool:
        """Turn a layer to pages that has a reason to be dense, for steps that read all of them."""
        keys = self._keys
        if keys is None or keys.shape != self._values.shape or keys.shape[2] != table.length:  # type: ignore[union-attr]
            return False
        step = Step(keys[:, :, :0], keys[:, :, :0], table.length)
        step.padding = table.padding
        self._enter_pages(step, autocast_inputs(keys)[0].dtype)
        self._listed = True
        return True

    def is_at(self, table: PagedTable, storage: BlockStorage) -> bool:
        """Whether the layer is on pages of ``table`` in ``storage``, with all that was handed over."""
        pages = self._pages
        return (
            pages is not None
            and pages.storage is storage
            and self._table is table
            and self._version == table.version
            and self._step is None
            and self._given is None
        )

    def advance(self) -> None:
        """Count a token that a captured step stores, which the table has counted."""
        self._version += 1
        self._length += 1

    def take_back(self) -> None:
        """Undo :meth:`advance`, which the table has done."""
        self._version += 1
        self._length -= 1

    def _read(self) -> tuple[Tensor | None, Tensor | None]:
        """All keys and values, for whoever asks."""
        if self._given is None or self._written():
            self._settle()
            if self._pages is None:
                return self._keys, self._values
            with torch.inference_mode(False):  # or nobody counts how often they are written to
                keys, values = self._contents()
            self._given = keys, values, (keys._version, values._version)
        return self._given[:2]

    def _written(self) -> bool:
        return self._given is not None and self._given[2] != (self._given[0]._version, self._given[1]._version)

    def _settle(self) -> None:
        """Store the tokens of a step that nobody has attended to; take over what was read and then written to."""
        if self._given is not None:
            written, given, self._given = self._written(), self._given, None
            if written:
                self._pages = self._table = self.state.table = None
                self._keys, self._values = given[:2]
        step = self._step
        if step is None:
            return
        if self._pages is None:
            self.gather(step, _STEP)
            return
        with self._alone():
            pages, table = self._make_room(step)
            pages.write(step.k.to(pages.k.dtype), step.v.to(pages.k.dtype), table, step.length - step.num_tokens)
            self._count(step)

    def _contents(self) -> tuple[Tensor, Tensor]:
        with self._alone():
            pages, table = self._paged()
            keys, values = pages.gather(table, self._length)
        return keys.to(self._dtypes[0]), values.to(self._dtypes[1])

    def _leave_pages(self, but: Step | None = None) -> None:
        """Be dense again, with the tokens of a step that nobody has attended to unless it is ``but`` this one."""
        if self._step is not but:
            self._settle()
        if self._pages is not None:
            keys, values = self._contents()
            if self._listed:
                self._table.storages.remove(self._pages)  # type: ignore[union-attr]
            else:
                self.state.table = None
            self._pages = self._table = None
            self._keys, self._values = keys, values

    def _select(self, rows: Any) -> bool:
        self._settle()
        if self._pages is None:
            return False
        with self._alone():
            self._paged()[1].select(self._version, rows)
            self._version += 1
        return True

    # ---- Copies. ----

    def __copy__(self) -> UniqueLayer:
        """A layer that goes on by itself, as a shallow copy of a layer that holds tensors does."""
        self._settle()
        return copy.deepcopy(self, {id(x): x for x in (self._keys, self._values) if x is not None})

    def __deepcopy__(self, memo: dict[int, Any]) -> UniqueLayer:
        self._settle()
        layer = memo[id(self)] = type(self).__new__(type(self))
        with self._alone():
            for name, value in vars(self).items():
                # Blocks are copied on write, so the copy of a layer on pages shares its storage.
                layer.__dict__[name] = value if name == "_pages" else copy.deepcopy(value, memo)
        return layer

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        keys, values = (self._keys, self._values) if self._pages is None else self._contents()
        dense: dict[str, Any] = {"_keys": keys, "_values": values}
        return {**vars(self), **dense, **dict.fromkeys(("_pages", "_table", "_step", "user"))}
