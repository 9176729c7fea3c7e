"""Texts read densely, whose last tokens are decoded on chosen pages: all of them in one forward.

Decoding token by token, a layer's query, key and value follow from what the layers below gave for the same token, and
its attention from the keys up to that token. So a forward over the last tokens whose attention treats every token as a
sequence of its own, with its own length and its own pages, is teacher-forced decoding exactly; no token sees a page
entry that its own step would not have had, because the pages before its own are complete. Attention over the chosen
pages is ``sparse_decode``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure.page_choice import BLOCK, SCORES, Setting, Step, choose
from benchmarks.measure.real_keys import attending
from unique_attn import ops

See = Callable[[int, Step], object]  # is given the layer


@dataclass
class _Layer:
    """Keys and values ``[samples, N, H, D]`` of one layer: all tokens, or the last of a sliding window."""

    k: Tensor
    v: Tensor
    start: int  # position of the first
    window: int  # 0 for full attention


@dataclass(frozen=True)
class Decoded:
    """What a forward over the last tokens gave.

    Attributes:
        logits: ``[samples, keep, vocabulary]`` after the last tokens.
        mass: by layer, the share of all tokens' softmax that the chosen pages hold, ``[samples, T, Hq]``, for the
            queries of this forward; empty if it was not asked for.
    """

    logits: Tensor
    mass: Mapping[int, Tensor]


class TailBatch:
    """Texts of equal length that were read densely, and everything needed to decode their last tokens again.

    Attributes:
        ids: int64 ``[samples, n]`` on the device of the model.
        tail: last tokens, T, that are decoded.
        keep: how many of them have logits.
        dense: logits ``[samples, keep, vocabulary]`` of dense attention.
        full_layers: layers without a sliding window.
    """

    def __init__(self, model: Any, ids: Tensor, tail: int, keep: int | None = None) -> None:
        """Read ``ids`` ``[samples, n]``.

        Raises:
            ValueError: the tail, or what is kept of it, is longer than the text; a model with another attention.
        """
        if not 1 <= tail < ids.shape[1]:
            raise ValueError(f"tail: expected 1 to {ids.shape[1] - 1} tokens of texts of {ids.shape[1]}, got {tail}")
        keep = tail if keep is None else keep
        if not 1 <= keep <= tail:
            raise ValueError(f"keep: expected 1 to {tail} of the last tokens, got {keep}")
        self.model, self.tail, self.keep = model, tail, keep
        self.ids = ids.to(model.device)
        self._layers: dict[int, _Layer] = {}
        self.dense = torch.cat([self._read(sample) for sample in range(len(ids))])

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def full_layers(self) -> list[int]:
        return sorted(number for number, layer in self._layers.items() if not layer.window)

    def bytes_read(self, setting: Setting | None, layer: int) -> tuple[int, int]:
        """Bytes that a decode step behind a whole text reads in a layer of full attention: those of keys and values,
        and those of index entries. None and dense layers read no index.

        Raises:
            ValueError: the score has no index, so that there is no saying what it reads.
        """
        kept = self._layers[layer]
        heads, head_dim = kept.k.shape[2:]
        token = heads * (head_dim + kept.v.shape[3]) * kept.k.itemsize
        if setting is None or layer in setting.dense_layers:
            return self.tokens * token, 0
        rule = SCORES[setting.score].index_rule
        if rule is None:
            raise ValueError(f"setting: expected a score with an index, got {setting.score}")
        entry = ops.index_entry_bytes(rule, head_dim, kept.k.dtype, setting.index_format)
        pages = -(-self.tokens // setting.page_size)
        return min(setting.of_layer(layer).budget, self.tokens) * token, heads * pages * entry

    # ---- Dense reading. ----

    @torch.inference_mode()
    def _read(self, sample: int) -> Tensor:
        """Logits ``[1, keep, vocabulary]``; keeps what later forwards need of keys and values."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            for name in ("softcap", "s_aux"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"model: expected attention that is softmax(scale * q k) v, got one with {name}")
            self._store(module.layer_idx, sample, k, v, int(kwargs.get("sliding_window") or 0))
            return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

        with attending(self.model, attention):
            logits: Tensor = self.model(self.ids[sample : sample + 1], use_cache=False, logits_to_keep=self.keep).logits
        return logits

    def _store(self, number: int, sample: int, k: Tensor, v: Tensor, window: int) -> None:
        """Keep keys and values ``[1, H, n, D]`` of the tokens before the tail, with room for the tail."""
        before = self.tokens - self.tail
        start = max(0, before - window + 1) if window else 0
        if number not in self._layers:
            room = self.tokens - start if window else -(-self.tokens // BLOCK) * BLOCK
            k_all, v_all = (x.new_zeros(len(self.ids), room, x.shape[1], x.shape[3]) for x in (k, v))
            self._layers[number] = _Layer(k_all, v_all, start, window)
        layer = self._layers[number]
        for kept, new in ((layer.k, k), (layer.v, v)):
            kept[sample, : before - start] = new[0, :, start:before].transpose(0, 1)

    # ---- Decoding. ----

    @torch.inference_mode()
    def decode(self, setting: Setting | None, *, mass: bool = False, see: See | None = None, seed: int = 0) -> Decoded:
        """Decode the tail.

        Args:
            setting: the pages that layers of full attention read; None for dense attention, by the same way.
            mass: also measure what the pages hold.
            see: called with every layer of full attention and its inputs.
            seed: of random scores.
        """
        generator = torch.Generator(self.ids.device).manual_seed(seed)
        kept: dict[int, Tensor] = {}

        def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            layer = self._layers[module.layer_idx]
            at = self.tokens - self.tail - layer.start
            for all_, new in ((layer.k, k), (layer.v, v)):
                all_[:, at : at + self.tail] = new.transpose(1, 2)
            scale = float(kwargs.get("scaling") or q.shape[-1] ** -0.5)
            if layer.window:
                return self._dense(layer, q, scale), None
            of_layer = (setting or Setting()).of_layer(module.layer_idx)
            step = Step(q.transpose(1, 2), layer.k, layer.v, self.tokens, scale, of_layer, generator)
            if see is not None:
                see(module.layer_idx, step)
            if setting is None or module.layer_idx in setting.dense_layers:
                return self._dense(layer, q, scale), None
            paged = (step.paged(layer.k), step.paged(layer.v))
            out, lse = ops.sparse_decode(
                step.row_queries, *paged, choose(step), **step.rows, page_size=setting.page_size, scale=scale
            )
            if mass:
                kept[module.layer_idx] = (lse.unflatten(0, (len(self.ids), -1))[:, :, 0] - step.lse).exp()
            return out.unflatten(0, (len(self.ids), -1))[:, :, 0], None

        positions = torch.arange(self.tokens - self.tail, self.tokens, device=self.ids.device)
        with attending(self.model, attention):
            out = self.model(
                self.ids[:, -self.tail :],
                position_ids=positions.expand(len(self.ids), -1),
                use_cache=False,
                logits_to_keep=self.keep,
            )
        return Decoded(out.logits, kept)

    def _dense(self, layer: _Layer, q: Tensor, scale: float) -> Tensor:
        """``[samples, T, Hq, D]`` over all keys that each of the last tokens sees; queries ``[samples, Hq, T, D]``."""
        count = self.tokens - layer.start
        key = torch.arange(layer.start, self.tokens, device=q.device)
        query = torch.arange(self.tokens - self.tail, self.tokens, device=q.device)[:, None]
        seen = key <= query
        if layer.window:
            seen &= key > query - layer.window
        k, v = (x[:, :count].transpose(1, 2) for x in (layer.k, layer.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)
