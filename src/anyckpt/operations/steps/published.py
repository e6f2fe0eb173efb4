"""Digests of whole files that their publisher gives: lists of checksums, the Hub's word on downloads, a user's word.

Facts: coreutils (``sha256sum``, also with ``--tag``) for lists; the specification of Git LFS for pointers; and
huggingface_hub since 0.23 for ``.cache/huggingface/download/NAME.metadata`` (three lines: commit, etag, time) and for
the ``blobs`` of its cache, which are called by their etag.  An etag is the SHA-256 of a file in LFS, and git's blob id
of any other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, LastingError, UsageError
from anyckpt.operations.steps.threads import Advance, Meter, Progress, each
from anyckpt.storage.location import Location, look_at
from anyckpt.storage.requests import is_far
from anyckpt.storage.source import ByteSource

_BLOCK = 4 << 20
_FAR_WORKERS = 8
_LARGEST_LIST = 64 << 20
GIT = "git"
"""The id of a blob: SHA-1 of ``blob SIZE``, a zero byte and the contents."""
HUB = "the Hub's metadata"
LISTED = "the Hub's list of files"
_BY_LENGTH = {32: "md5", 40: "sha1", 56: "sha224", 64: "sha256", 96: "sha384", 128: "sha512"}
_ALGORITHMS = (*_BY_LENGTH.values(), "blake2b", GIT)

_LINE = re.compile(r"\\?(?P<value>[0-9a-fA-F]{32,128})[ \t]+[ *]?(?P<name>\S.*)")
_TAGGED = re.compile(r"\\?(?P<algorithm>[A-Za-z0-9-]+) ?\((?P<name>.+)\) ?= ?(?P<value>[0-9a-fA-F]{32,128})")
_ALONE = re.compile(r"(?:(?P<algorithm>[A-Za-z0-9-]+):)?(?P<value>[0-9a-fA-F]{32,128})")
_POINTER = re.compile(r"version https://git-lfs\.github\.com/spec/v1\n(?:.*\n)*?oid sha256:([0-9a-f]{64})\n")
_ETAG = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_SNAPSHOTS = "/snapshots/"
_DOWNLOADS = (".cache", "huggingface", "download")
_LEVELS = 4


@dataclass(frozen=True)
class Published:
    """What a file's contents should come to.

    Attributes:
        file: relative to the checkpoint, with ``/``; empty for a checkpoint of one file.
        algorithm: of ``hashlib``, or ``git``.
        value: hexadecimal, in small letters.
        origin: who says so.
    """

    file: str
    algorithm: str
    value: str
    origin: str


def said_by_user(location: Location, expect: Iterable[str]) -> list[Published]:
    """``sha256:HEX``, or ``FILE=sha256:HEX`` for a file of a directory; the algorithm may be left out.

    Raises:
        UsageError: it is no digest, of no known algorithm, or does not say of which file.
    """
    result = []
    for text in expect:
        name, _, digest = text.rpartition("=")
        found = _ALONE.fullmatch(digest.strip())
        if found is None:
            raise UsageError(
                "--expect is no digest",
                expected="[FILE=]sha256:HEX, as sha256sum and the Hub print it",
                found=repr(text),
            )
        algorithm = _algorithm(found["algorithm"], found["value"], text)
        if location.is_directory and not name:
            raise UsageError(
                "a digest is of one file, and this is a directory",
                path=location.path,
                expected=f"FILE={algorithm}:HEX",
                found=text,
                remedy="name the file, or give a list of digests with --checksum",
            )
        files = files_of(location)
        file = _resolved(name, location, files, None) if name else ""
        if file is None:
            raise UsageError("no file of the checkpoint has this name", path=location.path, found=name)
        result.append(Published(file, algorithm, found["value"].lower(), "--expect"))
    return result


def listed_in(location: Location, path: str) -> tuple[list[Published], list[str]]:
    """What a list says of the checkpoint's files, and the names of those that are not there.

    A list is what ``sha256sum`` and the like write, with or without ``--tag``, a digest alone, a pointer of Git LFS, or
    JSON of the Hub about a model's files (``/api/models/NAME?blobs=true`` and ``/api/models/NAME/tree/main``).  Names
    are relative to the checkpoint, to the folder that it lies in, or to that of the list.

    Raises:
        FormatError: it cannot be read.
        UsageError: it is no such list, or of other files.
    """
    text = look_at(path).open().read_all(_LARGEST_LIST).decode("utf-8-sig", "replace")
    entries = list(_entries(text, path))
    if not entries:
        raise UsageError(
            "has no digests",
            path=path,
            expected="lines such as 'HEX  NAME' or 'SHA256 (NAME) = HEX', or the Hub's JSON",
        )
    files = files_of(location)
    list_folder, list_name = location.place.split(path)
    found: list[Published] = []
    missing = []
    for name, algorithm, value in entries:
        file = "" if name is None and not location.is_directory else _resolved(name, location, files, list_folder)
        if file is not None:
            found.append(Published(file, algorithm, value, list_name))
        elif name is not None and _should_be_inside(name, location, list_folder):
            missing.append(name)
    if not found and not missing:
        raise UsageError(
            f"has no digest of {location.path}",
            path=path,
            expected=f"one of {', '.join(files[:3])}" if files else None,
            found=", ".join(str(name) for name, _, _ in entries[:3]),
        )
    return found, missing


def known_to_hub(location: Location) -> list[Published]:
    """What the Hub says of files on it, and what huggingface_hub noted of them when it downloaded them, beside them or
    in its cache; mostly nothing."""
    place, found = location.place, []
    if place.is_far:
        said = ((file, place.digest(path_of(location, file))) for file in files_of(location))
        found = [Published(file, *digest, LISTED) for file, digest in said if digest is not None]
    if found:
        return found
    root, above = _download_folder(location)
    in_cache = any(_SNAPSHOTS in f"/{path}/".replace("\\", "/") for path in (location.path, place.real(location.path)))
    for file in files_of(location) if root is not None or in_cache else ():
        path, etag, origin = path_of(location, file), None, HUB
        noted = None if root is None else place.join(root, *f"{above}{file}.metadata".removeprefix("/").split("/"))
        if noted is not None and place.is_file(noted):
            lines = place.open(noted).read_all(1 << 16).decode("utf-8", "replace").split()
            etag = lines[1] if len(lines) > 1 else None
        elif in_cache:
            folder, name = place.split(place.real(path))
            if folder is not None and place.split(folder)[1] == "blobs":
                etag, origin = name, "the name in the Hub's cache"
        if etag is not None and _ETAG.fullmatch(etag):
            found.append(Published(file, "sha256" if len(etag) == 64 else GIT, etag, origin))
    return found


def _download_folder(location: Location) -> tuple[str | None, str]:
    """Where notes of downloads lie, of the checkpoint's folder or one above; and what they put before files' names."""
    place = location.place
    folder: str | None = location.path
    above = ""
    for _ in range(_LEVELS):
        if folder is None:
            break
        notes = place.join(folder, *_DOWNLOADS)
        if place.is_folder(notes):
            return notes, above
        folder, name = place.split(folder)
        above = f"{name}/{above}" if above or location.is_directory else name
    return None, ""


def path_of(location: Location, file: str) -> str:
    """Where a file of a checkpoint lies, by its name relative to it."""
    return location.place.join(location.path, *file.split("/")) if file else location.path


class PublishedFiles:
    """Files of which digests are given, each of which is read once.

    Args:
        location: the checkpoint.
        published: digests of its files.

    Attributes:
        sources: the files that are there, by their names.
    """

    def __init__(self, location: Location, published: Iterable[Published]) -> None:
        self._by_file: dict[str, dict[Published, None]] = {}
        for digest in published:
            self._by_file.setdefault(digest.file, {})[digest] = None
        self.sources: dict[str, ByteSource] = {}
        self._unopened: list[tuple[Published, str]] = []
        for file, digests in self._by_file.items():
            try:
                self.sources[file] = location.place.open(path_of(location, file))
            except FormatError as error:
                self._unopened += [(digest, str(error)) for digest in digests]

    def problems(self, file: str, advance: Advance) -> list[str]:
        """Of each digest of a file what is wrong, which is empty if it agrees."""
        digests = self._by_file[file]
        try:
            values = _digests(self.sources[file], {digest.algorithm for digest in digests}, advance)
        except LastingError as error:
            return [str(error)] * len(digests)
        return [_problem(digest, values[digest.algorithm]) for digest in digests]

    def check(self, progress: Progress | None, known: Mapping[str, Any]) -> list[tuple[Published, str]]:
        """Each digest with what is wrong.

        Args:
            progress: called with (bytes done, bytes to do).
            known: name of a file -> its ``problems``, where another process found them.
        """
        meter = Meter(sum(source.size for source in self.sources.values()), progress)
        workers = _FAR_WORKERS if any(map(is_far, self.sources.values())) else None

        def one(file: str, advance: Advance) -> list[str]:
            found: list[str] = known[file] if file in known else self.problems(file, advance)
            return found

        found = zip(self.sources, each(one, self.sources, meter, workers), strict=True)
        return [
            *self._unopened,
            *(pair for file, told in found for pair in zip(self._by_file[file], told, strict=True)),
        ]


def _digests(source: ByteSource, algorithms: Iterable[str], advance: Advance) -> dict[str, str]:
    hashers: dict[str, Any] = {}
    for algorithm in algorithms:
        hashers[algorithm] = hashlib.new("sha1" if algorithm == GIT else algorithm, usedforsecurity=False)
        if algorithm == GIT:
            hashers[algorithm].update(b"blob %d\0" % source.size)
    buffer = memoryview(bytearray(min(_BLOCK, source.size)))
    for start in range(0, source.size, _BLOCK):
        part = buffer[: min(_BLOCK, source.size - start)]
        source.read_into(start, part)
        for hasher in hashers.values():
            hasher.update(part)
        advance(len(part))
    return {algorithm: hasher.hexdigest() for algorithm, hasher in hashers.items()}


def _problem(digest: Published, found: str) -> str:
    if found == digest.value:
        return ""
    name = "blob id" if digest.algorithm == GIT else digest.algorithm.upper()
    return f"its {name} is not the one of {digest.origin} (expected {digest.value}, found {found})"


def files_of(location: Location) -> list[str]:
    """A checkpoint's files relative to it; of one file, an empty name."""
    if not location.is_directory:
        return [""]
    return [name for name in location.place.folder(location.path).names() if not name.startswith(".cache/")]


