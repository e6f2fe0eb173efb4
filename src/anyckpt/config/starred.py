"""Patterns of names in which a star stands for a number, the same in every pattern of a pair."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

NUMBER = r"(\d{1,7})"
SEGMENT = r"[^.]+"
"""Another meaning of a star: what is between two dots."""


@cache
def starred(pattern: str, star: str = NUMBER) -> re.Pattern[str]:
    """What matches the names of a pattern; its groups are the numbers."""
    return re.compile(re.escape(pattern).replace(r"\*", star))


def filled(pattern: str, numbers: Iterable[str]) -> str:
    """The name of a pattern with these numbers."""
    pieces = pattern.split("*")
    return pieces[0] + "".join(number + piece for number, piece in zip(numbers, pieces[1:], strict=True))
