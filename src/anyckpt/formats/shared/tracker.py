"""The tracker file of a Megatron training root, which names the newest iteration."""

from __future__ import annotations

import re

from anyckpt.errors import FormatError
from anyckpt.storage.location import Location

TRACKER = "latest_checkpointed_iteration.txt"
_TRACKER_LIMIT = 64
_ITERATION = re.compile(r"iter_(\d{7,18})", re.ASCII)


def iteration_number(name: str) -> int | None:
    """The iteration that a folder's name tells, None if none."""
    found = _ITERATION.fullmatch(name)
    return None if found is None else int(found[1])


def iteration_folder(location: Location) -> Location:
    """The directory that the tracker file of a training root names: ``iter_0000010`` or ``release``.

    Megatron-LM ``training/checkpointing.py`` writes the number, or the word ``release``, in ASCII.

    Raises:
        FormatError: the tracker is empty or unreadable, or what it names is missing.
    """
    source = location.open(TRACKER)
    text = source.read_all(_TRACKER_LIMIT).decode("ascii", "replace").strip()
    present = ", ".join(name for name in location.names if name == "release" or _ITERATION.fullmatch(name))
    if text != "release" and not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise FormatError(
            "does not name an iteration" if text else "is empty and does not name an iteration",
            path=source.name,
            expected="a number or the word 'release'",
            found=repr(text) if text else None,
            remedy=f"open one of the iterations that are there: {present or 'none'}",
        )
    name = text if text == "release" else f"iter_{int(text):07d}"
    if name not in location.names or not location.is_folder(name):
        raise FormatError(
            f"names {name}, which is missing",
            path=source.name,
            expected=location.join(name),
            found=present or "no iteration at all",
            remedy="open one of the iterations that are there; the newest save may be unfinished or deleted",
        )
    return location.at(name)
