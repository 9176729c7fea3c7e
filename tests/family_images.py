"""The inputs of any model; with images for those that can do without: placeholders in the text, and their pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from family_cases import forward, generate
from family_inputs import BATCH, Inputs, arguments, hide_end, noise, pixels, text_inputs
from family_special import SPECIAL
from torch import Tensor

BEFORE = 14  # tokens of text before the image, padding included
_PLACEHOLDERS = ("image_token_id", "image_token_index")
_TYPES = ("token_type_ids", "mm_token_type_ids")  # arguments that tell images (1) from text (0)


def inputs(model: Any) -> Inputs:
    """What a tiny model reads, without padding: text, what it needs besides, and images if it takes them."""
    make = SPECIAL.get(type(model).__name__)
    return _with_images(model, text_inputs(model)) if make is None else make(model)


def _with_images(model: Any, text: Inputs) -> Inputs:
    """``text`` with an image in each row, if stock attention runs the model with it; else ``text`` itself.

    Which arguments a family wants is found out by trying, because only its processor would know.
    """
    names = arguments(model.forward)
    if "pixel_values" not in names or not hasattr(model, "get_image_features"):
        return text
    for images in _candidates(model.config, names):
        try:
            mixed = _mixed(model, text, images, names)
            with torch.no_grad():
                forward(model, mixed, padded=True, use_cache=True)
                generate(model, dataclasses.replace(mixed, new_tokens=2), beams=1)
        except Exception:  # the next one, or text alone: the stock model says so, not the enabled one
            continue
        return dataclasses.replace(mixed, images=True, text=text)
    return text


def _candidates(config: Any, names: list[str]) -> list[dict[str, Tensor]]:
    """Sets of arguments that may be what the family takes."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return []
    found = []
    if "image_grid_thw" in names:
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
        side = getattr(vision, "patch_size", 14)
        sizes = {channels * side**2 * frames for frames in (1, getattr(vision, "temporal_patch_size", 1) or 1)}
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        found += [{"pixel_values": noise(BATCH * 16, size), "image_grid_thw": grid} for size in sorted(sizes)]
        found += [{"pixel_values": noise(BATCH * 16, channels, side, side), "image_grid_thw": grid}]
    if "image_position_ids" in names:
        row, column = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
        positions = torch.stack([column, row], -1).view(1, 36, 2).expand(BATCH, 36, 2)
        patches = noise(BATCH, 36, 3 * vision.patch_size**2).sigmoid()
        found += [{"pixel_values": patches, "image_position_ids": positions}]
    if hasattr(vision, "image_size"):
        height = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        sizes_of = {"image_sizes": torch.tensor([[height, height]] * BATCH)} if "image_sizes" in names else {}
        found += [
            {"pixel_values": pixels(vision)},
            {"pixel_values": pixels(vision), **sizes_of},
            {"pixel_values": pixels(vision, 1)},
            {"pixel_values": pixels(vision, 1), **sizes_of},
        ]
    return found


def _mixed(model: Any, text: Inputs, images: dict[str, Tensor], names: list[str]) -> Inputs:
    """``text`` with as many placeholders in each row as the images have features."""
    config = model.config
    placeholder = next(value for name in _PLACEHOLDERS if (value := getattr(config, name, None)) is not None)
    with torch.no_grad():
        features = model.get_image_features(**images)
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, (list, tuple)) else [features]
    count = sum(part.numel() // part.shape[-1] for part in parts) // BATCH
    ids = text.ids if text.ids_name == "input_ids" else text.always["input_ids"]
    start = getattr(config, "vision_start_token_id", None)
    opening = torch.full((BATCH, int(start is not None)), start or 0)
    places = torch.full((BATCH, count), placeholder)
    ids = torch.cat([ids[:, :BEFORE], opening, places, ids[:, BEFORE:]], 1)
    types = {name: (ids == placeholder).long() for name in _TYPES if name in names}
    if text.encoder:
        mask = torch.ones_like(ids)
        hidden = {"attention_mask": hide_end(mask)}
        always = {**text.always, "input_ids": ids, "attention_mask": mask, **images, **types}
        return dataclasses.replace(text, always=always, hidden=hidden)
    first = {name: (value, 1) for name, value in types.items()}
    return dataclasses.replace(text, ids=ids, once={**text.once, **images}, along_first=first)
