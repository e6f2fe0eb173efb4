"""Files of ranks that are not all those of one save."""

from __future__ import annotations

from typing import Any

from anyckpt.errors import FormatError

GATHER = "gather the files of all ranks of one save"


def apart(problem: str, **facts: Any) -> FormatError:
    """The error for files of which others are missing or of another save."""
    return FormatError(problem, remedy=GATHER, **facts)
