"""What a user can choose of training: the mask, its temperature, and how both change while training runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Any

from unique_attn._checked import CheckedConfig

MODES = ("soft", "hard", "dense")
SCHEDULES = ("constant", "linear", "cosine", "exponential")


def check_progress(name: str, progress: Any) -> float:
    """``progress`` as a float from 0 to 1.

    Raises:
        TypeError: it is no number.
        ValueError: it is not from 0 to 1. Both begin with ``name``.
    """
    if isinstance(progress, bool) or not isinstance(progress, (int, float)):
        raise TypeError(f"{name}: expected a number, got {progress!r}")
    if not 0 <= progress <= 1:  # NaN fails this too
        raise ValueError(f"{name}: expected a share of the training from 0 to 1, got {progress}")
    return float(progress)


MOST_TAU = 1e20


@dataclass(frozen=True)
class TrainConfig(CheckedConfig):
    """Settings of sparsity-aware training (UNIQUE section 4). Immutable and checked, as :class:`UniqueConfig` is.

    Rule, page size, budget, fixed pages and dense layers are those of the :class:`UniqueConfig` it is used with. Its
    ``dense_below`` is for decoding only: training masks short contexts too, if they exceed the budget.

    Attributes:
        mode: mask of the attention at the start: ``soft`` (gates), ``hard`` (the selected pages only, as in decoding)
            or ``dense``.
        tau: temperature of the gates at the start, 1e-20 to 1e20, in score units (raw q . k). Of 1, 4 and 16 the
            default retrieved best on SmolLM2-135M-Instruct; scores of other models have other scales.
        tau_end: temperature at the end of the schedule, likewise; for every schedule but ``constant``.
        schedule: way from ``tau`` to ``tau_end``: ``constant``, ``linear``, ``cosine`` (half a period) or
            ``exponential`` (a constant factor per step). It ends where the mode becomes hard, else with the training.
        hard_after: share of the training, 0 to 1, from which on the mode is ``hard``; ``None`` means never.
        log_every: optimizer steps between two statistics of the gates; 0 means none, ``None`` the Trainer's
            ``logging_steps`` (also where it logs by epochs, which then repeat the last ones). For
            :class:`unique_attn.hf.SparsityCallback`.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that is not allowed. Both name the field, what is expected and what it got.
    """

    mode: str = "soft"
    tau: float = 4.0
    tau_end: float | None = None
    schedule: str = "constant"
    hard_after: float | None = None
    log_every: int | None = None

    def __post_init__(self) -> None:
        self._choice("mode", MODES)
        self._choice("schedule", SCHEDULES)
        for name in ("tau", "tau_end"):
            if name == "tau" or self.tau_end is not None:
                self._number(name, positive=True)
                if not 1 / MOST_TAU <= getattr(self, name) <= MOST_TAU:  # gradients of gates have its inverse, in fp32
                    raise ValueError(
                        f"TrainConfig.{name}: expected {1 / MOST_TAU:g} to {MOST_TAU:g}, got {getattr(self, name)}"
                    )
        if (self.tau_end is None) != (self.schedule == "constant"):
            expected = "None" if self.schedule == "constant" else "a positive number"
            raise ValueError(
                f"TrainConfig.tau_end: expected {expected} with schedule {self.schedule!r}, got {self.tau_end}"
            )
        if self.hard_after is not None:
            check_progress("TrainConfig.hard_after", self.hard_after)
        if self.log_every is not None:
            if isinstance(self.log_every, bool) or not isinstance(self.log_every, int):
                raise TypeError(f"TrainConfig.log_every: expected an integer or None, got {self.log_every!r}")
            if self.log_every < 0:
                raise ValueError(f"TrainConfig.log_every: expected at least 0, got {self.log_every}")

    def mode_at(self, progress: float) -> str:
        """The mode when this share of the training, 0 to 1, is done."""
        progress = check_progress("progress", progress)
        return "hard" if self.hard_after is not None and progress >= self.hard_after else self.mode

    def tau_at(self, progress: float) -> float:
        """The temperature when this share of the training, 0 to 1, is done."""
        progress = check_progress("progress", progress)
        if self.tau_end is None:
            return float(self.tau)
        end = 1.0 if self.hard_after is None else self.hard_after
        if progress >= end:
            return float(self.tau_end)
        part = progress / end
        if self.schedule == "exponential":
            return float(self.tau * (self.tau_end / self.tau) ** part)
        if self.schedule == "cosine":
            part = (1 - cos(pi * part)) / 2
        return float(self.tau + (self.tau_end - self.tau) * part)
