"""What checking a checkpoint reads of it, by units that several processes divide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field
from functools import partial
from typing import Any

from anyckpt.checkpoint import Checkpoint, StoredChecksum
from anyckpt.data_classes import dataclass
from anyckpt.engine.checksum import crc32
from anyckpt.engine.manifest import Entries, Manifest, entries_there, read_manifest
from anyckpt.errors import LastingError
from anyckpt.operations.steps.impossible_numbers import look_at_numbers, tensors_of_numbers
from anyckpt.operations.steps.looking import Unit
from anyckpt.operations.steps.published import Published, PublishedFiles
from anyckpt.operations.steps.statistics import Statistics
from anyckpt.operations.steps.threads import Advance
from anyckpt.storage.location import Location
from anyckpt.storage.place import Place
from anyckpt.storage.requests import holding, in_batches
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

_BLOCK = 4 << 20


@dataclass(frozen=True)
class Found:
    """What other processes have found.  Where something is None, nobody has looked.

    Attributes:
        published: file -> of each digest of it that is published, what is wrong.
        digests: index of the manifest's entry -> what is wrong.
        checksums: index of the container's checksum -> what it is, or why its bytes cannot be read.
        numbers: tensor -> what its elements are like, or why they cannot be read.
    """

    published: Mapping[str, list[str]] = field(default_factory=dict)
    digests: Mapping[int, str] | None = None
    checksums: Mapping[int, int | str] | None = None
    numbers: Mapping[str, Statistics | str | None] | None = None


@dataclass(frozen=True)
class Reading:
    """What is read of a checkpoint.

    Attributes:
        checkpoint: None if it cannot be opened.
        location: where it is; None if it was made in memory.
        path: of the checkpoint.
        deep: whether every number is looked at.
    """

    checkpoint: Checkpoint | None
    location: Location | None
    path: str
    deep: bool

    @property
    def place(self) -> Place | None:
        if self.checkpoint is not None:
            return self.checkpoint.place
        return None if self.location is None else self.location.place

    def units(self, published: Sequence[Published]) -> Iterator[Unit]:
        """All that is read if nothing is wrong, the same in every process.

        The container's checksums, which are not asked for where a manifest answers, are left to who finds that it does
        not.

        Args:
            published: digests that are known of files.
        """
        if self.location is not None:
            files = PublishedFiles(self.location, published)
            for file, source in files.sources.items():
                yield Unit(f"published/{file}", source.size, partial(files.problems, file), sources=[source])
        manifest = self._manifest()
        if manifest is not None and self.place is not None:
            for batch in entries_there(self.path, manifest, self.place):
                yield Unit(f"digests/{batch.numbers[0]}", batch.nbytes, partial(_digests, batch), (), batch.sources)
        if self.checkpoint is None:
            return
        if manifest is None:
            yield from _checksums(self.checkpoint)
        if self.deep:
            for name, tensor in tensors_of_numbers(self.checkpoint).items():
                yield Unit(f"numbers/{name}", tensor.nbytes, partial(_numbers, tensor), [tensor])

    def _manifest(self) -> Manifest | None:
        try:
            return None if self.place is None else read_manifest(self.path, self.place)
        except LastingError:
            return None

    def found(self, known: Mapping[str, Any]) -> Found:
        """What was found, from what the units gave; nothing if they gave nothing."""
        if not known:
            return Found()
        kinds: dict[str, dict[str, Any]] = {"published": {}, "digests": {}, "checksums": {}, "numbers": {}}
        for key, value in known.items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = value
        unproved = self._manifest() is None
        return Found(
            kinds["published"],
            {number: problem for problems in kinds["digests"].values() for number, problem in problems},
            _numbered(kinds["checksums"]) if unproved else None,
            {
                name: Statistics(**value) if isinstance(value, dict) else value
                for name, value in kinds["numbers"].items()
            },
        )


def _numbered(batches: Mapping[str, list[Any]]) -> dict[int, Any]:
    return {int(first) + number: value for first, values in batches.items() for number, value in enumerate(values)}


def _digests(batch: Entries, advance: Advance) -> list[tuple[int, str]]:
    found = list(zip(batch.numbers, batch.problems(), strict=True))
    advance(batch.nbytes)
    return found


def _numbers(tensor: LazyTensor, advance: Advance) -> Any:
    found = look_at_numbers(tensor, advance)
    return asdict(found) if isinstance(found, Statistics) else found


def _checksums(checkpoint: Checkpoint) -> Iterator[Unit]:
    number = 0
    try:
        for batch in in_batches(checkpoint.checksums(), lambda item: (item.source, 0, item.source.size)):
            nbytes = sum(item.source.size for item in batch)
            sources = [item.source for item in batch]
            yield Unit(f"checksums/{number}", nbytes, partial(_crcs, batch), sources=sources)
            number += len(batch)
    except LastingError:  # who answers meets it again, and tells
        return


def _crcs(batch: Sequence[StoredChecksum], advance: Advance) -> list[int | str]:
    with holding((item.source, 0, item.source.size) for item in batch if len(batch) > 1):
        return [_crc(item, advance) for item in batch]


def _crc(item: StoredChecksum, advance: Advance) -> int | str:
    try:
        return crc32_of(item.source, advance)
    except LastingError as error:
        return str(error)


def crc32_of(source: ByteSource, advance: Advance) -> int:
    """The CRC-32 of all of a source."""
    buffer = memoryview(bytearray(min(_BLOCK, source.size)))
    found = 0
    for start in range(0, source.size, _BLOCK):
        part = buffer[: min(_BLOCK, source.size - start)]
        source.read_into(start, part)
        found = crc32(part, found)
        advance(len(part))
    return found
