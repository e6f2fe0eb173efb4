"""Choosing tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def as_patterns(globs: str | Sequence[str] | None) -> tuple[str, ...]:
    """One glob, several, or none, as several."""
    if globs is None:
        return ()
    return (globs,) if isinstance(globs, str) else tuple(globs)


def matching(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    """The names that match any of the globs (``*`` also matches dots), in their order."""
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
