"""How far numbers may be apart and count as equal, for each element type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import FormatError, UsageError


@dataclass(frozen=True)
class Tolerance:
    """``|a - b| <= absolute + relative * |b|`` counts as equal; with both zero only equal bits do."""

    relative: float = 0.0
    absolute: float = 0.0

    @property
    def exact(self) -> bool:
        return not self.relative and not self.absolute


@dataclass(frozen=True)
class Tolerances:
    """A tolerance for each element type.

    Attributes:
        relative: type's name -> relative tolerance; ``""`` -> that of all others.
        absolute: likewise.
    """

    relative: Mapping[str, float] = field(default_factory=dict)
    absolute: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, relative: float | Mapping[str, float], absolute: float | Mapping[str, float]) -> Tolerances:
        """From one number for all types, or numbers by any spelling of a type's name.

        Raises:
            UsageError: one is negative or no number, or of no element type.
        """
        return cls(_by_name(relative, "rtol"), _by_name(absolute, "atol"))

    def for_types(self, a: DType, b: DType) -> Tolerance:
        """That of two tensors: of two types the larger one, for the coarser type decides how near numbers can be."""
        return Tolerance(*(max(_of(which, kind) for kind in (a, b)) for which in (self.relative, self.absolute)))


def _of(which: Mapping[str, float], kind: DType) -> float:
    return which.get(kind.name, which.get("", 0.0))


def _by_name(given: float | Mapping[str, float], word: str) -> dict[str, float]:
    numbers = given if isinstance(given, Mapping) else {"": given}
    result = {}
    for name, value in numbers.items():
        if not value >= 0:
            raise UsageError("a tolerance cannot be negative", found=f"{word} {f'{name}=' * bool(name)}{value}")
        try:
            result[name and dtype(name).name] = value
        except FormatError as error:
            raise UsageError(
                f"{word} is for an element type that is not known", expected=error.expected, found=name
            ) from None
    return result
