"""The manifest: what anyckpt wrote, with digests, so that ``verify`` can answer for every byte later.

A directory holds it as ``.anyckpt-manifest.json``; beside a single file ``NAME`` lies ``.NAME.anyckpt-manifest.json``.
Other tools ignore both.  Each entry gives the byte range of a tensor's piece, so that checking needs no knowledge of
the format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.checksum import DIGEST, digest_of
from anyckpt.engine.names import MANIFEST_NAME
from anyckpt.errors import FormatError
from anyckpt.storage.place import LOCAL, Place
from anyckpt.storage.requests import holding, in_batches
from anyckpt.storage.source import ByteSource

_VERSION = 1


@dataclass(frozen=True)
class ManifestEntry:
    """A run of bytes of the output.

    Attributes:
        name: the tensor's stored name; empty for bytes that are no tensor (headers, configuration).
        piece: which piece of it, empty if whole.
        file: relative to the output directory; empty if the output is a single file.
        offset: first byte in the file.
        nbytes: how many.
        digest: see ``checksum.DIGEST``.
    """

    name: str
    piece: str
    file: str
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What was written.

    Attributes:
        format: of the output.
        plan: fingerprint of the plan and its sources, so that resuming finished work finds it done.
        files: path -> size in bytes.
        entries: every run of bytes.
        notes: what a user should know of the output, as the report said it.
    """

    format: str
    plan: str
    files: dict[str, int]
    entries: tuple[ManifestEntry, ...]
    notes: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """The manifest as JSON, one entry per line."""
        try:
            return self._json(ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a pickle's name may be half of a surrogate pair
            return self._json(ensure_ascii=True).encode()

    def _json(self, *, ensure_ascii: bool) -> str:
        encode = json.JSONEncoder(ensure_ascii=ensure_ascii).encode
        rows = ",\n".join(encode([e.name, e.piece, e.file, e.offset, e.nbytes, e.digest]) for e in self.entries)
        head: dict[str, Any] = {
            "anyckpt_manifest": _VERSION,
            "format": self.format,
            "digest": DIGEST,
            "plan": self.plan,
            "notes": list(self.notes),
        }
        head["files"] = self.files
        text = json.dumps(head, indent=0, ensure_ascii=ensure_ascii)
        return f'{text[:-2]},\n"entries": [\n{rows}\n]\n}}\n'


def manifest_path(output: str, place: Place = LOCAL) -> str:
    """Where the manifest of an output lies."""
    return place.join(output, MANIFEST_NAME) if place.is_folder(output) else beside(output, place)


def beside(output: str, place: Place = LOCAL) -> str:
    """Where the manifest of a single-file output lies."""
    parent, name = place.split(output)
    return place.join(parent or "", f".{name}{MANIFEST_NAME}")


def read_manifest(output: str, place: Place = LOCAL) -> Manifest | None:
    """The manifest of an output, or None if it has none.

    Raises:
        FormatError: it is damaged.
    """
    path = manifest_path(output, place)
    return parse_manifest(place.open(path).read_all(), path) if place.exists(path) else None


def parse_manifest(text: bytes, path: str) -> Manifest:
    """A manifest from its bytes.

    Args:
        text: the bytes.
        path: where they are from, for messages.

    Raises:
        FormatError: it is damaged.
    """
    try:
        data = json.loads(text)
        if data["anyckpt_manifest"] != _VERSION or data["digest"] != DIGEST:
            raise FormatError("is a manifest of another version of anyckpt", path=path)
        notes = tuple(str(note) for note in data.get("notes", ()))
        files = {str(name): int(size) for name, size in data["files"].items()}
        entries = tuple(
            ManifestEntry(str(n), str(p), str(f), int(o), int(b), str(d)) for n, p, f, o, b, d in data["entries"]
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError("is a damaged manifest", path=path, remedy="delete it to do without it") from error
    return Manifest(str(data["format"]), str(data.get("plan", "")), files, entries, notes)


def check_manifest(
    output: str, manifest: Manifest, place: Place = LOCAL, known: Mapping[int, str] | None = None
) -> Iterator[tuple[ManifestEntry | None, str]]:
    """Read every byte that a manifest answers for, or what was found by who did.

    Args:
        output: what it is of.
        manifest: what should be there.
        place: where the output is.
        known: index of an entry -> what is wrong with it, of all entries whose files are there; None to read them.

    Yields (entry, problem) for each entry checked, with an empty problem if it is sound; (None, problem) for a file
    that is missing or of another size.
    """
    sources: dict[str, ByteSource] = {}
    for name in manifest.files:
        source, problem = _file_of(output, manifest, name, place)
        if source is None:
            yield None, problem
        else:
            sources[name] = source
    for batch in _in_batches(manifest, sources):
        problems = [known[number] for number in batch.numbers] if known is not None else batch.problems()
        yield from zip(batch.entries, problems, strict=True)


@dataclass(frozen=True)
class Entries:
    """Entries of a manifest that are checked together, because they are far away.

    Attributes:
        numbers: their indices in the manifest.
        entries: they.
        sources: of each, its file.
    """

    numbers: list[int]
    entries: list[ManifestEntry]
    sources: list[ByteSource]

    @property
    def nbytes(self) -> int:
        """Bytes that are read to check them."""
        return sum(entry.nbytes for entry in self.entries)

    def problems(self) -> list[str]:
        """What is wrong with each, empty if it is sound."""
        both = list(zip(self.entries, self.sources, strict=True))
        with holding((source, entry.offset, entry.nbytes) for entry, source in both if len(both) > 1):
            return [_problem(entry, source) for entry, source in both]


def entries_there(output: str, manifest: Manifest, place: Place = LOCAL) -> Iterator[Entries]:
    """All entries of a manifest whose files are there, in order, as many at a time as are read at once."""
    opened = {name: _file_of(output, manifest, name, place)[0] for name in manifest.files}
    return _in_batches(manifest, {name: source for name, source in opened.items() if source is not None})


def _in_batches(manifest: Manifest, sources: Mapping[str, ByteSource]) -> Iterator[Entries]:
    there = ((number, entry) for number, entry in enumerate(manifest.entries) if entry.file in sources)
    for batch in in_batches(there, lambda item: (sources[item[1].file], item[1].offset, item[1].nbytes)):
        yield Entries([n for n, _ in batch], [e for _, e in batch], [sources[e.file] for _, e in batch])


def check_sizes(output: str, manifest: Manifest, place: Place = LOCAL) -> Iterator[str]:
    """What is wrong with the files that a manifest lists, as far as their names and sizes tell; reads none of them."""
    for name in manifest.files:
        source, problem = _file_of(output, manifest, name, place)
        if source is None:
            yield problem


def _file_of(output: str, manifest: Manifest, name: str, place: Place) -> tuple[ByteSource | None, str]:
    """A file of the output, or what is wrong with it: it is missing, or of another size."""
    path, size = _inside(output, name, place), manifest.files[name]
    if path is None:
        return None, f"the manifest names {name!r}, which lies outside the output"
    try:
        source = place.open(path)
    except FormatError as error:
        return None, str(error)
    if source.size != size:
        return None, f"{path}: size differs from the manifest (expected {size}, found {source.size})"
    return source, ""


def _problem(entry: ManifestEntry, source: ByteSource) -> str:
    """How an entry's bytes differ from what it says; empty if they do not."""
    try:
        digest = digest_of(source.slice(entry.offset, entry.nbytes).read, entry.nbytes)
    except FormatError as error:
        return str(error)
    if digest == entry.digest:
        return ""
    return f"{source.name}: bytes differ from the manifest (expected {entry.digest}, found {digest})"


def _inside(output: str, name: str, place: Place) -> str | None:
    if not name:
        return output
    if os.path.isabs(name) or ".." in name.split("/"):
        return None
    return place.join(output, *name.split("/"))
