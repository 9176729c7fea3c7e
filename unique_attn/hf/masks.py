"""What an attention mask says: which sequences have how much left padding, or that it is something else."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_MASK_BYTES = 64 << 20  # of a mask that are looked at in one go


def is_step_mask(mask: Tensor, batch: int, num_tokens: int, length: int) -> bool:
    """Whether ``mask`` is ``[B or 1, 1, T, length]``, boolean or additive, by its host-side facts alone."""
    if mask.dim() != 4 or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        return False
    return mask.shape[0] in (1, batch) and tuple(mask.shape[1:]) == (1, num_tokens, length)


def visible(mask: Tensor) -> tuple[Tensor, Tensor | bool]:
    """Where ``mask`` shows a key, and whether it only shows and hides (a bool tensor): an additive one may do more."""
    if mask.dtype == torch.bool:
        return mask, True
    shown = mask == 0
    return shown, (shown | (mask <= torch.finfo(mask.dtype).min / 2)).all()


def causal_mask(padding: Tensor, num_tokens: int, length: int) -> Tensor:
    """bool ``[B, 1, T, length]``: what the last T of ``length`` tokens see if ``padding`` ``[B]`` hides the first."""
    return _seen(padding, length - num_tokens, num_tokens, length)


def _seen(padding: Tensor, first: int, num_tokens: int, length: int) -> Tensor:
    """bool ``[B, 1, T, length]``: what the T tokens from position ``first`` on see."""
    positions = torch.arange(length, device=padding.device)
    queries = torch.arange(first, first + num_tokens, device=padding.device)[:, None]
    return (positions >= padding[:, None, None, None]) & (positions <= queries)


def has_holes(mask: Tensor | None, num_tokens: int) -> bool:
    """Whether ``mask`` ``[B, 1, T, length]`` hides a token that a shown one comes before, of those that are not new.

    Waits for the device. A tree of drafts hides new tokens only, until it has a second level.
    """
    if mask is None or mask.dim() != 4:
        return False
    shown = visible(mask[:, 0, -1, : mask.shape[-1] - num_tokens])[0]
    return bool((shown.cummax(-1).values & ~shown).any())


def hidden_left(mask: Tensor | None, batch: int, num_tokens: int, length: int) -> list[int] | None:
    """Padding of each row if ``mask`` is causal with left padding only, else None. It may hide new tokens too.

    Waits for the device if there is a mask. ``mask=None`` hides nothing.
    """
    if mask is None:
        return [0] * batch
    if not is_step_mask(mask, batch, num_tokens, length):
        return None
    mask = mask.expand(batch, -1, -1, -1)
    padding = length - visible(mask[:, 0, -1])[0].sum(-1)
    fits: Tensor | bool = True
    rows = max(1, _MASK_BYTES // max(1, batch * length))
    for begin in range(0, num_tokens, rows):  # the mask is large enough by itself
        part = mask[:, :, begin : begin + rows]
        shown, plain = visible(part)
        same = shown == _seen(padding, length - num_tokens + begin, part.shape[2], length)
        fits = same.all() & plain & fits
    assert isinstance(fits, Tensor)
    *values, ok = torch.cat([padding, fits[None].to(padding.dtype)]).tolist()
    return values if ok else None


def showing_new(padding: list[int] | None, num_tokens: int, length: int) -> list[int] | None:
    """``padding``, or None if it hides some of the last ``num_tokens`` of ``length`` tokens."""
    return None if padding is None or max(padding, default=0) > length - num_tokens else padding


def left_padding(mask: Tensor | None, batch: int, num_tokens: int, length: int) -> list[int] | None:
    """Padding of each row if ``mask`` is causal with left padding only and shows all T new tokens, else None.

    Waits for the device if there is a mask. ``mask=None`` hides nothing.
    """
    return showing_new(hidden_left(mask, batch, num_tokens, length), num_tokens, length)


class MaskMemo:
    """What :func:`hidden_left` said of the last mask, so that a mask is looked at once for all layers.

    Keeps no mask alive. A mask is looked at again as soon as somebody asks for the second time, which is a later call:
    there are ways to write to a tensor that it does not count, in inference mode any.
    """

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._facts: tuple[int | None, ...] | None = None
        self._padding: list[int] | None = None
        self._holes: bool | None = None  # of the same mask, once somebody has asked
        self._askers: set[int] = set()  # who was told so

    def padding(
        self, mask: Tensor | None, batch: int, num_tokens: int, length: int, asker: object, owner: object = None
    ) -> list[int] | None:
        """As :func:`hidden_left`. An ``asker`` asks once in a call, None what the last one asked; those with one
        ``owner`` share what was found.
        """
        counts = mask is not None and not mask.is_inference()
        facts = (id(owner), batch, num_tokens, length, mask._version if mask is not None and counts else None)
        last = None if self._mask is None else self._mask()  # None as well if it is gone
        known = self._facts == facts and last is mask and (mask is None) == (self._mask is None)
        if not known or (mask is not None and id(asker) in self._askers):
            self._padding = hidden_left(mask, batch, num_tokens, length)
            self._mask = None if mask is None else weakref.ref(mask)
            self._facts, self._holes = facts, None
            self._askers.clear()
        if asker is not None:
            self._askers.add(id(asker))
        return self._padding

    def holes(self, mask: Tensor | None, num_tokens: int) -> bool:
        """:func:`has_holes`, remembered of the mask that was looked at last."""
        if mask is None or self._mask is None or self._mask() is not mask:
            return has_holes(mask, num_tokens)
        if self._holes is None:
            self._holes = has_holes(mask, num_tokens)
        return self._holes


def shows_padding(mask: Tensor | None, padding: Tensor) -> bool:
    """Whether ``mask`` lets some query see a position that ``padding`` ``[B]`` hides. Waits for the device."""
    if mask is None or mask.dim() != 4:
        return bool((padding > 0).any())
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    hidden = torch.arange(mask.shape[-1], device=mask.device) < padding[:, None, None, None]
    return bool((shown & hidden).any())


class MaskWatch:
    """Compares the masks of single-token steps with the expected ones on a GPU, without waiting for it.

    A difference is therefore reported a step or so after it occurred.
    """

    def __init__(self, device: torch.device) -> None:
        self._differs = torch.zeros((), dtype=torch.bool, device=device)
        self._host = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=True)
        self._copied: torch.cuda.Event | None = None

    def submit(self, mask: Tensor, padding: Tensor) -> bool:
        """Check ``mask`` ``[B, 1, 1, length]``; True if this or an earlier one is known to differ by now."""
        shown, plain = visible(mask)
        differs = (shown != causal_mask(padding, 1, mask.shape[-1])).any()
        self._differs = self._differs | (differs if plain is True else differs | ~plain)
        if self._copied is not None and not self._copied.query():
            return False  # the copy that is under way will be followed by one with this result
        known = self._copied is not None and bool(self._host)
        self._host.copy_(self._differs, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(mask.device))
        return known
