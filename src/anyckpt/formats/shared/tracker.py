"""The tracker file of a Megatron training root, which names the newest iteration."""

from __future__ import annotations

import re

from anyckpt.errors import FormatError
from anyckpt.storage.place import Location

TRACKER = "latest_checkpointed_iteration.txt"
_TRACKER_LIMIT = 64


def iteration_folder(location: Location) -> Location:
    """The directory that the tracker file of a training root names: ``iter_0000010`` or ``release``.

    Megatron-LM ``training/checkpointing.py`` writes the number, or the word ``release``, in ASCII.

    Raises:
        FormatError: the tracker is unreadable, or the directory is missing.
    """
    source = location.open(TRACKER)
    text = source.read_all(_TRACKER_LIMIT).decode("ascii", "replace").strip()
    if text != "release" and not re.fullmatch(r"\d{1,18}", text):
        raise FormatError(
            "does not name an iteration", path=source.name, expected="a number or the word 'release'", found=repr(text)
        )
    name = text if text == "release" else f"iter_{int(text):07d}"
    if name not in location.names:
        raise FormatError(
            f"names {name}, which is missing",
            path=source.name,
            found=", ".join(n for n in location.names if n.startswith("iter_")) or "no iteration at all",
            remedy="open one of the iterations that are there",
        )
    return location.at(name)
