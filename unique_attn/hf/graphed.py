"""Decoding with a fixed place for everything: one step of a model, captured once in a CUDA graph and replayed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unique_attn._runtime import PagePool
from unique_attn.cache import Call
from unique_attn.config import MAX_PAGES, UniqueConfig
from unique_attn.decode import LayerPages, PagedTable
from unique_attn.hf.compat import Cache, CacheLayerMixin, DynamicCache
from unique_attn.hf.generate import decoding_loop
from unique_attn.hf.hooks import attention_modules, hook_of
from unique_attn.hf.step import GraphedStep, Sampler, greedy, sampler

__all__ = ["GraphedDecoder", "StaticPages", "greedy", "sampler"]


class StaticLayer(CacheLayerMixin):
    """One layer of a :class:`StaticPages`: what the hook and the attention function expect of a cache layer.

    Its storage never moves, and the number of tokens in it is known to the device alone.
    """

    on_pages = True
    lost_graph = False
    is_compileable = is_sliding = False

    def __init__(self, pages: StaticPages, layer_idx: int) -> None:
        super().__init__()
        self.is_initialized = True
        self.state = pages
        self.layer_idx = layer_idx
        self.storage: LayerPages | None = None  # since the first prefill
        self.returned: tuple[Tensor, Tensor] | None = None
        self._new: tuple[Tensor, Tensor] | None = None

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[B]``: tokens of each row, the step's included."""
        return self.state.seq_lens

    @property
    def awaits_decode(self) -> bool:
        return self._new is not None

    def lazy_initialization(self, *args: Any) -> None:
        """Storage comes with the first prefill."""

    def announce(self, call: Call | None) -> None:
        """Nothing to prepare: every call is a decode step."""
        self.returned = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values ``[B, H, 1, D]`` of a step; :meth:`decode` stores them."""
        self._new = self.returned = (key_states, value_states)
        return self.returned

    def decode(self, q: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Store the step's token and attend with ``q`` ``[B, 1, Hq, D]``: ``out``, ``lse`` and the ``pages`` read."""
        assert self._new is not None
        assert self.storage is not None
        (k, v), self._new = self._new, None
        state, pages = self.state, self.state.num_pages(self.layer_idx)
        new = (q, k.transpose(1, 2), v.transpose(1, 2))
        return self.storage.step(new, state.block_table, state.seq_lens, pages, scale)

    def gather(self) -> tuple[Tensor, Tensor]:
        """Dense attention in a step: there is none here."""
        raise NotImplementedError(
            f"layer {self.layer_idx} cannot decode on pages (a sliding window, attention weights asked for, or a kind "
            "of attention that the ops do not compute): use model.generate()"
        )

    def get_seq_length(self, *args: Any) -> int:
        """Tokens of the longest row, as far as the host knows."""
        return self.state.host_length

    def get_mask_sizes(self, query: Any, *args: Any) -> tuple[int, int]:
        """(keys, offset) of a step's mask, of which only its absence matters."""
        return self.state.host_length + 1, 0

    def get_max_length(self, *args: Any) -> int:
        """Tokens that a row can hold."""
        return self.state.max_length

    get_max_cache_shape = get_max_length  # its name before transformers 5


