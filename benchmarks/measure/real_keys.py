"""Queries and keys of a real model over real texts, and the attention that is truly on each page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.support import DOCUMENT

_CAPTURE = "unique_attn_capture"


def texts(files: list[str]) -> dict[str, str]:
    """The texts in ``files`` by their names, or without any two that every checkout has."""
    if files:
        return {Path(file).stem: Path(file).read_text("utf-8", errors="replace") for file in files}
    from pydoc_data import topics

    prose = DOCUMENT.read_text("utf-8")
    return {"prose": prose, "technical": "\n\n".join(topics.topics[name] for name in sorted(topics.topics))}


@contextmanager
def attending(model: Any, attention: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``model`` computes attention by this function, which is given what SDPA's would be."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_CAPTURE, attention)
    AttentionMaskInterface.register(_CAPTURE, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_CAPTURE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(_CAPTURE)
        AttentionMaskInterface._global_mapping.pop(_CAPTURE)


@contextmanager
def observing(model: Any, see: Callable[[Tensor, Tensor, Tensor, dict[str, Any]], object]) -> Iterator[None]:
    """Inside, attention of ``model`` is SDPA's, and ``see`` is given what it is given: queries ``[B, Hq, T, D]``, keys
    and values ``[B, H, n, D]``, rotary embeddings applied, and the keywords."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        see(query, key, value, kwargs)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    with attending(model, attention):
        yield


@torch.inference_mode()
def capture(model: Any, ids: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """What the attention of every layer is given for ``ids`` ``[1, n]``, rotary embeddings applied.

    Returns:
        The queries of the last tokens ``[layers, H, G, num_queries, D]`` and all keys ``[layers, H, n, D]``, fp32.
    """
    queries: list[Tensor] = []
    keys: list[Tensor] = []

    def see(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
        queries.append(query[0, :, -num_queries:].float().unflatten(0, (key.shape[1], -1)).clone())
        keys.append(key[0].float().clone())

    with observing(model, see):
        model(ids, use_cache=False, logits_to_keep=1)
    return torch.stack(queries), torch.stack(keys)


@dataclass
class RealKeys:
    """One text at one page size: queries, keys, exact page statistics, and the mass on each page.

    Attributes:
        q: ``[layers, H, G, T, D]``, the last T tokens.
        k: ``[layers, H, n, D]``.
        mass: attention on each page, mean over the group, ``[layers, H, T, P]``.
        page_size: tokens per page.
    """

    q: Tensor
    k: Tensor
    mass: Tensor
    page_size: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, page_size: int) -> RealKeys:
        tokens, num_queries = k.shape[2], q.shape[3]
        position = torch.arange(tokens - num_queries, tokens)
        hidden = torch.arange(tokens) > position[:, None]
        pad = -tokens % page_size
        mass = []
        for queries, keys in zip(q, k):  # one layer at a time
            logits = torch.einsum("hgtd,hnd->hgtn", queries, keys) * q.shape[-1] ** -0.5
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
            mass.append(torch.nn.functional.pad(weights, (0, pad)).unflatten(-1, (-1, page_size)).sum(-1))
        return cls(q, k, torch.stack(mass), page_size)

    def changed(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> RealKeys:
        """The same with other queries and keys, whose attention is the same."""
        return RealKeys(*change(self.q, self.k), self.mass, self.page_size)

    @property
    def own_pages(self) -> Tensor:
        """The page of each query, int64 ``[T]``."""
        tokens = self.k.shape[2]
        return torch.arange(tokens - self.q.shape[3], tokens) // self.page_size

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations ``[layers, H, P, D]``; of the page at the end only what a sum of zeros gives,
        which is no matter: it is nobody's candidate but its own."""
        pad = -self.k.shape[2] % self.page_size
        pages = torch.nn.functional.pad(self.k, (0, 0, 0, pad)).unflatten(2, (-1, self.page_size))
        return pages.mean(3), pages.var(3, correction=0).sqrt()

    def kept(self, scores: Tensor, budgets: list[int]) -> list[float]:
        """Mass on the first page, the own page and those with the best ``scores`` ``[layers, H, T, P]``."""
        page, own = torch.arange(scores.shape[-1]), self.own_pages[:, None]
        fixed = (page == own) | (page == 0)
        scores = scores.masked_fill(page > own, -torch.inf).masked_fill(fixed, torch.inf)
        best = self.mass.gather(-1, scores.topk(max(budgets) // self.page_size).indices)
        return [float(best[..., : budget // self.page_size].sum(-1).mean()) for budget in budgets]
