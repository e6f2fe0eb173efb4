"""Removing what runs left that did not come to their end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine import leftovers
from anyckpt.engine.destination import BusyError
from anyckpt.engine.leftovers import Leftover
from anyckpt.errors import UsageError
from anyckpt.operations.steps.writing import OBJECT_STORES
from anyckpt.storage.place import scheme_of


@dataclass(frozen=True)
class Cleaned:
    """What was found of dead runs, and removed.

    Attributes:
        path: where it was looked for.
        found: what is left of each output that no process is at work on.
        busy: outputs that a process is at work on, or may be; of these nothing is touched.
        removed: whether what was found is removed.
        notes: what a user should know.
    """

    path: str
    found: tuple[Leftover, ...]
    busy: tuple[str, ...] = ()
    removed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(leftover.nbytes for leftover in self.found)

    def to_json(self) -> dict[str, Any]:
        """As ``clean --json`` prints it."""
        found = [{"output": one.output, "paths": list(one.paths), "bytes": one.nbytes} for one in self.found]
        return {
            "path": self.path,
            "found": found,
            "bytes": self.nbytes,
            "busy": list(self.busy),
            "removed": self.removed,
            "notes": list(self.notes),
        }


def clean(path: str | os.PathLike[str], *, dry_run: bool = False) -> Cleaned:
    """Remove what dead runs left of outputs: directories that are not finished, objects, uploads, notes and claims.

    A checkpoint that is whole is never touched, nor what a living process is at work on.  In an object store a process
    of another machine counts as dead when it has said nothing for ``claim.WATCHED_FOR`` seconds, which are waited for.

    Args:
        path: an output, whether it is there or not, or a folder of outputs; in an object store, of any depth.
        dry_run: say what there is, and remove nothing.

    Raises:
        UsageError: the path is in a place where no run leaves anything.
        OutputError: the system or the store refuses.
    """
    found, notes = look_for_leftovers(path)
    dead = tuple(one for one in found if not one.busy)
    busy = [one.output for one in found if one.busy]
    if not dry_run:
        busy += remove(dead)
    told = tuple(one for one in dead if one.output not in busy)
    return Cleaned(os.fspath(path), told, tuple(busy), not dry_run, notes)


def look_for_leftovers(path: str | os.PathLike[str]) -> tuple[list[Leftover], tuple[str, ...]]:
    """What dead and living runs have at a path, and what a user should know of it.

    Raises:
        UsageError: the path is in a place where no run leaves anything.
        OutputError: the system or the store refuses.
    """
    text = os.fspath(path)
    scheme = scheme_of(text)
    if scheme is None:
        return list(leftovers.on_disk(text)), ()
    if scheme not in OBJECT_STORES:
        raise UsageError("is a place where no run leaves anything", path=text, expected="a disk or an object store")
    from anyckpt.storage.remote.objects import objects_at

    objects, key = objects_at(text)
    return list(leftovers.in_store(objects, key)), objects.weaker


def remove(found: Sequence[Leftover]) -> list[str]:
    """Remove what was found; the outputs that a process has come to meanwhile.

    Raises:
        OutputError: the system or the store refuses.
    """
    busy = []
    for leftover in found:
        try:
            leftover.remove()
        except BusyError:
            busy.append(leftover.output)
    return busy
