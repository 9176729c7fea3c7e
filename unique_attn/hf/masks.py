"""What an attention mask says: which sequences have how much left padding, or that it is something else."""

from __future__ import annotations

import torch
from torch import Tensor


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
    positions = torch.arange(length, device=padding.device)
    queries = positions[length - num_tokens :, None]
    return (positions >= padding[:, None, None, None]) & (positions <= queries)


def left_padding(mask: Tensor | None, batch: int, num_tokens: int, length: int) -> list[int] | None:
    """Padding of each row if ``mask`` is causal with left padding only, else None.

    Waits for the device if there is a mask. ``mask=None`` hides nothing. A row must show all its T new tokens.
    """
    if mask is None:
        return [0] * batch
    if not is_step_mask(mask, batch, num_tokens, length):
        return None
    shown, plain = visible(mask.expand(batch, -1, -1, -1))
    padding = length - shown[:, 0, -1].sum(-1)
    fits = (shown == causal_mask(padding, num_tokens, length)).all() & (padding <= length - num_tokens).all() & plain
    *values, ok = torch.cat([padding, fits[None].to(padding.dtype)]).tolist()
    return values if ok else None


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
