"""What makes two pieces of work the same: everything that the bytes of a source, tensor or function depend on.

An interrupted run may only be continued by one that would have written the same bytes.  Shapes and names do not tell;
so whatever takes part in a plan says itself what it is, by a method ``identity``.  It gives a tuple of plain values,
element types, numpy arrays, functions that can be imported, and other things with an identity, or None if nothing
identifies it, as with live training state, which may be another a moment later.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any

Identity = tuple[Any, ...]

_FIELDS: dict[type, tuple[str, ...]] = {}  # names of a class's fields, which are the same for all that are of it


class OfFields:
    """What is a frozen dataclass, all of it in its fields."""

    def identity(self) -> Identity:
        names = _FIELDS.get(type(self))
        if names is None:
            names = _FIELDS[type(self)] = tuple(field.name for field in fields(self))  # type: ignore[arg-type]
        return tuple([getattr(self, name) for name in names])


class ElementWise(OfFields, ABC):
    """An element-wise function of arrays that says what it computes: a frozen dataclass, all of it in its fields."""

    @abstractmethod
    def __call__(self, *arrays: Any) -> Any:
        """From arrays of the operands' numpy types to one of the result's; may be called in any thread."""

    def into(self, out: Any, *arrays: Any) -> None:
        """The same, put into ``out``, an array of the result's numpy type that none of the operands shares."""
        out[...] = self(*arrays)


def identity_of(value: Any) -> Identity | None:
    """What ``value`` says of itself; of a function that can be imported, its name; None if nothing is known."""
    said = getattr(value, "identity", None)
    if callable(said):
        known: Identity | None = said()
        return known
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", getattr(value, "__name__", None))
    if type(value).__module__ == "numpy" and type(value).__name__ == "ufunc":
        module = "numpy"
    if not isinstance(module, str) or not isinstance(name, str) or "." in name:
        return None
    return (module, name) if getattr(sys.modules.get(module), name, None) is value else None