def _resolved(name: str | None, location: Location, files: list[str], list_folder: str | None) -> str | None:
    """The file of the checkpoint that a name in a list means; None if it has no such file."""
    if name is None:
        return None
    plain = name.replace("\\", "/").removeprefix("./")
    own = location.place.split(location.path)[1]
    if not location.is_directory:
        return "" if plain.rpartition("/")[2] == own else None
    there = set(files)
    candidates = [plain, plain.removeprefix(f"{own}/")]
    if list_folder is not None:  # relative to the list, which may lie in a folder of the checkpoint
        inside = location.place.real(list_folder).removeprefix(location.place.real(location.path)).strip("/")
        candidates.append(f"{inside}/{plain}")
    return next((candidate for candidate in candidates if candidate in there), None)


def _should_be_inside(name: str, location: Location, list_folder: str | None) -> bool:
    """Whether a list means a file of the checkpoint: it lies in it, or names its folder."""
    if not location.is_directory:
        return False
    own = location.place.split(location.path)[1]
    real = location.place.real(location.path)
    within = list_folder is not None and (location.place.real(list_folder) + "/").startswith(real + "/")
    return within or name.removeprefix("./").startswith(f"{own}/")


def _entries(text: str, path: str) -> Iterator[tuple[str | None, str, str]]:
    """Name (None for a digest alone), algorithm and digest."""
    pointer = _POINTER.match(text)
    if pointer is not None:
        yield path.replace("\\", "/").rpartition("/")[2], "sha256", pointer[1]
        return
    if text.lstrip()[:1] in ("{", "["):
        yield from _of_hub_json(text, path)
        return
    for line in map(str.strip, text.splitlines()):
        tagged, plain, alone = _TAGGED.fullmatch(line), _LINE.fullmatch(line), _ALONE.fullmatch(line)
        if tagged is not None:
            yield tagged["name"], _algorithm(tagged["algorithm"], tagged["value"], line), tagged["value"].lower()
        elif plain is not None:
            guessed = "blake2b" if re.search(r"b(?:lake)?2", path.lower()) and len(plain["value"]) == 128 else None
            yield plain["name"], _algorithm(guessed, plain["value"], line), plain["value"].lower()
        elif alone is not None:
            yield None, _algorithm(alone["algorithm"], alone["value"], line), alone["value"].lower()


def _of_hub_json(text: str, path: str) -> Iterator[tuple[str | None, str, str]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("is no JSON", path=path, found=str(error)) from None
    rows = data.get("siblings") if isinstance(data, dict) else data
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict):
            continue
        name = row.get("rfilename", row.get("path"))
        large = row.get("lfs")
        sha256 = large.get("sha256", large.get("oid")) if isinstance(large, Mapping) else None
        value, algorithm = (sha256, "sha256") if sha256 else (row.get("blobId", row.get("oid")), GIT)
        if isinstance(name, str) and isinstance(value, str) and row.get("type", "file") == "file":
            yield name, algorithm, value.removeprefix("sha256:").lower()


def _algorithm(name: str | None, value: str, text: str) -> str:
    plain = (name or _BY_LENGTH.get(len(value), "")).lower().replace("-", "")
    if plain not in _ALGORITHMS or (plain in _BY_LENGTH.values() and _BY_LENGTH.get(len(value)) != plain):
        raise UsageError(
            "is no digest of a known algorithm", expected=f"{', '.join(_ALGORITHMS)}, in full", found=repr(text)
        )
    return plain
