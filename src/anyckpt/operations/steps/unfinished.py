"""Removing what interrupted work left of one output, on a disk or in an object store."""

from __future__ import annotations

from contextlib import suppress

from anyckpt.engine import leftovers
from anyckpt.engine.destination import BusyError
from anyckpt.engine.leftovers import Leftover
from anyckpt.engine.names import UNFINISHED_NAME
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import OutputError
from anyckpt.operations.steps.writing import OBJECT_STORES
from anyckpt.storage.location import look_in, place_of
from anyckpt.storage.place import scheme_of


def is_in_store(path: str) -> bool:
    """Whether a path is in an object store."""
    return scheme_of(path) in OBJECT_STORES


def is_finished(path: str) -> bool:
    """Whether something is in an object store under a name, other than unfinished work.

    Raises:
        FormatError: that cannot be told.
    """
    place = place_of(path)
    return place.exists(path) and UNFINISHED_NAME not in look_in(place, path).names


def clear(path: str, *, overwrite: bool = False) -> None:
    """Remove what interrupted work left of an output, before it is written anew.

    Raises:
        BusyError: a process is at work on it.
        OutputError: the destination exists and is not to be replaced, or the system refuses.
    """
    if not is_in_store(path):
        StagingDirectory(path, overwrite=overwrite).clear()
        return
    for leftover in _in_store(path):
        if leftover.busy:
            raise BusyError("is being written by another process", path=path, remedy="wait for it to finish")
        leftover.remove()


def remove_abandoned(path: str) -> None:
    """Remove what is left of an output that nobody is at work on; as far as the system lets it."""
    if not is_in_store(path):
        with suppress(OSError):
            StagingDirectory(path).remove_abandoned()
        return
    with suppress(OutputError):
        for leftover in _in_store(path):
            if not leftover.busy:
                leftover.remove()


def discard(path: str) -> None:
    """Remove the work of all processes that wrote an output together and have given up."""
    if is_in_store(path):
        remove_abandoned(path)
    else:
        StagingDirectory(path).discard()


def _in_store(path: str) -> list[Leftover]:
    from anyckpt.storage.remote.objects import objects_at  # here, so that outputs on disks do not need obstore

    objects, key = objects_at(path)
    return [one for one in leftovers.in_store(objects, key) if one.output == objects.name_of(key)]
