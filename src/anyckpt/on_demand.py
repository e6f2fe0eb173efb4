"""Names of a module that are imported when they are first used, so that importing it costs next to nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any


def on_demand(module: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a module takes for its ``__getattr__`` and ``__dir__``.

    Args:
        module: the module's own name.
        where: name -> the module of this package that has it, as ``tensor``; with ``:`` and the name there if it is
            another, as ``operations.steps.joining:open_checkpoint``; with nothing after ``:`` for the module itself.
    """

    def find(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        from importlib import import_module

        home, colon, inner = where[name].partition(":")
        found = import_module(f"anyckpt.{home}")
        value = found if colon and not inner else getattr(found, inner or name)
        setattr(sys.modules[module], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[module]), *where})

    return find, names
