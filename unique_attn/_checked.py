"""What the frozen config classes share: plain dictionaries in and out, and checks that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, TypeVar

Config = TypeVar("Config", bound="CheckedConfig")


@dataclass(frozen=True)
class CheckedConfig:
    """Base of an immutable config whose ``__post_init__`` checks every field."""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of all fields that :meth:`from_dict` (and JSON) can take."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The config with these fields, others at their defaults.

        Raises:
            TypeError: ``values`` is no mapping, or a field has the wrong type.
            ValueError: an unknown field, or a value that is not allowed.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}.from_dict: expected a mapping, got {type(values).__name__}")
        known = {each.name for each in fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(
                f"{cls.__name__}.from_dict: expected fields among {', '.join(sorted(known))}, got {', '.join(unknown)}"
            )
        return cls(**values)

    def _choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ValueError(f"{type(self).__name__}.{name}: expected one of {choices}, got {value!r}")

    def _number(self, name: str, *, positive: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{type(self).__name__}.{name}: expected a number, got {value!r}")
        if not isfinite(value) or value < 0 or (positive and value == 0):
            least = "above 0" if positive else "of at least 0"
            raise ValueError(f"{type(self).__name__}.{name}: expected a finite number {least}, got {value}")
