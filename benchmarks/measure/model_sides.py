"""The sides of ``benchmarks model``: ways to attend in a decode step of one and the same Hugging Face model.

Every side is a cache that a :class:`GraphedStep` counts forward on the device, and the name of the attention
implementation that reads it. All of them put their keys and values into one :class:`Storage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import unique_attn
from benchmarks.measure import peers
from benchmarks.measure.inputs import Random
from benchmarks.measure.sweep import Shape, heads
from examples.support.results import DTYPES
from unique_attn import ops
from unique_attn.hf.compat import AttentionInterface, AttentionMaskInterface, Cache, CacheLayerMixin, sdpa_mask
from unique_attn.hf.graphed import StaticPages
from unique_attn.hf.step import StepCache

IMPLEMENTATION = "unique_attn_bench"  # in transformers' registry: the attention of the side at hand


def new_model(o: Shape, device: torch.device) -> Any:
    """A Llama of random weights, made on the device, in eval mode."""
    q_heads, kv_heads = heads(o.heads)
    config = transformers.LlamaConfig(
        vocab_size=o.vocab,
        hidden_size=o.hidden,
        intermediate_size=o.mlp,
        num_hidden_layers=o.layers,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        head_dim=o.head_dim,
        max_position_embeddings=max(o.context, 2048),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[o.dtype])
    torch.manual_seed(0)
    try:
        with device:
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def weights_bytes(o: Shape) -> int:
    """Weights of :func:`new_model`; a step reads each of them once (the embedding as the projection to logits)."""
    q_heads, kv_heads = heads(o.heads)
    attention = 2 * o.hidden * (q_heads + kv_heads) * o.head_dim
    layer = attention + 3 * o.hidden * o.mlp + 2 * o.hidden
    return int((o.layers * layer + o.vocab * o.hidden + o.hidden) * DTYPES[o.dtype].itemsize)


# ---- Keys and values. ----


class Storage:
    """Keys and values of ``o.context`` tokens in every row and layer, seen by each side in its own layout.

    What is in them is random, so that a change of the layout makes other random caches of the same memory;
    :meth:`fill` makes them equal for comparisons.
    """

    def __init__(self, o: Shape, device: torch.device) -> None:
        self.o = o
        self.kv_heads = heads(o.heads)[1]
        self.random = Random(device, DTYPES[o.dtype])
        size = o.batch * o.context * self.kv_heads * o.head_dim
        self.flat = [(self.random.normal(size), self.random.normal(size)) for _ in range(o.layers)]
        self.table = self.random.table(o.batch, o.context // o.block_size)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.itemsize for pair in self.flat for x in pair)

    def view(self, layout: str) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer.

        ``rows`` ``[B, H, context, D]``, ``hnd`` ``[blocks, H, block_size, D]`` or ``nhd16`` ``[blocks, 16, H, D]``.
        """
        o = self.o
        shape = {
            "rows": (o.batch, self.kv_heads, o.context, o.head_dim),
            "hnd": (-1, self.kv_heads, o.block_size, o.head_dim),
            "nhd16": (-1, peers.NHD_BLOCK, self.kv_heads, o.head_dim),
        }[layout]
        return [(k.view(shape), v.view(shape)) for k, v in self.flat]

    def blocks(self, layout: str) -> Tensor:
        """int32 ``[B, blocks of a row]``: the block table of a paged layout."""
        return self.table if layout == "hnd" else peers.nhd_table(self.table, self.o.block_size)

    def fill(self, layout: str) -> None:
        """Put the same tokens there as in any other layout, by a seed of their own."""
        o, random = self.o, Random(self.random.device, self.random.dtype, seed=1)
        for pair in self.view(layout):
            for target in pair:
                tokens = random.normal(o.batch, o.context, self.kv_heads, o.head_dim)
                if layout == "rows":
                    target.copy_(tokens.transpose(1, 2))
                    continue
                table = self.blocks(layout).long()
                parts = tokens.view(*table.shape, -1, self.kv_heads, o.head_dim)
                target[table] = parts.transpose(2, 3) if layout == "hnd" else parts


# ---- Sides. ----


