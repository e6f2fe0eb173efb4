"""Checking a checkpoint for damage, and for what it would do to whoever loads it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from anyckpt.checkpoint import Checkpoint, StoredChecksum
from anyckpt.engine.manifest import check_manifest, manifest_path, read_manifest
from anyckpt.errors import AnyckptError, FormatError, LastingError, MappingError, UnknownFormatError
from anyckpt.formats import registry
from anyckpt.models.complete import some
from anyckpt.operations.completeness import check_model, check_names
from anyckpt.operations.steps.impossible_numbers import check_values
from anyckpt.operations.steps.loader_calls import asked_of_loaders
from anyckpt.operations.steps.looking import Asked, looking
from anyckpt.operations.steps.proof import Proof
from anyckpt.operations.steps.published import (
    GIT,
    HUB,
    Published,
    PublishedFiles,
    files_of,
    known_to_hub,
    listed_in,
    path_of,
    said_by_user,
)
from anyckpt.operations.steps.reading_all import Found, Reading, crc32_of
from anyckpt.operations.steps.threads import Meter, Progress
from anyckpt.operations.verification import Problem, Verification
from anyckpt.pickling import recording
from anyckpt.pickling.calls import Calls, danger
from anyckpt.storage.location import Location, look_at
from anyckpt.storage.place import Place
from anyckpt.storage.requests import holding, in_batches

_NAMES = (".nemo", ".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".qnemo", ".distcp")
"""How names of checkpoints' files end, whatever is in them."""


def verify(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    deep: bool = False,
    checksum: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    expect: str | Sequence[str] = (),
    progress: Progress | None = None,
    share: str | None = None,
    wait: float | None = None,
    records: str | os.PathLike[str] | None = None,
    engine: str | None = None,
) -> Verification:
    """Check structure, byte ranges, digests and checksums, the model's completeness, and what pickles call.

    The manifest answers for every byte that anyckpt wrote, so CRCs are read only where there is no manifest, or where
    it found damage.  What huggingface_hub noted of the files that it downloaded is compared, too.  Damage that keeps a
    checkpoint from being opened is a problem as any other.

    Args:
        source: a path, or a checkpoint that is open.
        deep: also read every tensor (see ``check_values``).
        checksum: lists of digests of files, as ``sha256sum`` writes them, or the Hub's JSON (see
            ``published.listed_in``).
        expect: digests that files must have: ``sha256:HEX``, in a directory ``FILE=sha256:HEX``.
        progress: called with (bytes done, bytes to do) of each pass over the data.
        share: ``I/N``: read the I-th of N parts, as many processes do; one of them returns the whole, for the others
            ``part`` says what they did.  ``auto``: which one ``torchrun``, ``srun`` or ``mpirun`` says.
        wait: with ``share``: the first one waits for the others, until nothing was seen of them for so many seconds,
            and returns the whole; 600 with ``auto``.  Otherwise the last one does.
        records: with ``share``: a folder that all processes see, in which they find one another.
        engine: ``ray``: the nodes of a Ray cluster, which see what is read under the same paths, read it.

    Raises:
        FormatError: there is nothing, or no checkpoint, at the path.
        OutputError: with ``share``, records of other work are in the folder, or other shares do not come.
        UsageError: a digest is none, or of no file of the checkpoint.
    """
    path = source.path if isinstance(source, Checkpoint) else source
    lists = (checksum,) if isinstance(checksum, (str, os.PathLike)) else tuple(checksum)
    asked = (expect,) if isinstance(expect, str) else tuple(expect)
    location = _location(path, needed=bool(lists or asked) or not isinstance(source, Checkpoint))
    result, checkpoint = _opened(source, location)
    options = {"deep": deep, "checksum": tuple(os.fspath(file) for file in lists), "expect": asked}
    with looking("verify", [path], options, Asked(share, wait, records, engine), progress) as work:
        reading = Reading(checkpoint, location, os.fspath(path), deep)
        known = work.look(lambda: reading.units([*_published(location, lists, asked, Verification("", ""))]))
        if work.part is not None:
            return Verification(result.path, result.format, part=work.part)
        return _verified(reading, lists, asked, result, progress, reading.found(known))


