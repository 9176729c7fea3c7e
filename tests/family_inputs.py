"""What a tiny model needs to run: tokens, and features for the encoders that it cannot do without."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from family_configs import TEXT_TOKENS
from torch import Tensor

BATCH = 2
PROMPT = 40  # tokens of a prompt of a decoder-only model
SOURCE = 26  # tokens that an encoder reads
TARGET = 16  # tokens that the decoder beside it gets


@dataclass
class Inputs:
    """What one family reads.

    Attributes:
        ids: ``[B, T]`` tokens of the decoder, ``[B, T, C]`` or ``[B * C, T]`` where it reads C codebooks at once.
        ids_name: their argument.
        mask_name: the argument that hides padding ``[B, T]`` of the decoder, None if there is none.
        once: what goes with the first tokens only: images that stand at placeholders, features of an encoder.
        always: what goes with each call.
        along: what goes with tokens, and its axis of them: one slice for each token, or several of equal number.
        along_first: like ``along``, for the first call only.
        hidden: by name, the masks in ``once`` and ``always`` with padding at the end of row 0, for padded calls.
        generates: what ``generate`` gets in place of ``once`` and ``always``, None for the same.
        generates_ids: whether ``generate`` gets ``ids`` and a mask.
        encoder: whether an encoder reads something, and the decoder something else.
        rows: rows of ``ids`` for each row of the batch.
        new_tokens: that ``generate`` makes.
        canvas: tokens of a draft behind the others, which a ``decoder_attention_mask`` tells from padding.
        images: whether an image is among them although text would do.
        text: the same without it.
    """

    ids: Tensor
    ids_name: str = "input_ids"
    mask_name: str | None = "attention_mask"
    once: dict[str, Any] = field(default_factory=dict)
    always: dict[str, Any] = field(default_factory=dict)
    along: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    along_first: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)
    generates: dict[str, Any] | None = None
    generates_ids: bool = True
    encoder: bool = False
    rows: int = 1
    new_tokens: int = 12
    canvas: int = 0
    images: bool = False
    text: Inputs | None = None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, seed: int = 1, end: int = TEXT_TOKENS.stop) -> Tensor:
    """Random text."""
    return torch.randint(min(TEXT_TOKENS.start, end - 1), end, shape, generator=generator(seed))


def noise(*shape: int, seed: int = 5) -> Tensor:
    """Random features, large enough to matter."""
    return torch.randn(*shape, generator=generator(seed))


def pixels(config: Any, *more: int) -> Tensor:
    """``[B, *more, 3, size, size]`` for a vision config."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return noise(BATCH, *more, getattr(config, "num_channels", 3), height, width)


def arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def text_inputs(model: Any) -> Inputs:
    """Tokens alone, for the encoder as well if there is one."""
    names = arguments(model.forward)
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        return sequence_to_sequence(model)
    text = Inputs(tokens(BATCH, PROMPT, end=vocabulary(model)))
    text.mask_name = "attention_mask" if "attention_mask" in names else None
    return text


def vocabulary(model: Any) -> int:
    """The first id that is no text."""
    try:
        size = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        size = getattr(model.config, "vocab_size", None) or TEXT_TOKENS.stop
    return min(size, TEXT_TOKENS.stop)


def sequence_to_sequence(model: Any, **features: Any) -> Inputs:
    """An encoder that reads text, or these features, and a decoder that reads text."""
    names = arguments(model.forward)
    result = Inputs(tokens(BATCH, TARGET, seed=2, end=vocabulary(model)), "decoder_input_ids", encoder=True)
    result.mask_name = "decoder_attention_mask" if "decoder_attention_mask" in names else None
    result.always = features or {"input_ids": tokens(BATCH, SOURCE, end=vocabulary(model))}
    if not features and "attention_mask" in names:
        mask = torch.ones(BATCH, SOURCE, dtype=torch.long)
        result.always["attention_mask"] = mask
        result.hidden["attention_mask"] = hide_end(mask)
    result.generates_ids = False
    return result


def hide_end(mask: Tensor) -> Tensor:
    """``mask`` ``[B, T]`` with padding at the end of row 0."""
    mask = mask.clone()
    mask[0, -8:] = 0
    return mask