class DecodeSide(ABC):
    """A way to attend. ``layout`` of the storage it reads, ``group`` of ways of which the fastest counts."""

    layout: str
    group: str

    def __init__(self, o: Shape) -> None:
        self.o = o

    def own_bytes(self) -> int:
        """What it allocates beside weights, keys and values."""
        return 0

    def attention_bytes(self) -> int:
        """Keys, values and index that a step must read in all layers."""
        o = self.o
        return int(o.layers * o.batch * heads(o.heads)[1] * o.context * 2 * o.head_dim * DTYPES[o.dtype].itemsize)

    @abstractmethod
    def cache(self, model: Any, storage: Storage, length: int) -> StepCache:
        """Have ``model`` attend this way, and return the cache to give it, with ``length`` tokens in every row."""


class Unique(DecodeSide):
    """Page-sparse attention with an index of one format."""

    layout = "hnd"

    def __init__(self, o: Shape, index_format: str) -> None:
        super().__init__(o)
        self.group = f"unique_{index_format}"
        self.config = unique_attn.UniqueConfig(
            rule=o.rule,
            page_size=o.page_size,
            budget=o.budget,
            block_size=o.block_size,
            index_format=index_format,
            dense_below=0,
        )

    def _entry_bytes(self) -> int:
        o = self.o
        return ops.index_entry_bytes(o.rule, o.head_dim, DTYPES[o.dtype], index_format=self.config.index_format)

    def own_bytes(self) -> int:
        o = self.o
        pages = o.layers * o.batch * heads(o.heads)[1] * (o.context // o.page_size)
        return int(pages * self._entry_bytes())

    def attention_bytes(self) -> int:
        o = self.o
        tokens = o.layers * o.batch * heads(o.heads)[1] * min(o.budget, o.context)
        return int(self.own_bytes() + tokens * 2 * o.head_dim * DTYPES[o.dtype].itemsize)

    def cache(self, model: Any, storage: Storage, length: int) -> StepCache:
        o = self.o
        unique_attn.enable(model, self.config)
        pages = StaticPages(self.config, o.layers, o.batch, o.context, storage.table.device)
        pages.adopt(storage.view(self.layout), storage.table, length)
        return pages


class Sdpa(DecodeSide):
    """torch SDPA over transformers' StaticCache, masked behind the last token.

    ``stock``: transformers' own function. Some versions of it repeat keys and values for every query head; without it,
    the query heads that share a KV head are handed over as rows, and nothing is copied.
    """

    layout = "rows"
    group = "sdpa"

    def __init__(self, o: Shape, stock: bool = False) -> None:
        super().__init__(o)
        self.stock = stock

    def cache(self, model: Any, storage: Storage, length: int) -> StepCache:
        cache = FilledStaticCache(model.config, self.o.context)
        cache.adopt(storage.view(self.layout), length)
        if self.stock:
            unique_attn.disable(model)
            model.set_attn_implementation("sdpa")
        else:
            attend_with(model, _grouped_sdpa, sdpa_mask)
        return cache


class FlashInfer(DecodeSide):
    """FlashInfer's batch decode over blocks, planned once for full blocks; lengths are counted on the device."""

    group = "flashinfer"

    def __init__(self, o: Shape, layout: str, tensor_cores: bool) -> None:
        super().__init__(o)
        self.layout, self.tensor_cores = layout, tensor_cores

    def own_bytes(self) -> int:
        return peers.WORKSPACE

    def cache(self, model: Any, storage: Storage, length: int) -> StepCache:
        o, table = self.o, storage.blocks(self.layout)
        block_size = o.context // table.shape[1]
        pages = PagedCache(storage.view(self.layout), self.layout, table, block_size, length)
        wrapper = peers.planned_for_graph(
            table,
            pages.last_page_len,
            "HND" if self.layout == "hnd" else "NHD",
            block_size,
            (*heads(o.heads), o.head_dim),
            DTYPES[o.dtype],
            self.tensor_cores,
        )

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
            out = wrapper.run(q.squeeze(2).contiguous(), (k, v))  # [B, Hq, D]
            return out[:, None], None

        attend_with(model, attend, lambda **kwargs: None)
        return pages


def new_sides(o: Shape, wanted: Sequence[str], index_formats: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Every way of the wanted sides that this machine has."""
    found: dict[str, Any] = {}
    if "unique" in wanted:
        found.update({f"unique_{name}": Unique(o, name) for name in index_formats})
    if "flashinfer" in wanted and peers.flashinfer(device) is not None:
        layouts = ["hnd"] + ["nhd16"] * (o.block_size % peers.NHD_BLOCK == 0)
        for layout in layouts:
            found[f"flashinfer_{layout}_tensor_cores"] = FlashInfer(o, layout, True)
            found[f"flashinfer_{layout}_cuda_cores"] = FlashInfer(o, layout, False)
    if "sdpa" in wanted:
        found["sdpa"] = Sdpa(o)
    return found


# ---- Caches and attention of the dense sides. ----


def attend_with(model: Any, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Have ``model`` use these functions for attention and its mask, through transformers' registries."""
    unique_attn.disable(model)
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
    model.set_attn_implementation(IMPLEMENTATION)


def _grouped_sdpa(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """One query token ``[B, Hq, 1, D]`` against ``[B, H, context, D]`` under a mask ``[B, 1, 1, context]``."""
    batch, q_heads, _, head_dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, head_dim)  # the group as rows
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, q_heads, head_dim), None


class FilledStaticCache(transformers.StaticCache):
    """transformers' StaticCache over keys and values that are there already.

    Raises:
        ValueError: this version of transformers does not count tokens on the device.
    """

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config=config, max_cache_len=length)
        self.static_layers: list[Any] = list(self.layers)
        if not all(isinstance(getattr(layer, "cumulative_length", None), Tensor) for layer in self.layers):
            raise ValueError(f"StaticCache of transformers {transformers.__version__} counts its tokens on the host")

    def adopt(self, caches: Sequence[tuple[Tensor, Tensor]], length: int) -> None:
        """Use keys and values ``[B, H, context, D]`` of each layer, of which ``length`` tokens count."""
        for layer, (k, v) in zip(self.static_layers, caches, strict=True):
            layer.lazy_initialization(k[:0], v[:0])
            layer.batch_size, layer.keys, layer.values = len(k), k, v
            layer.cumulative_length.fill_(length)
        self.batch = len(caches[0][0])

    def advance(self) -> Tensor:
        """Positions ``[B, 1]``; the layers count by themselves."""
        return self.static_layers[0].cumulative_length.expand(self.batch, 1).clone()

    def counters(self) -> list[Tensor]:
        return [layer.cumulative_length for layer in self.static_layers]


