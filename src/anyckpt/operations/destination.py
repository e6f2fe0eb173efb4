"""Refusing destinations that would destroy something, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence

from anyckpt.engine.manifest import MANIFEST_NAME
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.formats import registry


def check_destination(destination: str, sources: Sequence[str], *, overwrite: bool) -> None:
    """Raise unless ``destination`` can be written without touching a source or replacing what is no checkpoint.

    Args:
        destination: where the output goes.
        sources: paths that are read.
        overwrite: whether an existing checkpoint may be replaced.

    Raises:
        UsageError: the destination is a source, lies inside one, or holds one.
        OutputError: it exists, and may not be replaced.
    """
    target = os.path.realpath(destination)
    for source in sources:
        origin = os.path.realpath(source)
        if target == origin:
            raise UsageError("source and destination are the same", path=destination, remedy="choose another path")
        if target.startswith(origin + os.sep):
            raise UsageError("lies inside the source", path=destination, remedy="choose a path outside of it")
        if origin.startswith(target + os.sep):
            raise UsageError("holds the source", path=destination, remedy="choose another path")
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise OutputError("already exists", path=destination, remedy="choose another path or pass --overwrite")
    if os.path.isdir(destination) and not _replaceable(destination):
        raise OutputError(
            "is a directory that holds something else than a checkpoint, which --overwrite does not replace",
            path=destination,
            remedy="choose another path or remove it yourself",
        )


def _replaceable(directory: str) -> bool:
    location = registry.look_at(directory)
    if not location.names or MANIFEST_NAME in location.names:
        return True
    try:
        registry.detect(location)
    except FormatError:
        return False
    return True
