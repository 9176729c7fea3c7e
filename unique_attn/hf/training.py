"""Training an enabled model: which tokens form a sequence, and attention with the training mask over them."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unique_attn import ops
from unique_attn.config import UniqueConfig
from unique_attn.hf.compat import family_of, is_traced, warn_once
from unique_attn.hf.handover import Refusal
from unique_attn.rules import RULES, choices, rules_with
from unique_attn.train import masked_attention, packed_index, page_slots
from unique_attn.train_config import TrainConfig, check_progress

CUSTOM_MASK = "its attention mask is more than causal, padded and packed"
_SAMPLE = 8  # queries that the statistics look at
_MASK_BYTES = 64 << 20  # of a mask that are looked at in one go
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k")


class Layout(NamedTuple):
    """Where the sequences of a batch ``[B, L]`` are once its rows are laid end to end, hidden tokens last in a row."""

    cu_seqlens: Tensor  # int32 [sequences + 1]
    max_seqlen: int
    order: Tensor | None = None  # int64 [B * L]: token of the batch at each packed place; None if it is the same
    inverse: Tensor | None = None  # int64 [B * L]: packed place of each token of the batch

    def pack(self, x: Tensor) -> Tensor:
        """``[B, heads, L, D]`` as ``[B * L, heads, D]``."""
        packed = x.transpose(1, 2).flatten(0, 1)
        return packed if self.order is None else packed[self.order]

    def unpack(self, x: Tensor, batch: int) -> Tensor:
        """``[B * L, heads, D]`` as ``[B, L, heads, D]``."""
        return (x if self.inverse is None else x[self.inverse]).unflatten(0, (batch, -1))


# ---- Layouts. ----


def rows_layout(batch: int, length: int, device: torch.device) -> Layout:
    """Every row one sequence. Padding on the right changes nothing for the tokens before it."""
    return Layout(torch.arange(batch + 1, dtype=torch.int32, device=device) * length, length)


def mask_layout(mask: Tensor, batch: int, length: int) -> Layout | None:
    """The layout by which causal attention inside each sequence is what ``mask`` asks for; None if there is none.

    Any tokens of a row may be hidden, and a row may hold several sequences one after another. What hidden tokens
    themselves attend to does not matter, as nothing attends to them. Waits for the device.

    Args:
        mask: bool ``[B or 1, 1, L, L]``, True where a query (row) sees a key.
        batch: B.
        length: L.
    """
    if mask.dtype != torch.bool or mask.dim() != 4:
        return None
    if mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != (1, length, length):
        return None
    visible = mask[:, 0].expand(batch, -1, -1)
    position = torch.arange(length, device=mask.device)
    real = visible.diagonal(dim1=1, dim2=2)
    first = visible.contiguous().view(torch.uint8).argmax(-1)  # key that each query sees first
    starts = real & (first == position)
    current = torch.where(starts, position, -1).cummax(-1).values  # where the sequence of each token starts
    fits = ((first == current) | ~real).all()
    rows = max(1, _MASK_BYTES // max(1, batch * length))
    for start in range(0, length, rows):  # the mask is large enough by itself
        part = slice(start, start + rows)
        expected = (position >= first[:, part, None]) & (position <= position[part, None]) & real[:, None]
        fits &= ((visible[:, part] == expected) | ~real[:, part, None]).all()
        fits &= (~visible[:, part] | real[:, None]).all()
    moved = (real[:, 1:] & ~real[:, :-1]).any()
    packed = (starts.sum(-1) > 1).any()
    ok, has_moved, is_packed = torch.stack([fits, moved, packed]).tolist()
    if not ok:
        return None
    order = inverse = None
    if has_moved:
        row = torch.arange(batch, device=mask.device)[:, None] * length
        order = (torch.argsort(~real, dim=-1, stable=True) + row).flatten()
        inverse = torch.argsort(order)
    if not is_packed:
        return rows_layout(batch, length, mask.device)._replace(order=order, inverse=inverse)
    begins = starts.flatten() if order is None else starts.flatten()[order]
    begins[::length] = True
    return _begins_layout(begins)._replace(order=order, inverse=inverse)


def _begins_layout(begins: Tensor) -> Layout:
    """From bool ``[N]``, True at the first token of every sequence. Waits for the device."""
    bounds = torch.nn.functional.pad(begins.nonzero().flatten(), (0, 1), value=begins.shape[0]).int()
    return Layout(bounds, int(bounds.diff().max()))


def _sequence_mask(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """bool ``[B, 1, L, L]``: causal inside the sequences that ``cu_seqlens`` bounds."""
    place = torch.arange(batch * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True).view(batch, 1, length)
    return (sequence[..., None] == sequence[:, :, None]).tril()


class _Judged(NamedTuple):
    """A layout, and the tensors it was found from."""

    refs: list[weakref.ref[Tensor]]
    versions: list[int]  # one more after every change in place
    shape: tuple[int, int]
    layout: Layout | None

    @classmethod
    def of(cls, tensors: list[Tensor], shape: tuple[int, int], layout: Layout | None) -> _Judged:
        return cls([weakref.ref(x) for x in tensors], [x._version for x in tensors], shape, layout)

    def is_of(self, tensors: list[Tensor], shape: tuple[int, int]) -> bool:
        return (
            shape == self.shape
            and len(tensors) == len(self.refs)
            and all(ref() is x for ref, x in zip(self.refs, tensors))
            and all(version == x._version for version, x in zip(self.versions, tensors))
        )


# ---- State. ----


class TrainState:
    """What the layers of one enabled model share in training: temperature, mode, statistics.

    Attributes:
        config: which pages are visible.
        train: how the mask changes.
        mode: ``soft``, ``hard`` or ``dense`` now.
        progress: share of the training that is done, by the last :meth:`update`.
        collect: set to have the next training forward take statistics, in its first layer with a page mask.
    """

    def __init__(self, config: UniqueConfig, train: TrainConfig) -> None:
        if train.mode != "dense" or train.hard_after is not None:
            if config.recent_pages < 1:
                raise ValueError(f"config.recent_pages: expected at least 1 to train, got {config.recent_pages}")
            if train.mode == "soft" and not RULES[config.rule].trainable:
                allowed = choices(rules_with(lambda info: info.trainable))
                raise ValueError(f"config.rule: expected {allowed} with mode 'soft', got {config.rule!r}")
            if train.mode == "soft" and config.index_format != "exact":
                raise ValueError(f"config.index_format: expected exact with mode 'soft', got {config.index_format!r}")
        self.config = config
        self.train = train
        self.mode = train.mode
        self.progress = 0.0
        self.collect = False
        self._value = train.tau
        self._taus: dict[torch.device, Tensor] = {}
        self._sums: Tensor | None = None
        self._judged: dict[int, _Judged] = {}  # by the dimensions of what was judged: positions, masks
        self.update(0.0)

    def update(self, progress: float) -> None:
        """Set mode and temperature to what the schedule says; not between a forward and its backward.

        The tensors of :meth:`tau_on` are changed in place, so nothing is compiled again for a new temperature.

        Args:
            progress: share of the training that is done, 0 to 1.

        Raises:
            TypeError: ``progress`` is no number.
            ValueError: it is not from 0 to 1.
        """
        self.progress = check_progress("progress", progress)
        self.mode = self.train.mode_at(self.progress)
        value = self.train.tau_at(self.progress)
        if value != self._value:
            self._value = value
            for tau in self._taus.values():
                tau.fill_(value)

    def prepare(self, modules: list[nn.Module]) -> None:
        """Make what is otherwise made in the first forward of these attention modules, so that it compiles once."""
        for module in modules:
            family_of(module)
            for device in {parameter.device for parameter in module.parameters()}:
                self.tau_on(device)

    @property
    def tau(self) -> float:
        """The temperature now, in score units."""
        return self._value

    def tau_on(self, device: torch.device) -> Tensor:
        """The temperature as 0-dim fp32 on ``device``, always the same tensor."""
        if device not in self._taus:
            with torch.inference_mode(False):
                self._taus[device] = torch.tensor(self._value, dtype=torch.float32, device=device)
        return self._taus[device]

    def statistics(self) -> dict[str, float]:
        """The last statistics, of a few queries that have more candidate pages than the budget. Waits for the device.

        ``gate_mean``: mean soft gate of their candidates; ``gate_open_share``: share of gates in (0.05, 0.95);
        ``mass_kept``: attention mass, without gates, on the pages that decoding reads. Empty if there are no such
        queries or nothing was collected.
        """
        gates, between, count, mass, rows = (0.0,) * 5 if self._sums is None else self._sums.tolist()
        found = {"mass_kept": mass / rows} if rows else {}
        return found if not count else {"gate_mean": gates / count, "gate_open_share": between / count, **found}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_judged": {}}  # a weak reference is in it

    # ---- Attention. ----

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        kwargs: dict[str, Any],
        refusal: Refusal | None,
    ) -> Tensor | None:
        """Attention with the training mask now, or None if this layer or call is dense.

        Args:
            module: the attention module.
            query: ``[B, Hq, L, D]``, in the dtype of ``torch.autocast`` if that is on.
            key: ``[B, H, L, D]``.
            value: like ``key``.
            mask: what the mask function returned, or a mask of the user's.
            scaling: factor of the logits; None for ``1 / sqrt(D)``.
            kwargs: the other arguments of the attention function; ``cu_seq_lens_q``, ``max_length_q`` and
                ``position_ids`` are used.
            refusal: why the call cannot use pages; None if it can.

        Returns:
            ``[B, L, Hq, D]`` or None.
        """
        if self.mode == "dense":
            return None
        listed = self.config.dense_layers  # where none is, no number of a layer has it compiled anew
        if listed and getattr(module, "layer_idx", None) in listed:
            return None
        layout = None if refusal else self._layout(mask, query, kwargs)
        if layout is None:
            refusal = refusal or Refusal(CUSTOM_MASK)
            if not refusal.quiet:
                name, reason = type(module).__name__, refusal.reason
                warn_once(f"{name} trains dense: {reason}", "train", type(module), reason)
            return None
        q, k, v = (layout.pack(x) for x in (query, key, value))
        if self.collect:
            self.collect = False
            self._sums = _gate_sums(q, k, layout, self.config, self.tau_on(q.device), scaling)
        out = masked_attention(
            q,
            k,
            v,
            layout.cu_seqlens,
            layout.max_seqlen,
            self.config.num_pages,
            mode=self.mode,  # type: ignore[arg-type]  # checked by TrainConfig
            tau=self.tau_on(q.device) if self.mode == "soft" else None,
            rule=self.config.rule,
            page_size=self.config.page_size,
            spread_weight=self.config.spread_weight,
            sink_pages=self.config.sink_pages,
            recent_pages=self.config.recent_pages,
            scale=scaling,
            index_format=self.config.index_format,
        )
        return layout.unpack(out, query.shape[0])

    def dense_mask(
        self, mask: Tensor | None, query: Tensor, kwargs: dict[str, Any], *, windowed: bool
    ) -> Tensor | None:
        """``mask`` for a layer that trains dense, with the same sequences apart as in those with the training mask.

        sdpa does not look at ``cu_seq_lens_q``, and where the model fills a cache, as it does by default, no mask of
        transformers keeps the sequences of packed ``position_ids`` apart, in layers with a window neither.
        """
        bounds = packing(kwargs)
        # A compiled model that trains dense has no other break in its graph.
        if bounds is None and (mask is None or (windowed and not (self.mode == "dense" and is_traced()))):
            positions = _packed_positions(query, kwargs)
            layout = None if positions is None else self._judge(positions, None, query.shape[0], query.shape[2])
            if layout is not None and layout.cu_seqlens.shape[0] - 1 > query.shape[0]:
                bounds = layout.cu_seqlens
        if bounds is None:
            return mask
        apart = _sequence_mask(bounds, query.shape[0], query.shape[2])
        if mask is None:
            return apart
        return mask & apart if mask.dtype == torch.bool else mask.masked_fill(~apart, torch.finfo(mask.dtype).min)

    def _layout(self, mask: Tensor | None, query: Tensor, kwargs: dict[str, Any]) -> Layout | None:
        batch, _, length, _ = query.shape
        bounds = packing(kwargs)
        if mask is None and bounds is not None:
            longest = kwargs.get("max_length_q")
            return Layout(bounds.int(), int(batch * length if longest is None else longest))
        if mask is not None and mask.dim() != 4:
            return None
        if mask is not None:
            return self._judge(mask, bounds, batch, length)
        # Where the model fills a cache, as it does by default, transformers makes no mask of packed position_ids.
        positions = _packed_positions(query, kwargs)
        if positions is None:
            return rows_layout(batch, length, query.device)
        return self._judge(positions, bounds, batch, length)

    @torch.compiler.disable
    def _judge(self, given: Tensor, bounds: Tensor | None, batch: int, length: int) -> Layout | None:
        """The layout by a mask ``[B, 1, L, L]`` or by position ids ``[1, L]``, found once for all layers."""
        tensors = [given] if bounds is None else [given, bounds]
        judged = self._judged.get(given.dim())
        if judged is not None and judged.is_of(tensors, (batch, length)):
            return judged.layout
        with torch.no_grad():
            if given.dim() == 2:
                steps = given[0].diff()
                jumps = steps != 1
                if bool((steps == steps[:1]).all()):  # every second position, say: one sequence, however it counts
                    jumps = torch.zeros_like(jumps)
                layout: Layout | None = _begins_layout(torch.nn.functional.pad(jumps, (1, 0), value=True))
            else:
                layout = mask_layout(given, batch, length)
            if layout is not None and bounds is not None:  # both hold: a sequence ends where either ends it
                layout = _refined(layout, bounds, batch * length)
        self._judged.pop(given.dim(), None)
        if not any(x.is_inference() for x in tensors):
            self._judged[given.dim()] = _Judged.of(tensors, (batch, length), layout)
        return layout


def train_state(model: nn.Module) -> TrainState | None:
    """The state of a model that ``unique_attn.enable(..., train=...)`` prepared, wrapped or not; None if it did not."""
    from unique_attn.hf.hooks import hook_of

    found = (hook.train for module in model.modules() if (hook := hook_of(module)) is not None)
    return next((state for state in found if state is not None), None)


def packing(kwargs: dict[str, Any]) -> Tensor | None:
    """``cu_seq_lens_q`` of a padding-free batch, or None.

    Raises:
        ValueError: queries and keys are packed differently.
    """
    queries, keys = (kwargs.get(name) for name in _PACKING)
    if queries is not None and keys is not None and queries is not keys and queries.shape != keys.shape:
        raise ValueError(
            f"cu_seq_lens_k: expected the sequences of cu_seq_lens_q, {queries.shape[0] - 1}, got {keys.shape[0] - 1}"
        )
    return queries


def _packed_positions(query: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """``position_ids`` ``[1, L]`` of a batch of one row, which may hold several sequences; None for others."""
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or query.shape[0] != 1 or tuple(positions.shape) != (1, query.shape[2]):
        return None
    return positions


def _refined(layout: Layout, bounds: Tensor, tokens: int) -> Layout | None:
    if layout.order is not None:
        return None
    begins = torch.zeros(tokens + 1, dtype=torch.bool, device=bounds.device)
    begins[layout.cu_seqlens.long()] = True
    begins[bounds.long()] = True
    return _begins_layout(begins[:tokens])


@torch.compiler.disable
@torch.no_grad()
def _gate_sums(q: Tensor, k: Tensor, layout: Layout, config: UniqueConfig, tau: Tensor, scale: float | None) -> Tensor:
    """fp32 ``[5]`` over a few queries ``[N, Hq, D]``: gates, gates in (0.05, 0.95), how many; kept mass, how many.

    Pages are scored by the op that decoding uses, the rest is plain PyTorch. Does not wait for the device.
    """
    bounds, longest = layout.cu_seqlens, layout.max_seqlen
    tokens, heads = k.shape[:2]
    rows = torch.linspace(0, tokens - 1, min(_SAMPLE, tokens) + 1, device=q.device)[1:].long()
    sequence = torch.searchsorted(bounds[1:].contiguous(), rows.int(), right=True)
    begin = bounds[sequence].long()
    position = rows - begin
    index = packed_index(
        k, bounds, longest, rule=config.rule, page_size=config.page_size, index_format=config.index_format
    )
    pages = torch.arange(-(-longest // config.page_size), device=q.device, dtype=torch.int32)
    table = (page_slots(bounds, config.page_size)[:, None] + pages)[sequence]
    scores = ops.page_scores(
        q[rows][:, None],
        index,
        table,
        (position + 1).int(),
        rule=config.rule,
        page_size=config.page_size,
        spread_weight=config.spread_weight,
        index_format=config.index_format,
    )[:, 0].float()
    last = position // config.page_size - config.recent_pages
    candidate = ((pages >= config.sink_pages) & (pages <= last[:, None]))[:, None].expand_as(scores)
    scores = scores.masked_fill(~candidate, -torch.inf)
    wanted = config.num_pages - config.sink_pages - config.recent_pages
    ordered = torch.nn.functional.pad(scores.sort(-1, descending=True).values, (0, wanted + 1), value=-torch.inf)
    full = ordered[..., wanted] > -torch.inf  # more candidates than wanted, so there is a boundary
    kept = ordered[..., wanted - 1] if wanted > 0 else torch.full_like(ordered[..., 0], torch.inf)
    theta = torch.where(full, (kept + ordered[..., wanted]) / 2, 0.0)[..., None]
    counted = candidate & full[..., None]
    gates = torch.where(counted, torch.sigmoid((scores - theta) / tau), 0.0)
    between = counted & (gates > 0.05) & (gates < 0.95)
    # Attention mass on what a query reads.
    group_q = q[rows].unflatten(1, (heads, -1))
    logits = torch.einsum("rhgd,nhd->rhgn", group_q, k).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    offset = torch.arange(tokens, device=q.device) - begin[:, None]
    seen = (offset >= 0) & (offset <= position[:, None])
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).sum(2)
    read = ~counted | (scores >= theta)
    of_page = (offset // config.page_size).clamp(0, scores.shape[-1] - 1)[:, None].expand_as(weights)
    mass = (weights * read.gather(-1, of_page)).sum(-1) / group_q.shape[2]
    sums = [gates.sum(), between.sum(), counted.sum(), torch.where(full, mass, 0.0).sum(), full.sum()]
    return torch.stack([x.float() for x in sums])
