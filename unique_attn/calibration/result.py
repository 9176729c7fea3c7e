"""What a calibration found: a row for each setting, and the setting to take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unique_attn.config import UniqueConfig


@dataclass(frozen=True)
class Row:
    """One setting, over all texts.

    Attributes:
        config: the setting; None for dense attention.
        kl: of the next tokens' distributions from those of dense attention, nats, mean over tokens and texts.
        top1: share of tokens whose likeliest next token is that of dense attention.
        perplexity: of the texts' own next tokens.
        mass: share of dense attention's softmax that the selected pages hold, by sparse layer; mean over heads, tokens
            and texts.
        found: needles whose answer's tokens were all the likeliest ones.
        needles: how many there were.
        needle_nll: nats per token of the answers, NaN without needles.
        bytes_per_token: of keys, values and index that a decode step reads for one sequence, all layers.
    """

    config: UniqueConfig | None
    kl: float
    top1: float
    perplexity: float
    mass: Mapping[int, float]
    found: int
    needles: int
    needle_nll: float
    bytes_per_token: int

    @property
    def mean_mass(self) -> float:
        return sum(self.mass.values()) / len(self.mass) if self.mass else 1.0

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["config"] = None if self.config is None else self.config.to_dict()
        values["mass"] = {int(layer): round(share, 5) for layer, share in self.mass.items()}
        values["needle_nll"] = None if math.isnan(self.needle_nll) else self.needle_nll
        return values


@dataclass(frozen=True)
class Calibration:
    """The rows of :func:`.calibrate`.

    Attributes:
        dense: the row of dense attention.
        rows: one for each setting, in the order in which they were measured.
        tolerance: the largest KL that :attr:`recommended` may have.
        texts: tokens of each text.
        tail: tokens of each text whose next tokens were compared.
    """

    dense: Row
    rows: Sequence[Row]
    tolerance: float
    texts: Sequence[int]
    tail: int
    environment: Mapping[str, Any] = field(default_factory=dict)

    def accepted(self) -> list[Row]:
        """Rows within the tolerance that find as many needles as dense attention, those that read least first."""
        good = [row for row in self.rows if row.kl <= self.tolerance and row.found >= self.dense.found]
        return sorted(good, key=lambda row: (row.bytes_per_token, row.kl))

    @property
    def recommended(self) -> UniqueConfig | None:
        """The setting that reads least among those within the tolerance; None if there is none."""
        accepted = self.accepted()
        return accepted[0].config if accepted else None

    def to_dict(self) -> dict[str, Any]:
        recommended = self.recommended
        return {
            "environment": dict(self.environment),
            "texts": list(self.texts),
            "tail": self.tail,
            "tolerance": self.tolerance,
            "dense": self.dense.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "recommended": None if recommended is None else recommended.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")

    def table(self) -> str:
        """One line for each setting, dense attention first; the recommended one is marked."""
        best = next(iter(self.accepted()), None)
        titles = ["", "rule", "page", "budget", "dense layers", "KL", "top-1", "perplexity", "mass", "read", "needles"]
        lines = [titles, self._cells(self.dense, "")]
        for row in self.rows:
            lines.append(self._cells(row, "*" if row is best else ""))
        if not self.dense.needles:
            lines = [line[:-1] for line in lines]
        if not any(row.config is not None and row.config.dense_layers for row in self.rows):
            lines = [[cell for i, cell in enumerate(line) if i != 4] for line in lines]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        left = 2
        return "\n".join(
            "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
            for line in lines
        )

    def _cells(self, row: Row, mark: str) -> list[str]:
        c = row.config
        return [
            mark,
            "dense" if c is None else c.rule,
            "" if c is None else str(c.page_size),
            "" if c is None else str(c.budget),
            "" if c is None else " ".join(map(str, c.dense_layers)),
            f"{row.kl:.4f}",
            f"{100 * row.top1:.1f}%",
            f"{row.perplexity:.2f}",
            f"{100 * row.mean_mass:.1f}%",
            f"{100 * row.bytes_per_token / self.dense.bytes_per_token:.1f}%",
            f"{row.found}/{row.needles}",
        ]

    def plot(self, path: str | Path) -> None:
        """Draw KL against budget for each rule and page size, and the kept share of attention by layer.

        Raises:
            ImportError: without matplotlib.
        """
        from unique_attn.calibration.picture import draw

        draw(self, path)