def _verified(
    reading: Reading,
    lists: Sequence[str | os.PathLike[str]],
    asked: Sequence[str],
    result: Verification,
    progress: Progress | None,
    found: Found,
) -> Verification:
    """All that is wrong: what other processes found, and what is found by reading where none of them did."""
    checkpoint, location, deep = reading.checkpoint, reading.location, reading.deep
    proof = Proof()
    if location is not None:
        _check_published(location, lists, asked, result, proof, progress, found)
    proved = reading.place is not None and _check_digests(reading.path, reading.place, result, progress, found)
    if checkpoint is None:
        return result
    _check_pieces(checkpoint, result)
    if not proved:
        _check_checksums(checkpoint, result, proof, progress, found)
    check_model(checkpoint, result)
    check_names(checkpoint, result)
    if deep:
        values = check_values(checkpoint, progress, found.numbers)
        result.checked.values = values.read
        result.problems += [Problem(name, problem) for name, problem in values.problems]
        result.warnings += values.warnings
        if values.unread:
            result.unchecked.append(f"the numbers of {len(values.unread):,} packed tensors: {some(values.unread)}")
    _tell_unproved(checkpoint, result, None if proved else proof, deep)
    _check_calls(checkpoint, result)
    return result


def _location(path: str | os.PathLike[str], *, needed: bool) -> Location | None:
    """What is at the path; None if nothing is, for a checkpoint that was made in memory."""
    try:
        return look_at(path)
    except FormatError:
        if needed:
            raise
        return None


def _opened(
    source: str | os.PathLike[str] | Checkpoint, location: Location | None
) -> tuple[Verification, Checkpoint | None]:
    """The checkpoint, or what keeps it from being opened as a problem.

    Raises:
        FormatError: it is no checkpoint, and its name does not say that it should be one.
    """
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        assert location is not None
        met = Calls()
        try:
            checkpoint = registry.read(location, met=met)
        except UnknownFormatError:
            if location.is_directory or not location.path.endswith(tuple(_NAMES)):
                raise
            text = (
                "by its name it is a checkpoint, and its contents are of no known format: it may be cut or overwritten"
            )
            return Verification(location.path, "", [Problem(location.path, text)], opened=False), None
        except (FormatError, MappingError) as error:
            problem = _problem_of(error, location.path)
            return Verification(location.path, _format_of(location), [problem], calls=tuple(met), opened=False), None
    result = Verification(checkpoint.path, checkpoint.format, warnings=list(checkpoint.warnings))
    result.problems += [Problem(checkpoint.path, text) for text in checkpoint.unloadable]
    result.warnings = [text for text in result.warnings if text not in checkpoint.unloadable]
    return result, checkpoint


def _format_of(location: Location) -> str:
    try:
        return registry.detect(location).name
    except LastingError:
        return ""


def _problem_of(error: AnyckptError, path: str) -> Problem:
    where = error.path or path
    error.path = None
    return Problem(where, str(error))


def _published(
    location: Location | None,
    lists: Sequence[str | os.PathLike[str]],
    asked: Sequence[str],
    result: Verification,
) -> list[Published]:
    """Digests that users and publishers give of whole files."""
    if location is None:
        return []
    published = said_by_user(location, asked)
    for file in lists:
        found, missing = listed_in(location, os.fspath(file))
        published += found
        result.problems += [Problem(name, f"is not there, though {os.fspath(file)} lists it") for name in missing]
    if lists:
        listed = {digest.file for digest in published}
        own = {location.place.real(os.fspath(file)) for file in lists}
        listed |= {name for name in files_of(location) if location.place.real(path_of(location, name)) in own}
        others = [name for name in files_of(location) if name not in listed and not name.startswith(".")]
        if others:
            result.unchecked.append(f"{len(others)} file{'s' * (len(others) > 1)} that no list names: {some(others)}")
    return published + known_to_hub(location)


def _check_published(
    location: Location,
    lists: Sequence[str | os.PathLike[str]],
    asked: Sequence[str],
    result: Verification,
    proof: Proof,
    progress: Progress | None,
    found: Found,
) -> None:
    published = PublishedFiles(location, _published(location, lists, asked, result))
    good: dict[str, bool] = {}
    for digest, problem in published.check(progress, found.published):
        where = digest.file or location.path
        good[digest.file] = good.get(digest.file, True) and not problem
        if problem and digest.algorithm == GIT and digest.origin == HUB:  # a text file, which users change on purpose
            result.warnings.append(f"{where}: {problem}: it was changed after it was downloaded")
        elif problem:
            result.problems.append(Problem(where, problem))
    for file, agrees in good.items():
        result.checked.published += agrees
        if location.place.is_file(path_of(location, file)):
            proof.add(location.place.open(path_of(location, file)), holds=agrees)


