"""The model families that anyckpt knows: its own, and those that other packages register.

A family is a ``models.family.Family``.  Another package adds one through the entry point group
``anyckpt.families``, whose value is a ``Family``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from anyckpt.errors import UsageError
from anyckpt.models.family import Family

_BUILT_IN = ("mistral", "llama")
"""Modules of this package, each with ``FAMILY``; where several fit a configuration, the first is it."""

_loaded: dict[str, Family] = {}


def known_families() -> dict[str, Family]:
    """Every family by name, in the order in which a configuration that does not name its family is tried."""
    if not _loaded:
        for entry in entry_points(group="anyckpt.families"):
            extra: Any = entry.load()
            _loaded[extra.name] = extra
        for module in _BUILT_IN:
            known: Family = import_module(f"anyckpt.models.families.{module}").FAMILY
            _loaded[known.name] = known
    return dict(_loaded)


def by_name(name: str) -> Family:
    """The family called ``name``.

    Raises:
        UsageError: there is none.
    """
    known = known_families()
    if name not in known:
        raise UsageError(
            f"unknown model family {name!r}",
            expected=f"one of {', '.join(sorted(known))}",
            remedy="leave --family out to convert names unchanged, or register the family (docs: add a family)",
        )
    return known[name]
