"""What is done to a run's folder as it fills: notes, the pointer to the newest checkpoint, deleting, cleaning up.

A checkpoint that goes is first renamed, durably, to a hidden name, so that whenever this is interrupted no part of it
is left that could be taken for a whole one; what is left then is removed when cleaning up.  Only what has a note,
because anyckpt saved it here, is ever deleted to keep rules of retention.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from anyckpt.engine.files import sync_directory, sync_file, write_error
from anyckpt.engine.manifest import beside
from anyckpt.engine.names import MANIFEST_NAME
from anyckpt.engine.staging import StagingDirectory, destination_of
from anyckpt.errors import OutputError
from anyckpt.formats.shared.tracker import TRACKER, iteration_number
from anyckpt.formats.shared.unfinished import is_marker, marker_of
from anyckpt.operations.retention import Retention, Saved, deleted
from anyckpt.operations.run_folder import NOTE, candidates, condition, note_path, note_text, read_note
from anyckpt.operations.steps.unfinished import is_in_store
from anyckpt.storage.local_file import forget_open_file
from anyckpt.storage.place import LOCAL

POINTER = "latest"
"""A link beside the checkpoints to the newest one."""

OTHERS_AFTER = 3600.0
"""Seconds in which nobody has written to another software's unfinished checkpoint before it counts as given up."""

_DELETED = ".anyckpt-deleted"
_NEW = ".anyckpt-new"
_LOCK = ".anyckpt-run.lock"


def write_note(path: str, saved: Saved) -> None:
    """Say, durably, what is known of the checkpoint that will be, or is, at ``path``.

    Raises:
        OutputError: the system refuses.
    """
    if is_in_store(path):
        from anyckpt.operations import run_in_store  # here, so that folders on disks do not need obstore

        run_in_store.write_note(path, saved)
    else:
        _replace(note_path(path), note_text(saved))


def noted(folder: str) -> list[Saved]:
    """The checkpoints in a folder that have a note, and are there."""
    found = []
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(f".{NOTE}"):
            path = os.path.join(folder, name[1 : -len(NOTE) - 1])
            note = read_note(path)
            if note is not None and os.path.lexists(path):
                found.append(note)
    return found


def published(folder: str, rules: Retention, *, pointer: bool = True) -> list[str]:
    """What follows the publication of a checkpoint: point to the newest, delete what no rule keeps.

    Processes that do this in one folder at once take turns.

    Returns:
        the paths that were deleted.

    Raises:
        OutputError: the system refuses.
    """
    if is_in_store(folder):
        from anyckpt.operations import run_in_store

        return run_in_store.published(folder, rules)
    with _alone(folder):
        there = noted(folder)
        if not there:
            return []
        newest = max(there, key=lambda one: (one.step, one.time, one.name))
        if pointer:
            point_to(folder, newest.name)
        going = [os.path.join(folder, one.name) for one in deleted(there, rules)]
        for path in going:
            delete(path)
        return going


def point_to(folder: str, name: str) -> None:
    """Make the link ``latest`` lead to a checkpoint of the folder, in one step; readers see the old one or the new one.

    Where checkpoints are called as Megatron calls iterations, its tracker file is written in the same way, so that
    Megatron resumes from the folder.

    Raises:
        OutputError: something that is no link has the name ``latest``, or the system refuses.
    """
    path = os.path.join(folder, POINTER)
    if os.path.lexists(path) and not os.path.islink(path):
        raise OutputError(
            f"cannot point to {name}, for it is no link", path=path, remedy="rename it, or do without the pointer"
        )
    new = os.path.join(folder, f".{POINTER}{_NEW}")
    try:
        with suppress(FileNotFoundError):
            os.unlink(new)
        os.symlink(name, new)
        os.replace(new, path)
        sync_directory(folder)
    except OSError as error:
        raise write_error(path, error) from error
    number = iteration_number(name)
    if number is not None:
        _replace(os.path.join(folder, TRACKER), str(number))


