"""What dead runs left of outputs that they did not come to the end of, on disks and in object stores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import field

from anyckpt.data_classes import dataclass
from anyckpt.engine.claim import Claim, tag_of_dead
from anyckpt.engine.destination import BusyError
from anyckpt.engine.files import write_error
from anyckpt.engine.names import MANIFEST_NAME, PARTIAL, UNFINISHED_NAME
from anyckpt.engine.object_destination import beside, holds_all, partial_of, unfinished_files
from anyckpt.engine.staging import StagingDirectory, destination_of
from anyckpt.storage.objects import ObjectFacts, Objects, UnfinishedUpload


@dataclass(frozen=True)
class Leftover:
    """What is left of one output.

    Attributes:
        output: the path that it would have had, or has.
        paths: what is there of it: files, folders, or unfinished uploads.
        nbytes: how many bytes these take, as far as that can be told.
        busy: whether a process may be at work on it; it then stays.
        remove: removes it; raises BusyError if a process has come to it meanwhile, OutputError if the system refuses.
    """

    output: str
    paths: tuple[str, ...]
    nbytes: int
    busy: bool
    remove: Callable[[], None] = field(repr=False, compare=False)


def on_disk(path: str) -> Iterator[Leftover]:
    """Of the output at a path, and of those right in the folder that it is.

    Raises:
        OutputError: the system refuses.
    """
    found = {os.path.abspath(path)} if os.path.basename(path.rstrip(os.sep)) else set()
    try:
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    except OSError as error:
        raise write_error(path, error) from error
    outputs = (destination_of(os.path.join(os.path.abspath(path), name)) for name in names)
    for output in sorted(found | {output for output in outputs if output is not None}):
        staging = StagingDirectory(output)
        if os.path.isdir(staging.directory):
            yield Leftover(output, (staging.directory,), staging.nbytes(), staging.is_held(), _removal(staging, output))


def _removal(staging: StagingDirectory, output: str) -> Callable[[], None]:
    def remove() -> None:
        try:
            if not staging.remove_abandoned() and os.path.isdir(staging.directory):
                raise BusyError("is being written by another process", path=output)
        except OSError as error:
            raise write_error(staging.directory, error) from error

    return remove


def in_store(objects: Objects, key: str) -> Iterator[Leftover]:
    """Of the output of a key, and of all below it.

    Raises:
        OutputError: the store refuses.
    """
    there = objects.listed(key)
    if key:
        there = {**there, **objects.listed(partial_of(key))}
        there.update({one: facts for one in (key, beside(key)) if (facts := objects.facts(one)) is not None})
    uploads = objects.unfinished(key)
    for output in sorted({*_outputs(there), *([key] if key else [])}):
        own = [upload for upload in uploads if upload.key == output or upload.key.startswith(f"{output}/")]
        paths = _left(objects, output, there)
        if paths or own:
            claims = [path for path in paths if path.startswith(f"{partial_of(output)}/claim")]
            yield Leftover(
                objects.name_of(output),
                (*map(objects.name_of, paths), *(f"{objects.name_of(one.key)} (unfinished upload)" for one in own)),
                sum(there[path].nbytes for path in paths),
                _lives(objects, claims),
                _removal_in_store(objects, output, paths, own),
            )


def _lives(objects: Objects, claims: list[str]) -> bool:
    """Whether any of some claims' writers does; those of other machines are watched at the same time."""
    if len(claims) < 2:
        return any(tag_of_dead(objects, claim) is None for claim in claims)
    with ThreadPoolExecutor(len(claims)) as pool:
        return None in pool.map(lambda claim: tag_of_dead(objects, claim), claims)


def _outputs(there: Mapping[str, ObjectFacts]) -> Iterator[str]:
    """Keys of outputs that something in a listing tells of."""
    for key in there:
        folder, _, name = key.rpartition("/")
        above, slash, holder = folder.rpartition("/")
        if name in (UNFINISHED_NAME, MANIFEST_NAME):
            yield folder
        elif name.startswith(".") and name.endswith(MANIFEST_NAME):
            yield f"{folder}/{name[1 : -len(MANIFEST_NAME)]}" if folder else name[1 : -len(MANIFEST_NAME)]
        elif holder.startswith(".") and holder.endswith(PARTIAL):
            yield f"{above}{slash}{holder[1 : -len(PARTIAL)]}"


def _left(objects: Objects, output: str, there: Mapping[str, ObjectFacts]) -> list[str]:
    """Keys of what is there of an output that is not whole, or of a whole one besides it."""
    marker, manifest = f"{output}/{UNFINISHED_NAME}", f"{output}/{MANIFEST_NAME}"
    found = [key for key in there if key.startswith(f"{partial_of(output)}/")]
    if marker in there:
        found.append(marker)
        said, listed = objects.read(marker), objects.read(manifest) if manifest in there else None
        own = {key: facts for key, facts in there.items() if key.startswith(f"{output}/")}
        if listed is None or not holds_all(objects, output, own, listed[0]):
            names = unfinished_files(said[0]) if said is not None else []
            found += [f"{output}/{name}" for name in names if f"{output}/{name}" in there]
    if found and beside(output) in there and output not in there:
        found.append(beside(output))
    return found


def _removal_in_store(
    objects: Objects, output: str, paths: list[str], uploads: list[UnfinishedUpload]
) -> Callable[[], None]:
    def remove() -> None:
        claim = Claim(objects, f"{partial_of(output)}/claim", objects.name_of(output), {"plan": ""})
        claim.take()  # so that no writer begins meanwhile
        try:
            objects.delete([path for path in paths if path != claim.key])
            for upload in uploads:
                with suppress(FileNotFoundError):
                    objects.forget(upload)
        finally:
            claim.release()

    return remove
