"""What is done to a run's folder in an object store as it fills, where nothing is renamed, linked or locked.

A checkpoint that goes is first marked as unfinished, with what belongs to it, then its manifest goes, then the rest and
the mark last: whenever this is interrupted, it is either whole or what ``clean`` removes.  Two processes that delete at
once delete the same; each decides by the notes that are there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from anyckpt.engine.destination import BusyError
from anyckpt.engine.leftovers import in_store
from anyckpt.engine.names import MANIFEST_NAME, UNFINISHED_NAME
from anyckpt.engine.object_destination import beside
from anyckpt.formats.shared.tracker import TRACKER, iteration_number
from anyckpt.operations.retention import Retention, Saved, deleted
from anyckpt.operations.run_folder import NOTE, note_path, note_text, read_note
from anyckpt.storage.objects import Objects
from anyckpt.storage.remote.objects import objects_at


def write_note(path: str, saved: Saved) -> None:
    """See ``run_upkeep.write_note``."""
    objects, key = objects_at(note_path(path))
    objects.put(key, note_text(saved).encode())


def noted(folder: str) -> list[Saved]:
    """The checkpoints in a folder that have a note, and are there."""
    objects, key = objects_at(folder)
    return [note for name in _noted(objects, key) if (note := read_note(f"{folder.rstrip('/')}/{name}")) is not None]


def published(folder: str, rules: Retention) -> list[str]:
    """See ``run_upkeep.published``; nothing but Megatron's tracker points to the newest, for a store has no links."""
    there = noted(folder)
    if not there:
        return []
    newest = max(there, key=lambda one: (one.step, one.time, one.name))
    number = iteration_number(newest.name)
    if number is not None:
        objects, key = objects_at(folder)
        objects.put(_below(key, TRACKER), str(number).encode())
    going = [f"{folder.rstrip('/')}/{one.name}" for one in deleted(there, rules)]
    for path in going:
        delete(path)
    return going


def delete(path: str) -> None:
    """See ``run_upkeep.delete``."""
    objects, key = objects_at(path)
    _, note = objects_at(note_path(path))
    inside = list(objects.listed(key))
    if inside:
        marker, manifest = f"{key}/{UNFINISHED_NAME}", f"{key}/{MANIFEST_NAME}"
        names = [one.removeprefix(f"{key}/") for one in inside if one != marker]
        objects.put(marker, json.dumps({"anyckpt_unfinished": 1, "plan": "", "files": names}).encode())
        objects.delete([manifest])
        objects.delete([one for one in inside if one not in (marker, manifest)])
        objects.delete([marker])
    objects.delete([key, beside(key), note])


def clean(folder: str, before: float) -> list[str]:
    """Remove what interrupted work left in a folder; other software's is not looked for.

    Args:
        folder: which.
        before: notes of what is not there go if they were written before that, in seconds since 1970.

    Returns:
        the outputs of which something was removed, and notes.
    """
    objects, key = objects_at(folder)
    removed = []
    for leftover in in_store(objects, key):
        if leftover.busy or leftover.output == objects.name_of(key):
            continue
        try:
            leftover.remove()
        except BusyError:
            continue
        removed.append(leftover.output)
    there = objects.listed(key)
    whole = _noted(objects, key)
    notes = [
        one
        for one, facts in there.items()
        if (name := _note_of(one, key)) is not None and name not in whole and facts.modified.timestamp() < before
    ]
    objects.delete(notes)
    return [*removed, *map(objects.name_of, notes)]


def _noted(objects: Objects, key: str) -> Sequence[str]:
    """Names in a folder that have a note and are there."""
    there = objects.listed(key)
    prefix = _below(key, "")
    names = {one.removeprefix(prefix).partition("/")[0] for one in there}
    return [name for one in there if (name := _note_of(one, key)) is not None and name in names]


def _note_of(key: str, folder: str) -> str | None:
    """Of what a note is; None if it is no note right in the folder."""
    name = key.removeprefix(_below(folder, ""))
    if "/" in name or not name.startswith(".") or not name.endswith(f".{NOTE}"):
        return None
    return name[1 : -len(NOTE) - 1]


def _below(key: str, name: str) -> str:
    return f"{key}/{name}" if key else name