def delete(path: str) -> None:
    """Delete a checkpoint with what lies beside it; if this is interrupted, nothing is left that looks like one.

    Raises:
        OutputError: the system refuses.
    """
    if is_in_store(path):
        from anyckpt.operations import run_in_store

        run_in_store.delete(path)
        return
    folder, name = os.path.split(path)
    hidden = os.path.join(folder, f".{name}{_DELETED}")
    try:
        _remove(hidden)
        forget_open_file(path)
        if os.path.lexists(path):
            os.rename(path, hidden)
            sync_directory(folder)
        for other in (note_path(path), beside(path)):
            with suppress(FileNotFoundError):
                os.unlink(other)
        _remove(hidden)
    except OSError as error:
        raise OutputError(f"cannot be deleted: {error.strerror}", path=path) from error


def clean(folder: str | os.PathLike[str], *, others_after: float | None = OTHERS_AFTER) -> list[str]:
    """Remove what interrupted work left in a run's folder: nothing that is whole, and nothing that somebody writes.

    That are unpublished saves of anyckpt, interrupted conversions among them, that no process is at (where locks reach:
    on one host, and on most network file systems), what was being deleted, notes and manifests of what is not there,
    and other software's checkpoints that it did not finish: a directory of ``.distcp`` files without ``.metadata``,
    Megatron's without ``metadata.json``, whatever has NeMo's marker.  A checkpoint that is damaged in another way
    stays.  In an object store a process of another machine counts as gone when it has said nothing for 45 seconds,
    which are waited for, and what other software left stays.

    Args:
        folder: which; nothing is done if it does not exist.
        others_after: seconds since anything in another software's checkpoint was written, before it counts as given
            up; None if they stay.

    Returns:
        the paths that were removed.

    Raises:
        OutputError: the system refuses.
        FormatError: the folder cannot be listed.
    """
    root = os.fspath(folder)
    if is_in_store(root):
        from anyckpt.operations import run_in_store

        return run_in_store.clean(root, time.time() - OTHERS_AFTER)
    if not os.path.isdir(root):
        return []
    removed = []
    try:
        with _alone(root):
            for name in sorted(os.listdir(root)):
                path = os.path.join(root, name)
                output = destination_of(path)
                if output is not None:
                    gone = StagingDirectory(output).remove_abandoned()
                elif name.startswith(".") and name.endswith(_DELETED):
                    gone = _remove(path)
                else:
                    gone = _is_left_over(path, name) and _remove(path)
                removed += [path] if gone else []
            if others_after is not None:
                removed += _clean_others(root, time.time() - others_after)
    except OSError as error:
        raise OutputError(f"cannot be cleaned up: {error.strerror}", path=error.filename or root) from error
    return removed


def _is_left_over(path: str, name: str) -> bool:
    """Whether it is what lies beside a checkpoint that is not there, or is half written, and old: nobody is at it."""
    kind = next((end for end in (f".{NOTE}", MANIFEST_NAME, _NEW) if name.endswith(end) and name != end), None)
    if kind is None or not name.startswith("."):
        return False
    of = os.path.join(os.path.dirname(path), name[1 : -len(kind)])
    return (kind == _NEW or not os.path.lexists(of)) and os.lstat(path).st_mtime < time.time() - OTHERS_AFTER


def _clean_others(root: str, before: float) -> Iterator[str]:
    for one in candidates(root):
        if is_marker(one.path) or _written(one.path) >= before:
            continue
        if condition(one.path).unfinished:
            marker = marker_of(LOCAL, one.path)
            delete(one.path)
            if marker is not None:
                _remove(marker)
            yield one.path


def _written(path: str) -> float:
    """When anything in a directory, or a file, was last written."""
    inside = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in (".", *names))
    return max((os.lstat(one).st_mtime for one in inside), default=os.lstat(path).st_mtime)


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Within, no other process that asks for this works on the folder."""
    descriptor = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: str, text: str) -> None:
    """Write a small file in one step, durably."""
    folder, name = os.path.split(path)
    new = os.path.join(folder, f".{name.lstrip('.')}.{os.getpid()}{_NEW}")  # several may write it
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            sync_file(file.fileno())
        os.replace(new, path)
        sync_directory(folder)
    except OSError as error:
        raise write_error(path, error) from error


def _remove(path: str) -> bool:
    """Remove a file, a link or a directory; whether there was one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
        return True
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
