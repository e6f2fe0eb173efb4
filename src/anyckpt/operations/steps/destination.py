"""What destinations tell by their names, and refusing those that would destroy something, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.manifest import beside, read_manifest
from anyckpt.engine.names import MANIFEST_NAME, UNFINISHED_NAME
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.formats import registry
from anyckpt.operations.steps.writing import DESTINATIONS, OBJECT_STORES
from anyckpt.storage.location import file_of, look_at, look_in, place_of
from anyckpt.storage.place import scheme_of

_OTHER_SUFFIXES = (".bin",)
"""Of checkpoints too, but of several formats."""

_SHOWN = 5


def told_by_name(destination: str | os.PathLike[str]) -> dict[str, Any]:
    """What the end of a destination's name tells of what is to be written, as options.

    Returns:
        ``to`` and, where the name is that of an archive, ``compress``.

    Raises:
        UsageError: it tells nothing.
    """
    known = registry.suffixes()
    suffix = _suffix(destination)
    if suffix not in known:
        raise UsageError(
            "the name does not tell in which format to write",
            path=destination,
            expected=f"--to, or a name that ends in {', '.join(known)}",
            remedy="add --to with a format: "
            + ", ".join(name for name, format in registry.formats().items() if format.plan is not None),
        )
    target, archive = known[suffix]
    return {"to": target.name, **({"compress": True} if archive else {})}


def aimed_at(destination: str | os.PathLike[str], to: str | None, source: Checkpoint) -> dict[str, Any]:
    """What is to be written of what has a format itself, as options.

    Args:
        destination: where the output goes.
        to: the format that is asked for; if None, what the destination's name tells, unless the source's name ends so,
            too; else the source's format, in its parallel layout.
        source: the checkpoint that the output is made from first of all.

    Returns:
        ``to``, ``keep_layout`` and, where the destination's name is that of an archive, ``compress``.
    """
    if to is not None:
        return {"to": to, "keep_layout": False}
    suffix = _suffix(destination)
    told = told_by_name(destination) if suffix in registry.suffixes() and suffix != _suffix(source.path) else {}
    target = told.get("to", source.format)
    return {"keep_layout": target == source.format and bool(source.ranks), **told, "to": target}


def _suffix(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(os.fspath(path).rstrip(os.sep))[1].lower()


def check_destination(
    destination: str,
    sources: Sequence[str],
    *,
    overwrite: bool,
    resume: bool = False,
    known: Collection[str] = (),
    anywhere: bool = False,
) -> None:
    """Raise unless ``destination`` can be written without touching a source or replacing what is no checkpoint.

    Args:
        destination: where the output goes.
        sources: paths that are read.
        overwrite: whether an existing checkpoint may be replaced.
        resume: whether the destination may be there because the same work is done already, which the engine tells.
        known: files of a checkpoint there that its manifest does not list.
        anywhere: whether it may be on no disk.

    Raises:
        UsageError: the destination is a source, lies inside one, or holds one.
        OutputError: it exists, and may not be replaced.
    """
    if (scheme := scheme_of(destination)) is not None:
        if not anywhere or scheme not in DESTINATIONS:
            kinds = "disks, object stores (s3://, gs://, az://) and the Hub (hf://)"
            raise UsageError(
                f"cannot be written to: only {kinds if anywhere else 'folders and files on a disk'} can",
                path=destination,
                found=f"{scheme}://",
                remedy="write it to a disk and copy it there",
            )
        for source in sources:
            _check_apart(destination, source.rstrip("/"), destination.rstrip("/"), "/")
        if scheme in OBJECT_STORES:
            _check_in_store(destination, overwrite, resume)
        return  # what is there is looked at by what writes to it
    target = os.path.realpath(destination)
    for source in sources:
        _check_apart(destination, os.path.realpath(file_of(source)), target, os.sep)
    if not os.path.lexists(destination):
        return
    if not overwrite and not resume:
        raise _exists(destination)
    if overwrite and os.path.exists(destination) and not _replaceable(destination):
        raise _no_checkpoint(destination, os.path.isdir(destination))
    _check_no_others(destination, _others_files(destination, known) if overwrite else [])


def _check_apart(destination: str, origin: str, target: str, separator: str) -> None:
    """Raise unless neither of a source and the destination lies in the other."""
    if target == origin:
        raise UsageError("source and destination are the same", path=destination, remedy="choose another path")
    if target.startswith(origin + separator):
        raise UsageError("lies inside the source", path=destination, remedy="choose a path outside of it")
    if origin.startswith(target + separator):
        raise UsageError("holds the source", path=destination, remedy="choose another path")


def _check_in_store(destination: str, overwrite: bool, resume: bool) -> None:
    """The same as for a disk of what an object store has there; unfinished work is left to what writes."""
    place = place_of(destination)
    if not place.exists(destination):
        return
    location = look_in(place, destination)
    if UNFINISHED_NAME in location.names:
        return
    if not overwrite:
        if resume:
            return
        raise _exists(destination)
    manifest = None
    with suppress(FormatError):
        manifest = read_manifest(destination, place)
    if location.is_directory and manifest is not None:
        there = location.folder().names()
        _check_no_others(destination, [name for name in there if name not in (*manifest.files, MANIFEST_NAME)])
    elif manifest is None and not (not location.is_directory and _is_named_so(destination)):
        try:
            registry.detect(location)
        except FormatError:
            raise _no_checkpoint(destination, location.is_directory) from None


def _exists(destination: str) -> OutputError:
    return OutputError("already exists", path=destination, remedy="choose another path or pass --overwrite")


def _no_checkpoint(destination: str, is_directory: bool) -> OutputError:
    what = "a directory that holds something else than" if is_directory else "a file that is not"
    return OutputError(
        f"is {what} a checkpoint, which --overwrite does not replace",
        path=destination,
        remedy="choose another path or remove it yourself",
    )


def _check_no_others(destination: str, strange: Sequence[str]) -> None:
    if strange:
        raise OutputError(
            "holds files beside the checkpoint, which would go with it",
            path=destination,
            found=", ".join(strange[:_SHOWN]) + (f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""),
            remedy="move them elsewhere, or choose another path",
        )


def _others_files(directory: str, known: Collection[str]) -> list[str]:
    """The files in a directory that anyckpt wrote which its manifest does not list; none where that does not tell."""
    try:
        manifest = read_manifest(directory) if os.path.isdir(directory) else None
    except FormatError:
        return []
    if manifest is None:
        return []
    found = []
    for folder, _, names in os.walk(directory):
        inside = "" if folder == directory else os.path.relpath(folder, directory).replace(os.sep, "/") + "/"
        found += [
            f"{inside}{name}"
            for name in names
            if f"{inside}{name}" not in manifest.files
            and f"{inside}{name}" not in known
            and name != MANIFEST_NAME
            and not os.path.islink(os.path.join(folder, name))
        ]
    return sorted(found)


def _is_named_so(path: str) -> bool:
    return path.lower().endswith((*registry.suffixes(), *_OTHER_SUFFIXES))


def _replaceable(path: str) -> bool:
    """Whether a checkpoint is there, a damaged one included if its name or its manifest tells; never a device."""
    if os.path.isdir(path):
        location = look_at(path)
        if not location.names or MANIFEST_NAME in location.names:
            return True
    elif not os.path.isfile(path):
        return False
    elif not os.path.getsize(path) or os.path.lexists(beside(path)) or _is_named_so(path):
        return True
    else:
        location = look_at(path)
    try:
        registry.detect(location)
    except FormatError:
        return False
    return True
