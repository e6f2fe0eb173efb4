"""Which checkpoints are whole in the folder in which a training run keeps them, of any format and whoever wrote them.

A checkpoint is whole if its format opens it and finds all of it: every file that its index needs, every byte range
inside its file, the marker that is written last where the format has one, and, where anyckpt wrote a directory, every
file of the manifest at its size.  Contents are not read; ``verify`` does that.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice

from anyckpt.data_classes import dataclass
from anyckpt.engine.manifest import check_sizes, read_manifest
from anyckpt.errors import LastingError, UnfinishedError
from anyckpt.formats import registry
from anyckpt.formats.shared.unfinished import averaged_from
from anyckpt.operations.retention import Saved
from anyckpt.storage.local_file import close_open_files
from anyckpt.storage.location import look_in, place_of
from anyckpt.storage.place import scheme_of

NOTE = "anyckpt-save.json"
"""``.NAME.anyckpt-save.json`` beside a checkpoint says what its trainer said of it: step, time, metric."""

_STEP = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt)[-_=]*(\d+)", re.IGNORECASE | re.ASCII)
_NOTE_LIMIT = 1 << 16


@dataclass(frozen=True)
class Candidate:
    """What may be a checkpoint in a run's folder.

    Attributes:
        path: of the file or directory.
        step: optimizer steps, as its note, its name or else the checkpoint itself tells; None if nothing does.
        time: when it was last written, or, where a note says so, saved; seconds since 1970.  In an object store 0
            where no note says it.
        metric: as its note tells.
    """

    path: str
    step: int | None
    time: float
    metric: float | None = None

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(frozen=True)
class Condition:
    """What is known of a candidate.

    Attributes:
        problem: why it is no whole checkpoint; empty if it is one.
        unfinished: whether saving or deleting it did not come to its end, or still goes on.
        step: optimizer steps, as it tells itself.
    """

    problem: str = ""
    unfinished: bool = False
    step: int | None = None


def latest(folder: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in a run's folder, of any format; None if there is none, or no folder.

    The newest has the most steps, as the note of who saved it, its name (``step-100``, ``iter_0000100``,
    ``epoch=1-step=100.ckpt``, ``checkpoint-100``) or the checkpoint itself tells; of those with equally many, it is
    the one that was saved last; one that has no number of steps is older than all that have one.  Links are not
    followed, so that a pointer never counts as a checkpoint.

    Raises:
        FormatError: the folder cannot be listed.
    """
    return next((found.path for found in newest_first(folder) if not condition(found.path).problem), None)


def newest_first(folder: str | os.PathLike[str]) -> Iterator[Candidate]:
    """Everything in a run's folder that may be a checkpoint; it is opened only where its name does not tell the step.

    The second file of a pair (``x-EMA.ckpt`` beside ``x.ckpt``) has averaged weights, with which no run goes on.

    Raises:
        FormatError: the folder cannot be listed.
    """
    found = []
    every = candidates(folder)
    names = {one.name for one in every}
    for one in every:
        if averaged_from(one.name) in names:
            continue
        if one.step is None:
            known = condition(one.path)
            if known.problem:
                continue
            one = replace(one, step=known.step)
        found.append(one)
    found.sort(key=lambda one: (one.step is not None, one.step or 0, one.time, one.name), reverse=True)
    yield from found


def candidates(folder: str | os.PathLike[str]) -> list[Candidate]:
    """What lies in a run's folder and is neither hidden nor a link.

    Raises:
        FormatError: the folder cannot be listed.
    """
    root = os.fspath(folder)
    place = place_of(root)
    if not place.is_folder(root):
        return []
    on_disk = scheme_of(root) is None
    found = []
    for name in look_in(place, root).names:
        path = os.path.join(root, name)
        if name.startswith(".") or os.path.islink(path):
            continue
        try:
            written = os.stat(path).st_mtime if on_disk else 0.0
        except OSError:
            continue  # it has gone since
        note = read_note(path)
        numbers = _STEP.findall(name)
        step = int(numbers[-1]) if numbers else None
        found.append(
            Candidate(path, step, written) if note is None else Candidate(path, note.step, note.time, note.metric)
        )
    return found


def condition(path: str) -> Condition:
    """Whether what is at ``path`` is a whole checkpoint; reads indices and headers, no tensors."""
    try:
        checkpoint = registry.read(path)
        step = checkpoint.training.step
        if checkpoint.unloadable:
            return Condition(checkpoint.unloadable[0], checkpoint.unfinished, step)
        for tensor in checkpoint.tensors.values():
            for piece in tensor.pieces():
                piece.check()
        place = place_of(path)
        manifest = read_manifest(path, place) if place.is_folder(path) else None
    except LastingError as error:
        return Condition(str(error), isinstance(error, UnfinishedError))
    finally:
        close_open_files()  # it may be deleted while this process lives on
    missing = [] if manifest is None else list(islice(check_sizes(path, manifest, place), 1))
    return Condition(missing[0] if missing else "", step=step)


# -- notes ---------------------------------------------------------------------------------------------------


def note_path(path: str) -> str:
    """Where the note of a checkpoint lies."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{NOTE}")


def note_text(saved: Saved) -> str:
    """A note as it is written."""
    return json.dumps(asdict(saved))


def read_note(path: str) -> Saved | None:
    """What the trainer said of the checkpoint at ``path``; None if it said nothing that can be read."""
    try:
        facts = json.loads(_read(note_path(path)))
        metric = facts["metric"]
        return Saved(
            os.path.basename(path), int(facts["step"]), float(facts["time"]), None if metric is None else float(metric)
        )
    except (LastingError, OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: str) -> bytes:
    """A small file, as it is now: one on a disk is not kept open."""
    if scheme_of(path) is not None:
        return place_of(path).open(path).read_all(_NOTE_LIMIT)
    with open(path, "rb") as file:
        return file.read(_NOTE_LIMIT)