class PagedLayer(CacheLayerMixin):
    """One layer of a :class:`PagedCache`: stores a step's token and returns the whole blocks."""

    is_compileable = is_sliding = False

    def __init__(self, cache: PagedCache, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.is_initialized = True
        self.cache, self.k, self.v = cache, k, v
        # append_kv takes [blocks, H, block_size, D] in any strides
        self._paged = (k, v) if cache.layout == "hnd" else (k.transpose(1, 2), v.transpose(1, 2))

    def lazy_initialization(self, *args: Any) -> None:
        """Storage is there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values ``[B, H, 1, D]``."""
        assert self.cache.slots is not None
        ops.append_kv(key_states[:, :, 0], value_states[:, :, 0], *self._paged, self.cache.slots)
        return self.k, self.v

    def get_seq_length(self, *args: Any) -> int:
        return self.cache.length

    def get_mask_sizes(self, query: Any, *args: Any) -> tuple[int, int]:
        return self.cache.length + 1, 0

    def get_max_length(self, *args: Any) -> int:
        return self.cache.max_length

    get_max_cache_shape = get_max_length


class PagedCache(Cache):
    """Keys and values in blocks for a dense peer. Rows grow in their last blocks, which the device counts."""

    def __init__(
        self, caches: Sequence[tuple[Tensor, Tensor]], layout: str, table: Tensor, block_size: int, length: int
    ) -> None:
        self.layout, self.table, self.block_size = layout, table, block_size
        self.length, self.max_length = length, table.shape[1] * block_size
        before = self.max_length - block_size
        if not before <= length < self.max_length:
            raise ValueError(f"length: expected a last block that is begun, {before} or more tokens, got {length}")
        self.full_tokens = before
        self.last_page_len = torch.full((len(table),), length - before, dtype=torch.int32, device=table.device)
        self.slots: Tensor | None = None  # int64 [B]: where this step's tokens go
        self.layers = [PagedLayer(self, k, v) for k, v in caches]
        self.layer_class_to_replicate = None
        self.offloading = False

    def advance(self) -> Tensor:
        """Positions ``[B, 1]``; finds the step's slots for all layers."""
        last = self.last_page_len.long()
        self.slots = self.table[:, -1].long() * self.block_size + last
        self.last_page_len.add_(1)
        return (last + self.full_tokens)[:, None]

    def counters(self) -> list[Tensor]:
        return [self.last_page_len]
