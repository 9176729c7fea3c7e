"""The decoding loop that ``model.generate`` runs when it is given a GraphedDecoder."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unique_attn.hf.cache import state_of
from unique_attn.hf.compat import Cache, GenerationMixin

if TYPE_CHECKING:
    from unique_attn.hf.graphed import GraphedDecoder

#: Settings of ``generate`` that ask for another loop than a :class:`GraphedDecoder`'s, or for a prompt in pieces.
NOT_DONE = ("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")


def decoding_loop(
    decoder: GraphedDecoder,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    streamer: Any = None,
) -> Tensor:
    """Prompts and new tokens ``[B, L + n]``: what transformers' own loop does, with the decoder's steps.

    Args:
        decoder: whose sampler is not used here.
        input_ids: int64 ``[B, L]``.
        logits_processor, stopping_criteria, generation_config: as ``generate`` prepared them.
        attention_mask: ``[B, L]`` with 0 for left padding, or None.
        position_ids: ``[B, L]`` or None.
        streamer: is given every new token, if not None.

    Raises:
        ValueError: something asked for that the loop does not do, or more tokens than fit.
    """
    config, most = generation_config, decoder.cache.max_length + 1
    plain_values = {"num_beams": 1, "return_dict_in_generate": False, "use_cache": True, **dict.fromkeys(NOT_DONE)}
    for name, plain in plain_values.items():
        value = getattr(config, name, None)
        if value not in (None, plain):
            raise ValueError(f"{name}: expected {plain} with a GraphedDecoder, got {value}")
    if config.max_length > most:
        raise ValueError(f"max_new_tokens: expected at most {most} tokens with the prompt, got {config.max_length}")
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    decoder.prefill(input_ids, attention_mask, position_ids)
    while True:
        assert decoder.logits is not None
        scores = logits_processor(input_ids, decoder.logits.to(torch.float32, copy=True))
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if ends:
            tokens = torch.where(unfinished, tokens, config._pad_token_tensor)
        input_ids = torch.cat([input_ids, tokens[:, None]], 1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished &= ~stopping_criteria(input_ids, None)
        if not bool(unfinished.any()):
            if streamer is not None:
                streamer.end()
            return input_ids
        decoder.tokens.copy_(tokens[:, None])
        decoder.step()


def streamer_of_caller() -> Any:
    """The streamer that ``generate`` was given, or None. It passes neither that nor an assistant on to a loop.

    Raises:
        ValueError: it was given an assistant, or several GPUs to keep in step, which the loop does not do.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    given = {} if frame is None else frame.f_locals
    for name in ("assistant_model", "synced_gpus"):
        if given.get(name):
            raise ValueError(f"{name}: expected none with a GraphedDecoder, got {type(given[name]).__name__}")
    return given.get("streamer")


def prompt_arguments(model_kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """``attention_mask`` and ``position_ids`` of what ``generate`` would pass to the model's forward.

    Raises:
        ValueError: there is something else, which the decoder would not use.
    """
    given = {name: value for name, value in model_kwargs.items() if not _says_nothing(value)}
    mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
    for name in ("use_cache", "logits_to_keep", "cache_position"):  # what the decoder does anyway
        given.pop(name, None)
    for name in [name for name, value in given.items() if isinstance(value, Cache)]:
        cache = given.pop(name)
        if state_of(cache) is not None:  # an empty one of another kind is what generate() makes by itself
            raise ValueError(f"{name}: expected none with a GraphedDecoder, which has its own, got a cache with pages")
        if cache.get_seq_length() > 0:
            raise ValueError(f"{name}: expected no tokens in it, got {cache.get_seq_length()}")
    if given:
        raise ValueError(f"{', '.join(sorted(given))}: expected text alone with a GraphedDecoder")
    return mask, positions


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (dict, list, tuple)) and not value)