class StaticPages(Cache):
    """A transformers cache of fixed size on pages, for decode steps of one token whose lengths live on the device.

    Args:
        config: settings.
        num_layers: layers of the model.
        batch: rows.
        max_length: tokens that a row can hold.
        device: where lengths and block table are.
    """

    is_static_pages = True

    def __init__(
        self, config: UniqueConfig, num_layers: int, batch: int, max_length: int, device: torch.device
    ) -> None:
        self.config = config
        self.max_length = max_length
        self.host_length = 0
        size = config.block_size
        self.blocks_per_row = -(-max_length // size)
        self.pool = PagePool(num_blocks=batch * self.blocks_per_row, block_size=size)
        self.table: PagedTable | None = None
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(batch, self.blocks_per_row, dtype=torch.int32, device=device)
        self.static_layers = [StaticLayer(self, i) for i in range(num_layers)]
        self.layers = list(self.static_layers)
        self.layer_class_to_replicate = None
        self.offloading = False

    def num_pages(self, layer_idx: int) -> int:
        """Pages that a layer reads: all that a row can have in a dense layer."""
        if layer_idx not in self.config.dense_layers:
            return self.config.num_pages
        return self.blocks_per_row * self.config.block_size // self.config.page_size

    def fill(self, dense: Any, padding: list[int]) -> None:
        """Begin with the keys and values of a filled ``DynamicCache``, of whose rows the first tokens are padding."""
        length = dense.get_seq_length()
        self.table = None  # gives its blocks back
        seqs = [self.pool.create() for _ in padding]
        self.table = PagedTable(self.pool, seqs, [length - pad for pad in padding], padding)
        self.pool.append_many(seqs, self.table.lengths)
        for layer, filled in zip(self.static_layers, dense.layers, strict=True):
            if layer.storage is None:
                layer.storage = LayerPages(self.pool, filled.keys, self.config)
            layer.storage.write(filled.keys, filled.values, self.table, 0)
        self.seq_lens.copy_(self.table.seq_lens(self.seq_lens.device))
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
            layer.storage = LayerPages(self.pool, k, self.config, storage=(k, v))
            layer.storage.reindex(self.block_table, self.seq_lens, length)

    # ---- What a GraphedStep asks for. ----

    def advance(self) -> Tensor:
        """Count one more token in every row; the positions of these tokens, int64 ``[B, 1]``."""
        self.seq_lens.add_(1)
        return (self.seq_lens - 1).long()[:, None]

    def counters(self) -> list[Tensor]:
        """The lengths."""
        return [self.seq_lens]


class GraphedDecoder:
    """Decode steps of a model that ``unique_attn.enable`` prepared, without work for the host between them.

    One step (embedding, all layers with page-sparse attention, logits, sampling) runs over static buffers; on CUDA it
    is captured in a graph after the first prefill and replayed for every token, on the CPU it runs as it is. Lengths
    stay on the device, so the same graph serves every length up to ``max_length``. Prefill is dense and not captured.

    Three ways to use it: :meth:`generate`, in which the host seldom waits for the device; ``model.generate(...,
    custom_generate=decoder)``, for what transformers' generation offers; :meth:`prefill` and :meth:`step`.

    The model's weights must stay where they are; after loading others or another dtype, make a new decoder.

    Args:
        model: an enabled causal language model, in eval mode while it decodes.
        batch: rows of every prompt.
        max_length: most tokens of a row, prompt and new ones.
        config: settings; those of ``enable`` if None.
        sample: next tokens ``[B]`` from logits ``[B, vocabulary]``; greedy by default. On CUDA it is captured too.

    Raises:
        TypeError: ``model`` was not enabled.
        ValueError: a number out of range, naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        max_length: int,
        config: UniqueConfig | None = None,
        sample: Sampler = greedy,
    ) -> None:
        modules = attention_modules(model)
        hook = hook_of(modules[0]) if modules else None
        if hook is None:
            raise TypeError(f"model: expected a model from unique_attn.enable(), got {type(model).__name__}")
        for name, value in (("batch", batch), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.model = model
        self.config = hook.config if config is None else config
        self.device = next(model.parameters()).device
        self.cache = StaticPages(self.config, len(modules), batch, max_length, self.device)
        most = max((self.cache.num_pages(i) for i in range(len(modules))), default=0)
        if most > MAX_PAGES:
            raise ValueError(
                f"max_length: expected at most {MAX_PAGES * self.config.page_size} tokens with dense_layers, "
                f"got {max_length}"
            )
        self._step = GraphedStep(model, self.cache, batch, sample)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def tokens(self) -> Tensor:
        """int64 ``[B, 1]``: the last token of each row."""
        return self._step.tokens

    @property
    def logits(self) -> Tensor | None:
        """``[B, vocabulary]`` of the last step or prefill; None before the first."""
        return self._step.logits

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Start with prompts, dense; returns the first new token ``[B, 1]``.

        Args:
            input_ids: int64 ``[B, L]``, L below ``max_length``.
            attention_mask: ``[B, L]`` with 0 for left padding, or None.

        Raises:
            ValueError: a wrong shape, a prompt without room for a token, or padding that is not on the left.
        """
        batch, length = self.tokens.shape[0], input_ids.shape[-1]
        if input_ids.dim() != 2 or input_ids.shape[0] != batch or length == 0:
            raise ValueError(f"input_ids: expected shape [{batch}, length], got {list(input_ids.shape)}")
        if length >= self.cache.max_length:
            raise ValueError(
                f"input_ids: expected fewer than max_length = {self.cache.max_length} tokens, got {length}"
            )
        padding = _left_padding(attention_mask, input_ids)
        dense = DynamicCache()
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits else {}
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = self.model(input_ids, past_key_values=dense, use_cache=True, **options).logits[:, -1]
        self.cache.fill(dense, padding)
        self._step.keep(logits)
        self.tokens.copy_(self._step.sample(logits)[:, None])
        self._step.capture()
        return self.tokens

    @torch.no_grad()
    def step(self) -> Tensor:
        """Decode one token for every row; returns it, ``[B, 1]``, in a buffer that the next step overwrites.

        Raises:
            RuntimeError: before :meth:`prefill`, or with ``max_length`` tokens reached.
        """
        if self.logits is None:
            raise RuntimeError("step: expected a prefill() before it")
        if self.cache.host_length >= self.cache.max_length:
            raise RuntimeError(f"step: max_length = {self.cache.max_length} tokens are reached")
        self._step.run()
        self.cache.host_length += 1
        return self.tokens

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        eos_token_id: int | None = None,
        check_every: int = 16,
    ) -> Tensor:
        """Prompts and new tokens ``[B, L + n]``, n up to ``max_new_tokens``.

        Rows that reached ``eos_token_id`` repeat it. Whether all did is looked at every ``check_every`` steps, the
        only time that the host waits for the device.

        Raises:
            ValueError: as :meth:`prefill`, or more tokens than fit.
        """
        length = input_ids.shape[-1]
        if max_new_tokens < 1 or length + max_new_tokens > self.cache.max_length + 1:
            raise ValueError(
                f"max_new_tokens: expected 1 to {self.cache.max_length + 1 - length} (max_length = "
                f"{self.cache.max_length}), got {max_new_tokens}"
            )
        new = [self.prefill(input_ids, attention_mask).clone()]
        ended = torch.zeros_like(new[0], dtype=torch.bool)
        for i in range(1, max_new_tokens):
            if eos_token_id is not None:
                ended |= new[-1] == eos_token_id
                if i % check_every == 0 and bool(ended.all()):
                    break
            token = self.step().clone()
            new.append(token if eos_token_id is None else token.masked_fill(ended, eos_token_id))
        out = torch.cat([input_ids, *new], 1)
        return out if eos_token_id is None else _until_all_ended(out, length, eos_token_id)

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """The decoding loop of ``model.generate(..., custom_generate=decoder)``.

        ``generate`` prepares the settings, logits processors and stopping criteria as always; greedy and sampling. The
        next token is chosen by it, outside the graph, and the host looks after every token whether to stop.

        Raises:
            ValueError: another model, beams, a dictionary as output, a cache that holds tokens, more tokens than fit.
        """
        if model is not self.model:
            raise ValueError("model: expected the model that the GraphedDecoder was made for, got another one")
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"past_key_values: expected no tokens in it, got {cache.get_seq_length()}")
        mask = model_kwargs.get("attention_mask")
        return decoding_loop(self, input_ids, logits_processor, stopping_criteria, generation_config, mask)


def _left_padding(mask: Tensor | None, input_ids: Tensor) -> list[int]:
    if mask is None:
        return [0] * input_ids.shape[0]
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(input_ids.shape)}, got {list(mask.shape)}")
    shown = mask.bool()
    if not bool((shown[:, 1:] >= shown[:, :-1]).all()) or not bool(shown[:, -1].all()):
        raise ValueError("attention_mask: expected padding on the left only, got hidden tokens behind shown ones")
    return [int(n) for n in (~shown).sum(-1).tolist()]


def _until_all_ended(out: Tensor, length: int, eos: int) -> Tensor:
    """``out`` without the columns in which every row has ended already."""
    ended = (out[:, length:] == eos).long().cumsum(-1) > 0
    columns = int((~ended.all(0)).sum().item()) + 1
    return out[:, : length + columns]
