"""Formats, one module or package each; calling the package, ``anyckpt.formats()``, tells which there are."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyckpt.facts import FormatFacts


class _Formats(ModuleType):
    """This package, which is also the function of its name: Python sets ``anyckpt.formats`` when it imports it."""

    def __call__(self) -> dict[str, FormatFacts]:
        """Every format by name; see ``registry.facts``."""
        from anyckpt.formats.registry import facts

        return facts()


sys.modules[__name__].__class__ = _Formats
