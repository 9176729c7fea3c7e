"""What a user can choose: how pages are scored and how many are read, how prompts are, which layers stay dense."""

from __future__ import annotations

from dataclasses import dataclass, field

from unique_attn._checked import CheckedConfig
from unique_attn.prefill_methods import PREFILL_METHODS
from unique_attn.rules import INDEX_FORMATS, MAX_PAGES, PAGE_SIZES, RULES, WEIGHTS


@dataclass(frozen=True)
class UniqueConfig(CheckedConfig):
    """Settings of page-sparse decoding and of sparse prefill. Immutable and checked: every field is valid once an
    instance exists.

    Attributes:
        rule: how a page is scored: ``directional`` (default), ``unique`` (the paper), ``minmax`` (Quest) or
            ``mean``.
        page_size: tokens per page: 4, 8, 16, 32 or 64.
        budget: tokens a query attends to, per KV head; a multiple of ``page_size``. Sink and recent pages count.
        sink_pages: first pages of a sequence that are always read.
        recent_pages: last pages up to the query's own that are always read. 0 needs ``max_decode_tokens=1``: of several
            tokens at once, the page of one has an entry that those behind it are part of.
        lambda_: weight of the spread in the ``unique`` rule.
        c: standard deviations that the ``directional`` rule adds to the mean.
        block_size: tokens per physical block of the paged storage; a multiple of ``page_size``.
        index_format: storage of the page index: ``exact`` keeps it in the keys' dtype, ``compressed`` in about 7 bits
            per channel of a page (not for ``minmax``; not for training with soft gates).
        dense_below: contexts of fewer tokens use dense attention; ``None`` means ``budget``, below which sparse
            attention would read everything anyway. On CUDA they are on pages even so, unless it is more than
            ``budget``: all pages are read, in captured steps.
        dense_layers: indices of layers that always use dense attention.
        max_decode_tokens: a call with at most this many new tokens on a cache that is not empty is a decode
            step (one token, or the drafts of speculative decoding); with more it is prefill.
        prefill: how prompts attend: ``dense`` (default), or to the key blocks that ``directional`` or ``unisparse``
            (the paper) selects, if they are longer than ``prefill_above``.
        threshold: share of a query's attention, 0 to 1, from which on a key block is kept in prefill.
        top_p: share of the attention of a query block, 0 to 1 (all blocks), that the kept blocks have. At most one of
            these two; without, the default of the method.
        graphs: ``auto`` (default): an enabled model on CUDA runs its decode steps from CUDA graphs where it can;
            ``off``: never.
        prefill_above: rows whose context is at most as many tokens, new ones included and padding not, prefill densely.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that is not allowed. Both name the field, what is expected and what it got.
    """

    rule: str = "directional"
    page_size: int = 8
    budget: int = 512
    sink_pages: int = 1
    recent_pages: int = 1
    lambda_: float = WEIGHTS["lambda_"]
    c: float = WEIGHTS["c"]
    block_size: int = 64
    index_format: str = "exact"
    dense_below: int | None = None
    dense_layers: tuple[int, ...] = field(default=())
    max_decode_tokens: int = 32
    prefill: str = "dense"
    threshold: float | None = None
    top_p: float | None = None
    prefill_above: int = 8192
    graphs: str = "auto"

    def __post_init__(self) -> None:
        self._choice("rule", tuple(RULES))
        self._integer("page_size", 1)
        self._choice("page_size", PAGE_SIZES)
        self._integer("budget", 1)
        self._multiple("budget", self.page_size)
        self._integer("sink_pages", 0)
        self._integer("recent_pages", 0)
        for name in ("lambda_", "c"):
            self._number(name)
        self._integer("block_size", 1)
        self._multiple("block_size", self.page_size)
        self._choice("index_format", tuple(INDEX_FORMATS))
        if self.index_format != "exact" and not RULES[self.rule].compressible:
            raise ValueError(
                f"UniqueConfig.index_format: expected exact with rule {self.rule!r}, got {self.index_format!r}"
            )
        if self.dense_below is not None:
            self._integer("dense_below", 0)
        self._layers("dense_layers")
        self._integer("max_decode_tokens", 1)
        if self.recent_pages == 0 and self.max_decode_tokens > 1:
            raise ValueError(
                "UniqueConfig.recent_pages: expected at least 1 with max_decode_tokens above 1, where a token would be "
                f"selected for by those behind it, got 0 with {self.max_decode_tokens}"
            )
        self._choice("graphs", ("auto", "off"))
        self._choice("prefill", ("dense", *PREFILL_METHODS))
        for name in ("threshold", "top_p"):
            self._share(name)
        if self.threshold is not None and self.top_p is not None:
            raise ValueError(f"UniqueConfig.top_p: expected None with a threshold, got {self.top_p}")
        self._integer("prefill_above", 0)
        if self.num_pages > MAX_PAGES:
            raise ValueError(
                f"UniqueConfig.budget: expected at most {MAX_PAGES} pages of {self.page_size} tokens, got {self.budget}"
            )
        forced = self.sink_pages + self.recent_pages
        if forced > self.num_pages:
            raise ValueError(
                f"UniqueConfig.budget: expected room for sink_pages + recent_pages = {forced} pages of "
                f"{self.page_size} tokens, got {self.budget} tokens"
            )

    @property
    def num_pages(self) -> int:
        """``budget // page_size``, the pages that a query reads (k in the paper)."""
        return self.budget // self.page_size

    @property
    def spread_weight(self) -> float:
        """``lambda_`` or ``c``, the rule's weight of a page's spread; a rule's default if it has no field here."""
        info = RULES[self.rule]
        return float(getattr(self, info.weight_name, info.weight) if info.weight_name else info.weight)

    @property
    def dense_limit(self) -> int:
        """``dense_below`` with its default filled in."""
        return self.budget if self.dense_below is None else self.dense_below

    # ---- Checks. ----

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"UniqueConfig.{name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"UniqueConfig.{name}: expected at least {least}, got {value}")

    def _multiple(self, name: str, unit: int) -> None:
        value = getattr(self, name)
        if value % unit:
            raise ValueError(f"UniqueConfig.{name}: expected a multiple of page_size = {unit}, got {value}")

    def _share(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        self._number(name)
        if value > 1:
            raise ValueError(f"UniqueConfig.{name}: expected a share from 0 to 1, got {value}")
        if self.prefill == "dense":
            raise ValueError(f"UniqueConfig.{name}: expected None with prefill 'dense', got {value}")

    def _layers(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, (str, bytes)) or not isinstance(value, (tuple, list, set, frozenset, range)):
            raise TypeError(f"UniqueConfig.{name}: expected a tuple of layer indices, got {value!r}")
        for layer in value:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"UniqueConfig.{name}: expected layer indices, got {layer!r}")
            if layer < 0:
                raise ValueError(f"UniqueConfig.{name}: expected layer indices of at least 0, got {layer}")
        object.__setattr__(self, name, tuple(sorted(set(value))))  # hashable, and equal however it was written
