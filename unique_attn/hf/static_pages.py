"""Caches on pages whose lengths live on the device alone: what a captured step writes to."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unique_attn.block_storage import BlockStorage
from unique_attn.config import UniqueConfig
from unique_attn.hf.compat import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from unique_attn.hf.handover import Refusal, Step, hand_over
from unique_attn.ops._autocast import autocast_inputs
from unique_attn.paging import LayerPages, PagedTable, SharedPool


class StaticLayer(CacheLayerMixin):
    """One layer of a :class:`StepPages`, for steps of one token.

    Its storage never moves, and the number of tokens in it is known to the device alone.
    """

    is_compileable = is_sliding = False

    def __init__(self, pages: StepPages, layer_idx: int, window: int) -> None:
        super().__init__()
        self.is_initialized = True
        self.layer_idx = layer_idx
        self.window = window
        self.user: weakref.ref[nn.Module] | None = None
        self.storage: LayerPages | None = None  # since the first prefill
        self.block_table: Tensor | None = None  # where it is not that of all layers
        self._pages = weakref.proxy(pages)

    # ---- What transformers sees. ----

    def lazy_initialization(self, *args: Any) -> None:
        """Storage comes with the first prefill."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values ``[B, H, 1, D]`` of a step; :meth:`decode` stores them."""
        return hand_over(self, Step(key_states, value_states, self.get_seq_length() + key_states.shape[2]))

    def get_seq_length(self, *args: Any) -> int:
        """Tokens of the longest row, as far as the host knows."""
        length: int = self._pages.host_length
        return length

    def get_mask_sizes(self, query: Any, *args: Any) -> tuple[int, int]:
        """(keys, offset) of a step's mask, of which only its absence matters."""
        return self.get_seq_length() + 1, 0

    def get_max_length(self, *args: Any) -> int:
        """Tokens that a row can hold."""
        length: int = self._pages.max_length
        return length

    get_max_cache_shape = get_max_length  # its name before transformers 5

    # ---- What the attention function sees (PagedLayer). ----

    @property
    def config(self) -> UniqueConfig:
        """The settings, in which no layer is dense: one that should be reads all pages that it may see."""
        return self._pages.layer_config

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[B]``: tokens of each row, the step's included."""
        return self._pages.seq_lens

    def refuses(self, step: Step, query: Tensor, mask: Tensor | None) -> Refusal | None:
        """Nothing here refuses a step of one token."""
        return None if step.num_tokens == 1 else Refusal(f"it has {step.num_tokens} tokens in a step")

    def decode(self, step: Step, query: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Store the step's token and attend with ``query`` ``[B, Hq, 1, D]``."""
        assert self.storage is not None
        pages = self._pages
        q, k, v = (x.transpose(1, 2) for x in autocast_inputs(query, step.k, step.v))
        num_pages = pages.num_pages(self.layer_idx)
        table = pages.block_table if self.block_table is None else self.block_table
        return self.storage.step((q, k, v), table, pages.seq_lens, num_pages, scale, self.window)

    def lse_of_all(self, query: Tensor, scale: float | None) -> Tensor:
        """After :meth:`decode`: the logarithm of the normalizer over all tokens, ``[B, 1, Hq]``."""
        assert self.storage is not None
        (query,) = autocast_inputs(query)
        table = self._pages.block_table if self.block_table is None else self.block_table
        return self.storage.lse_of_all(query.transpose(1, 2), table, self._pages.seq_lens, self.get_max_length(), scale)

    def gather(self, step: Step, refusal: Refusal) -> tuple[Tensor, Tensor]:
        """Dense attention in a step: there is none here."""
        raise NotImplementedError(self._pages.refusal(self.layer_idx, refusal.reason))


class StepPages(Cache):
    """A transformers cache on pages for steps of one token, in which nothing depends on what the host knows.

    Args:
        config: settings.
        windows: of each layer, tokens that a query sees, 0 for all.
        batch: rows.
        blocks_per_row: most blocks of a row.
        device: where lengths and block table are.
    """

    def __init__(
        self, config: UniqueConfig, windows: Sequence[int], batch: int, blocks_per_row: int, device: torch.device
    ) -> None:
        self.config = config
        self.layer_config = replace(config, dense_layers=())
        self.blocks_per_row = blocks_per_row
        self.max_length = blocks_per_row * config.block_size
        self.host_length = 0
        with torch.inference_mode(False):  # the cache may outlive the inference mode it began in
            self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
            self.block_table = torch.zeros(batch, blocks_per_row, dtype=torch.int32, device=device)
        self.static_layers = [StaticLayer(self, i, window) for i, window in enumerate(windows)]
        self.layers = list(self.static_layers)
        self.layer_class_to_replicate = None
        self.offloading = False

    def num_pages(self, layer_idx: int) -> int:
        """Pages that a layer reads: all that a query may see in one that is dense or has a window."""
        window, size = self.static_layers[layer_idx].window, self.config.page_size
        if layer_idx not in self.config.dense_layers and not window:
            return self.config.num_pages
        pages = self.blocks_per_row * self.config.block_size // size
        return min(pages, (window + 2 * size - 2) // size) if window else pages

    def refusal(self, layer_idx: int, reason: str) -> str:
        """The message for a layer that cannot decode on pages."""
        return f"layer {layer_idx} cannot decode on pages: {reason}"

    def counters(self) -> list[Tensor]:
        """Every tensor in which a step counts."""
        return [self.seq_lens]


class StaticPages(StepPages):
    """Pages of fixed size with a pool of their own.

    Args:
        config: settings.
        num_layers: layers of the model.
        batch: rows.
        max_length: tokens that a row can hold.
        device: where lengths and block table are.
        windows: of each layer, tokens that a query sees, 0 for all; all of them by default.
    """

    def __init__(
        self,
        config: UniqueConfig,
        num_layers: int,
        batch: int,
        max_length: int,
        device: torch.device,
        windows: Sequence[int] | None = None,
    ) -> None:
        super().__init__(config, windows or [0] * num_layers, batch, -(-max_length // config.block_size), device)
        self.max_length = max_length
        self.pool = SharedPool(num_blocks=batch * self.blocks_per_row, block_size=config.block_size)
        self.table: PagedTable | None = None
        with torch.inference_mode(False):
            self.offset = torch.zeros(batch, dtype=torch.long, device=device)  # of positions against tokens

    def refusal(self, layer_idx: int, reason: str) -> str:
        return not_on_pages(layer_idx, reason)

    def fill(self, dense: Any, padding: list[int]) -> None:
        """Begin with the keys and values of a filled ``DynamicCache``, of whose rows the first tokens are padding.

        Raises:
            NotImplementedError: a layer that holds something else than all keys and values.
        """
        for i, filled in enumerate(dense.layers):
            if filled.keys is None or filled.keys.shape != filled.values.shape:
                raise NotImplementedError(
                    not_on_pages(i, "its cache has no keys and values of one size (a latent one?)")
                )
        length = dense.get_seq_length()
        self.table = None  # gives its blocks back
        seqs = [self.pool.create() for _ in padding]
        self.table = PagedTable(self.pool, seqs, [length - pad for pad in padding], padding)
        self.pool.append_many(seqs, self.table.lengths)
        for layer, filled in zip(self.static_layers, dense.layers, strict=True):
            keys, values = filled.keys, filled.values
            (probe,) = autocast_inputs(keys[:, :, :0])
            keys, values = keys.to(probe.dtype), values.to(probe.dtype)
            if layer.storage is None:
                storage = BlockStorage.create(self.pool.num_blocks, keys, self.pool.block_size, self.config)
                layer.storage = LayerPages(self.pool, storage, self.config)
            layer.storage.write(keys, values, self.table, 0)
        self.seq_lens.copy_(self.table.seq_lens(self.seq_lens.device))
        self.offset.zero_()
        # Room up to the last token, so that the table never changes again.
        self.pool.append_many(seqs, [self.max_length - n for n in self.table.lengths])
        table = torch.from_numpy(self.pool.block_table(seqs, self.blocks_per_row))
        self.block_table.copy_(table)
        self.host_length = length

    @torch.no_grad()
    def adopt(self, caches: Sequence[tuple[Tensor, Tensor]], block_table: Tensor, length: int) -> None:
        """Begin with keys and values that are in blocks already: kept as they are, indexed, and appended to.

        Args:
            caches: of each layer, ``[num_blocks, H, block_size, D]`` each.
            block_table: int32 ``[B, blocks_per_row]``, with the blocks of tokens to come.
            length: tokens of every row.
        """
        self.table, self.host_length = None, length
        self.block_table.copy_(block_table)
        self.seq_lens.fill_(length)
        for layer, (k, v) in zip(self.static_layers, caches, strict=True):
            layer.storage = LayerPages(self.pool, BlockStorage.around(k, v, self.config), self.config)
            layer.storage.reindex(self.block_table, self.seq_lens, length)

    # ---- What a GraphedStep asks for. ----

    def advance(self) -> Tensor:
        """Count one more token in every row; the positions of these tokens, int64 ``[B, 1]``."""
        self.seq_lens.add_(1)
        return (self.seq_lens - 1 + self.offset)[:, None]


def windows_of(config: Any) -> list[int]:
    """Of each layer of a language model with this config, tokens that a query sees, 0 for all.

    Raises:
        NotImplementedError: a layer whose cache holds something else than keys and values of a window or of all tokens.
    """
    for i, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(not_on_pages(i, f"it is a layer of {kind}"))
    windows = []
    for i, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotImplementedError(not_on_pages(i, f"its cache is a {type(layer).__name__}"))
        windows.append(int(getattr(layer, "sliding_window", 0)))
    return windows


def not_on_pages(layer_idx: int, reason: str) -> str:
    """The message for a layer that cannot decode in captured steps."""
    return (
        f"layer {layer_idx} cannot decode on pages, and a GraphedDecoder has nothing else: {reason}. "
        "Use model.generate() without it"
    )
