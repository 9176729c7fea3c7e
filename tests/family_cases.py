"""The ways to call a model that the sweep compares, each a function of the model and its :class:`Inputs`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from family_inputs import Inputs, arguments
from torch import Tensor

PADDING = 9  # tokens that are hidden in row 0 of a padded batch
_CACHES = ("cache", "past_key_values", "cache_params")  # as versions and families call it


class NotApplicable(Exception):
    """The family has no such call."""


def _source(given: Inputs, padded: bool, start: int = 0, end: int | None = None) -> dict[str, Any]:
    """What goes with the tokens from ``start`` to ``end``."""
    named = {**(given.once if start == 0 else {}), **given.always}
    end = given.ids.shape[1] if end is None else end
    for name, (tensor, axis) in {**given.along, **(given.along_first if start == 0 else {})}.items():
        each = tensor.shape[axis] // given.ids.shape[1]
        named[name] = tensor.narrow(axis, start * each, (end - start) * each)
    return {**named, **{name: mask for name, mask in given.hidden.items() if padded and name in named}}


def _masks(given: Inputs, mask: Tensor) -> dict[str, Tensor]:
    """The arguments that hide padding, for tokens that ``mask`` ``[B, T]`` covers."""
    found = {} if given.mask_name is None else {given.mask_name: mask}
    if given.canvas:
        found["decoder_attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], given.canvas)], 1)
    return found


def _padding(given: Inputs) -> Tensor:
    """``[B, T]`` with 0 for padding: of row 0, at the left; at the right where an encoder reads something else."""
    mask = torch.ones(_batch(given), given.ids.shape[1], dtype=torch.long)
    hidden = min(PADDING, given.ids.shape[1] // 3)
    if given.encoder:
        mask[0, -hidden:] = 0
    else:
        mask[0, :hidden] = 0
    return mask


def _batch(given: Inputs) -> int:
    return given.ids.shape[0] // given.rows


def _real(logits: Tensor, mask: Tensor) -> Tensor:
    """The logits ``[B, T, ...]`` of positions that are no padding; images may stand before the last T."""
    logits = logits[:, -mask.shape[1] :]
    mask = mask[:, -logits.shape[1] :]
    return logits[mask.repeat_interleave(logits.shape[0] // mask.shape[0], 0).bool()]


def _outputs(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    return output[0]


def forward(model: Any, given: Inputs, padded: bool, use_cache: bool) -> dict[str, Tensor]:
    """Logits of one call with several tokens."""
    names = arguments(model.forward)
    kwargs = {given.ids_name: given.ids, **_source(given, padded)}
    if "use_cache" in names or "kwargs" in names:
        kwargs["use_cache"] = use_cache
    if padded:
        if given.mask_name is None and not given.hidden:
            raise NotApplicable("it takes no mask")
        kwargs |= _masks(given, _padding(given))
    logits = _outputs(model(**kwargs))
    return {"logits": _real(logits, kwargs[given.mask_name]) if padded and given.mask_name else logits}


def continued(model: Any, given: Inputs, padded: bool) -> dict[str, Tensor]:
    """Logits of calls that continue a cache: a first part, one token, several, one, one."""
    if padded and given.text is not None:
        given = given.text  # outside of generate() few families continue a padded batch with images
    names = arguments(model.forward)
    name = next((each for each in _CACHES if each in names), None)
    if name is None:
        raise NotApplicable("it takes no cache")
    if padded and given.mask_name is None and not given.hidden:
        raise NotApplicable("it takes no mask")
    length = given.ids.shape[1]
    cuts = sorted({max(1, length - back) for back in (10, 9, 2, 1, 0)})
    mask = torch.ones(_batch(given), length, dtype=torch.long) if given.encoder else _padding(given)
    cache, start, parts = None, 0, []
    for end in cuts:
        kwargs = {given.ids_name: given.ids[:, start:end], **_source(given, padded, start, end)}
        if padded:
            kwargs |= _masks(given, mask[:, :end])
        if "use_cache" in names:
            kwargs["use_cache"] = True
        if cache is not None:
            kwargs[name] = cache
        output = model(**kwargs)
        cache = next((value for each in _CACHES if (value := getattr(output, each, None)) is not None), None)
        if cache is None:
            raise NotApplicable("it returns no cache")
        logits = _outputs(output)
        parts.append(logits[:, -(end - start) :])
        start = end
    logits = torch.cat(parts, 1)
    return {"logits": _real(logits, mask) if padded and not given.encoder else logits}


def generate(model: Any, given: Inputs, beams: int) -> dict[str, Tensor]:
    """Tokens (and logits of greedy decoding) of a padded batch."""
    if not hasattr(model, "generate"):
        raise NotApplicable("it does not generate")
    kwargs = _source(given, padded=True) if given.generates is None else dict(given.generates)
    if given.generates_ids:
        mask = _padding(given)
        ids = given.ids.clone()
        if ids.dim() == 2 and ids.shape == mask.shape:
            ids[mask == 0] = 0
        kwargs["inputs" if "inputs" in arguments(model.generate) else given.ids_name] = ids
        if given.mask_name is not None:
            kwargs[given.mask_name] = mask
    output = model.generate(
        **kwargs,
        max_new_tokens=given.new_tokens,
        do_sample=False,
        num_beams=beams,
        return_dict_in_generate=True,
        output_logits=beams == 1,
        output_scores=beams > 1,
    )
    if isinstance(output, Tensor):
        return {"sequences": output}
    if not hasattr(output, "sequences"):
        raise NotApplicable("it generates no tokens")
    result = {"sequences": output.sequences}
    if beams > 1 and getattr(output, "sequences_scores", None) is not None:
        result["scores"] = output.sequences_scores
    elif beams == 1 and isinstance(getattr(output, "logits", None), tuple):
        steps = torch.stack(output.logits, 1)
        result["logits" if steps.dim() == 3 else "values"] = steps
    return result


CASES: dict[str, Callable[[Any, Inputs], dict[str, Tensor]]] = {
    "forward": partial(forward, padded=False, use_cache=False),
    "forward with cache": partial(forward, padded=False, use_cache=True),
    "forward, padded": partial(forward, padded=True, use_cache=False),
    "forward with cache, padded": partial(forward, padded=True, use_cache=True),
    "continued": partial(continued, padded=False),
    "continued, padded": partial(continued, padded=True),
    "generate": partial(generate, beams=1),
    "beams": partial(generate, beams=3),
}