def _tell_unproved(checkpoint: Checkpoint, result: Verification, proof: Proof | None, deep: bool) -> None:
    """Of whose contents nothing says what they should be; without a proof, the manifest has answered for all."""
    proved, unknown = (len(checkpoint.tensors), 0) if proof is None else proof.told(checkpoint.tensors.values())
    result.checked.proved = proved
    if unknown:
        how = "were read, not proved" if deep else "were not read"
        result.unchecked.append(
            f"the contents of {unknown:,} tensor{'s' * (unknown > 1)} {how}: no digest or checksum says what they "
            "should be (--checksum and --expect take a published one)"
        )


def _check_calls(checkpoint: Checkpoint, result: Verification) -> None:
    """What loading it with other software would call; last, as other checks read pickles too."""
    calls = asked_of_loaders(checkpoint, states=True)
    code = calls.of_kind("code")
    result.warnings = [text for text in calls.told_with(result.warnings) if text not in calls.warnings()]
    if code:
        where = some(list(dict.fromkeys(file for callee in code for file in callee.files)))
        result.problems.append(Problem(where or checkpoint.path, danger(code)))
    result.warnings += calls.warnings()[1 if code else 0 :]
    result.unchecked += [f"what {name} calls: {why}" for name, why in calls.unread.items()]
    result.checked.pickles = calls.pickles
    result.calls = tuple(calls)


def _check_pieces(checkpoint: Checkpoint, result: Verification) -> None:
    for name, tensor in checkpoint.tensors.items():
        try:
            for piece in tensor.pieces():
                piece.check()
                result.checked.pieces += 1
        except LastingError as error:
            result.problems.append(Problem(name, str(error)))
        else:
            result.checked.tensors += 1


def _check_digests(path: str, place: Place, result: Verification, progress: Progress | None, found: Found) -> bool:
    """Whether there is a manifest and every byte agrees with it."""
    try:
        manifest = read_manifest(path, place)
    except LastingError as error:
        result.problems.append(Problem("manifest", str(error)))
        return False
    if manifest is None:
        return False
    total = sum(entry.nbytes for entry in manifest.entries)
    done = 0
    good = True
    if found.digests is not None:
        progress = None  # it was told while others looked
    for entry, problem in check_manifest(path, manifest, place, found.digests):
        if problem:
            where = entry.name or entry.file if entry is not None else "manifest"
            if entry is None:
                problem += f"; if it was replaced on purpose, delete {manifest_path(path, place)}"
            result.problems.append(Problem(where or os.path.basename(path), problem))
            good = False
        else:
            result.checked.digests += 1
        if entry is not None and progress is not None:
            done += entry.nbytes
            progress(done, total)
    return good


def _check_checksums(
    checkpoint: Checkpoint, result: Verification, proof: Proof, progress: Progress | None, found: Found
) -> None:
    meter = Meter(sum(tensor.nbytes for tensor in checkpoint.tensors.values()), progress)
    number = 0
    with recording() as met:
        try:
            for batch in in_batches(checkpoint.checksums(), lambda item: (item.source, 0, item.source.size)):
                known = found.checksums
                unread = len(batch) > 1 and known is None
                with holding((item.source, 0, item.source.size) for item in batch if unread):
                    for item in batch:
                        crc = crc32_of(item.source, meter.advance) if known is None else known[number]
                        number += 1
                        if isinstance(crc, str):
                            raise FormatError(crc)
                        _check_checksum(item, crc, result, proof)
        except LastingError as error:
            result.problems.append(Problem(checkpoint.path, f"{error}; checksums after it were not checked"))
    checkpoint.calls.take(met)


def _check_checksum(item: StoredChecksum, found: int, result: Verification, proof: Proof) -> None:
    proof.add(item.source, holds=found == item.crc32)
    if found == item.crc32:
        result.checked.checksums += 1
    else:
        problem = f"the CRC-32 does not fit the bytes (expected {item.crc32:08x}, found {found:08x})"
        result.problems.append(Problem(item.name, problem))
