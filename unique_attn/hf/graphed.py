"""Decoding with a fixed place for everything: one step of a model, captured once in a CUDA graph and replayed."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from unique_attn.config import UniqueConfig
from unique_attn.hf.cache import UniqueCache
from unique_attn.hf.compat import cache_argument
from unique_attn.hf.generate import decoding_loop, prompt_arguments, streamer_of_caller
from unique_attn.hf.hooks import KEEPS, attention_modules, hook_of, language_config
from unique_attn.hf.static_pages import StaticPages, windows_of
from unique_attn.hf.step import GraphedStep, Sampler, greedy, sampler
from unique_attn.hf.unchanged import Unchanged
from unique_attn.rules import MAX_PAGES

__all__ = ["GraphedDecoder", "StaticPages", "greedy", "sampler"]

Method = TypeVar("Method", bound=Callable[..., Tensor])


def _alone(method: Method) -> Method:
    """A method of a decoder that another thread must not call meanwhile."""

    @wraps(method)
    def locked(self: GraphedDecoder, *args: Any, **kwargs: Any) -> Tensor:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("GraphedDecoder: expected one thread at a time, got a second one: make one for each")
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            self._lock.release()

    return locked  # type: ignore[return-value]


class GraphedDecoder:
    """Decode steps of a model that ``unique_attn.enable`` prepared, without work for the host between them.

    One step (embedding, all layers with page-sparse attention, logits, sampling) runs over static buffers; on CUDA it
    is captured in a graph after the first prefill and replayed for every token, on the CPU it runs as it is. Lengths
    stay on the device, so the same graph serves every length up to ``max_length``. Prefill is not captured.

    Three ways to use it: :meth:`generate`, in which the host seldom waits for the device; ``model.generate(...,
    custom_generate=decoder)``, for what transformers' generation offers; :meth:`prefill` and :meth:`step`.

    A decoder holds one batch at a time, so each thread needs one of its own (of the same model, if you like).

    The model's weights must stay where they are (other values in the same place are fine), and the model enabled: a
    call after either has changed raises. Layers with a sliding window read the pages of their window. What cannot run
    on pages (caches of other kinds than one of keys and values, softcap) raises, here or in the first :meth:`prefill`.

    Args:
        model: an enabled causal language model on one device, in eval mode while it decodes.
        batch: rows of every prompt.
        max_length: most tokens of a row, prompt and new ones.
        config: settings; those of ``enable`` if None.
        sample: next tokens ``[B]`` from logits ``[B, vocabulary]``; greedy by default. On CUDA it is captured too.

    Raises:
        TypeError: ``model`` was not enabled, or another argument of the wrong type.
        ValueError: a number out of range, naming the argument, or a model on several devices or without a device.
        NotImplementedError: a model of which no layer can be sparse, or layers whose cache is of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        max_length: int,
        config: UniqueConfig | None = None,
        sample: Sampler = greedy,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a model from unique_attn.enable(), got {type(model).__name__}")
        if config is not None and not isinstance(config, UniqueConfig):
            raise TypeError(f"config: expected a UniqueConfig or None, got {type(config).__name__}")
        modules = attention_modules(model)
        hook = hook_of(modules[0]) if modules else None
        if hook is None and KEEPS in vars(model):
            raise NotImplementedError(f"model: expected one with layers that can be sparse, but {vars(model)[KEEPS]}")
        if hook is None:
            raise TypeError(f"model: expected a model from unique_attn.enable(), got {type(model).__name__}")
        for name, value in (("batch", batch), ("max_length", max_length)):
            if not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) != 1:
            raise ValueError(f"model: expected all weights on one device, got {', '.join(devices) or 'none'}")
        if devices == ["meta"]:
            raise ValueError("model: expected weights on a device, got meta tensors (offloaded, or not loaded)")
        self.model = model
        self.config = hook.config if config is None else config
        self.device = torch.device(devices[0])
        windows = windows_of(language_config(model))
        self.cache = StaticPages(self.config, len(windows), batch, max_length, self.device, windows)
        most = max((self.cache.num_pages(i) for i in range(len(windows))), default=0)
        if most > MAX_PAGES:
            raise ValueError(
                f"max_length: expected at most {MAX_PAGES * self.config.page_size} tokens with dense_layers or windows "
                f"as long, got {max_length}"
            )
        self._step = GraphedStep(model, self.cache, batch, sample)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._unchanged = Unchanged(model)
        self._lock = threading.RLock()
        self._ready = False  # a prefill and all steps since are complete

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("GraphedDecoder: a copy would share its graph and its storage: make another one")

    @property
    def tokens(self) -> Tensor:
        """int64 ``[B, 1]``: the last token of each row."""
        return self._step.tokens

    @property
    def logits(self) -> Tensor | None:
        """``[B, vocabulary]`` of the last step or prefill; None before the first."""
        return self._step.logits

    @_alone
    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Start with prompts; returns the first new token ``[B, 1]``.

        Args:
            input_ids: int64 ``[B, L]``, L below ``max_length``.
            attention_mask: ``[B, L]`` with 0 for left padding, or None.
            position_ids: int64 ``[B, L]``, from which new tokens count on; None for 0, 1, ... behind the padding.

        Raises:
            ValueError: a wrong shape, a prompt without room for a token, or padding that is not on the left.
            RuntimeError: the model is no longer as it was when the decoder was made.
            NotImplementedError: a layer that cannot run on pages.
        """
        self._unchanged.check()
        batch, length = self.tokens.shape[0], input_ids.shape[-1]
        if input_ids.dim() != 2 or input_ids.shape[0] != batch or length == 0:
            raise ValueError(f"input_ids: expected shape [{batch}, length], got {list(input_ids.shape)}")
        if length >= self.cache.max_length:
            raise ValueError(
                f"input_ids: expected fewer than max_length = {self.cache.max_length} tokens, got {length}"
            )
        padding = _left_padding(attention_mask, input_ids)
        if position_ids is None:
            shown = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            position_ids = (shown.cumsum(-1) - 1).clamp(min=0)
        elif position_ids.shape != input_ids.shape:
            raise ValueError(
                f"position_ids: expected shape {list(input_ids.shape)}, got {list(position_ids.shape)}: a "
                "GraphedDecoder counts one position for each token"
            )
        self._ready = False
        dense = UniqueCache(self.config)  # without the model's: layers with a window keep all keys too, as pages do
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits else {}
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
        options[cache_argument(self.model) or "past_key_values"] = dense
        logits = self.model(input_ids, position_ids=position_ids, use_cache=True, **options).logits[:, -1]
        self.cache.fill(dense, padding)
        self.cache.offset.copy_(position_ids[:, -1] + 1 - self.cache.seq_lens)
        self._step.keep(logits)
        self.tokens.copy_(self._step.sample(logits)[:, None])
        self._step.capture()
        self._ready = True
        return self.tokens

    @_alone
    def step(self) -> Tensor:
        """Decode one token for every row; returns it, ``[B, 1]``, in a buffer that the next step overwrites.

        Raises:
            RuntimeError: before :meth:`prefill` or after a step that failed, with ``max_length`` tokens reached, or the
                model is no longer as it was when the decoder was made.
        """
        if not self._ready:
            why = "" if self.logits is None else ", as the last prefill() or step() was interrupted"
            raise RuntimeError(f"step: expected a prefill() before it{why}")
        if self.cache.host_length >= self.cache.max_length:
            raise RuntimeError(f"step: max_length = {self.cache.max_length} tokens are reached")
        self._unchanged.check()
        self._ready = False  # the device may have counted a step that fails further on
        self._step.run()
        self.cache.host_length += 1
        self._ready = True
        return self.tokens

    @_alone
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | Tensor | None = None,
        check_every: int = 16,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """Prompts and new tokens ``[B, L + n]``, n up to ``max_new_tokens``.

        Args:
            input_ids: int64 ``[B, L]``.
            max_new_tokens: at least 1.
            attention_mask: ``[B, L]`` with 0 for left padding, or None.
            eos_token_id: the token, or tokens, after which a row has ended; None for none.
            check_every: steps after which it is looked at whether all rows have ended, the only time that the host
                waits for the device.
            pad_token_id: fills rows that have ended; by default what the model's ``generation_config`` says, else the
                first ``eos_token_id``.

        Raises:
            ValueError: as :meth:`prefill`, or more tokens than fit.
        """
        length = input_ids.shape[-1]
        if max_new_tokens < 1 or length + max_new_tokens > self.cache.max_length + 1:
            raise ValueError(
                f"max_new_tokens: expected 1 to {self.cache.max_length + 1 - length} (max_length = "
                f"{self.cache.max_length}), got {max_new_tokens}"
            )
        if check_every < 1:
            raise ValueError(f"check_every: expected at least 1, got {check_every}")
        ends = [] if eos_token_id is None else torch.as_tensor(eos_token_id).reshape(-1).tolist()
        if pad_token_id is None:
            pad_token_id = getattr(getattr(self.model, "generation_config", None), "pad_token_id", None)
        pad = (ends[0] if ends else 0) if pad_token_id is None else pad_token_id
        new = [self.prefill(input_ids, attention_mask).clone()]
        eos = torch.tensor(ends, dtype=torch.long, device=self.device)
        ended = torch.isin(new[0], eos)
        for i in range(1, max_new_tokens):
            if ends and i % check_every == 0 and bool(ended.all()):
                break
            new.append(self.step().masked_fill(ended, pad))
            ended |= torch.isin(new[-1], eos)
        out = torch.cat(new, 1)
        return torch.cat([input_ids, _until_all_ended(out, eos) if ends else out], 1)

    @_alone
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

        A streamer gets every token.

        Raises:
            ValueError: another model, beams, a dictionary as output, a cache that holds tokens, more tokens than fit,
                an assistant, or an input beside text (images, sound, embeddings), naming it.
        """
        if model is not self.model:
            raise ValueError("model: expected the model that the GraphedDecoder was made for, got another one")
        mask, positions = prompt_arguments(model_kwargs)
        streamer = streamer_of_caller()
        return decoding_loop(
            self, input_ids, logits_processor, stopping_criteria, generation_config, mask, positions, streamer
        )


def _left_padding(mask: Tensor | None, input_ids: Tensor) -> list[int]:
    if mask is None:
        return [0] * input_ids.shape[0]
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(input_ids.shape)}, got {list(mask.shape)}")
    shown = mask.bool()
    if not bool(shown.any(-1).all()):
        raise ValueError("attention_mask: expected a token that is shown in every row, got a row of padding alone")
    if not bool((shown[:, 1:] >= shown[:, :-1]).all()) or not bool(shown[:, -1].all()):
        raise ValueError("attention_mask: expected padding on the left only, got hidden tokens behind shown ones")
    return [int(n) for n in (~shown).sum(-1).tolist()]


def _until_all_ended(new: Tensor, eos: Tensor) -> Tensor:
    """``new`` ``[B, n]`` without the columns in which every row has ended already."""
    ended = torch.isin(new, eos).long().cumsum(-1) > 0
    columns = int((~ended.all(0)).sum().item()) + 1
    return new[:, :columns]
