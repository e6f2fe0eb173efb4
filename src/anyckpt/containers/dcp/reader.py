"""Opening a distributed checkpoint: reads the index and the sizes of the files, nothing in them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from itertools import chain, islice
from typing import Any

import numpy as np

from anyckpt.checkpoint import StoredChecksum
from anyckpt.containers.dcp.coverage import check_exact_cover
from anyckpt.containers.dcp.flattened import original_shape, restore
from anyckpt.containers.dcp.items import Chunks, ItemTable, LazyObjects, Unread
from anyckpt.containers.dcp.metadata import Index, ItemPlace, TensorEntry, merge, read_index
from anyckpt.containers.torch_file import read_torch, read_torch_files
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, FormatError, LastingError, UnfinishedError, UnsafeError
from anyckpt.indexing import Array
from anyckpt.storage.folder import Folder, check_inside
from anyckpt.storage.heads import read_each, whole
from anyckpt.storage.requests import is_far
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import Constant, LazyTensor, Mosaic

METADATA = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata$")
_TOGETHER = 64  # archives that are far are opened so many at once
_AGAIN = "copy the checkpoint again from its origin"
_INDEX = "the index of a distributed checkpoint, which is written last"


@dataclass
class DcpContents:
    """A distributed checkpoint, opened.

    Attributes:
        tensors: every tensor, its chunks joined; flattened ones in their original shape.
        objects: everything else, read when asked for; sharded objects without Megatron-Core's list of one.
        paths: name -> keys from the root of the nested state that was saved, or None if not recorded.
        version: DCP's version string, or None.
        metadata_class: dotted class of the index, which tells Megatron-Core 0.13 to 0.15.
        chunks: name -> number of pieces, empty ones not counted.
        shard_files: name -> files that hold its pieces.
        files: every file that the index uses, relative to the folder.
        flattened: names of tensors that were stored flattened.
        has_mcore_data: the index carries Megatron-Core's own table (0.12 to 0.15).
        warnings: anything odd.
        checksums: gives the CRC-32s of every record of every item; opens the items' archives when called.
    """

    tensors: dict[str, LazyTensor]
    objects: LazyObjects
    paths: dict[str, tuple[str | int, ...]] | None = None
    version: str | None = None
    metadata_class: str = ""
    chunks: dict[str, int] = field(default_factory=dict)
    shard_files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    flattened: tuple[str, ...] = ()
    has_mcore_data: bool = False
    warnings: list[str] = field(default_factory=list)
    checksums: Callable[[], Iterable[StoredChecksum]] = tuple

    def details(self) -> dict[str, object]:
        """What ``inspect`` shows of a distributed checkpoint."""
        return {
            "files": len(self.files),
            "chunks": self.chunks,
            "shard_files": self.shard_files,
            "metadata_class": self.metadata_class,
            "flattened": list(self.flattened),
        }


def read_dcp(folder: Folder) -> DcpContents:
    """Open the distributed checkpoint in ``folder``.

    Every chunk is checked to lie inside its file, and every tensor to be covered exactly once; the archives that
    hold the chunks are read when their elements are.

    Raises:
        FormatError: no index, a damaged one, a missing or truncated file, chunks that overlap or are missing.
        UnsafeError: the index names a file outside the folder.
    """
    names = set(folder.names())
    index, metadata_name = _read_index(folder, names)
    extra = index.extra.get("mcore_data")
    try:
        return _Opener(folder, names, index).open(extra)
    except UnsafeError:
        raise
    except LastingError as problem:
        path, remedy = problem.path or metadata_name, problem.remedy or _AGAIN
        raise problem.told_as(FormatError, path=path, remedy=remedy) from problem


def _read_index(folder: Folder, names: set[str]) -> tuple[Index, str]:
    if METADATA in names:
        source = folder.open(METADATA)
        return read_index(source), source.name
    ranks = {int(found[1]): name for name in names if (found := _RANK_METADATA.match(name)) and "/" not in name}
    if ranks:
        sources = [folder.open(ranks[rank]) for rank in sorted(ranks)]
        indices = read_each(read_index, sources, whole)
        return merge({source.name: index for source, index in zip(sources, indices, strict=True)}), sources[0].name
    if any(name.endswith((".distcp", ".metadata.tmp")) for name in names):
        raise UnfinishedError(
            "has shards but no .metadata: the save was not finished",
            path=folder.name,
            expected=_INDEX,
            remedy="wait for the (asynchronous) save to finish, or use the checkpoint before it",
        )
    raise FormatError("has no .metadata", path=folder.name, expected=_INDEX, remedy="check the path")


class _Opener:
    """Turns the index into tensors; one instance per checkpoint."""

    def __init__(self, folder: Folder, names: set[str], index: Index) -> None:
        self._folder = folder
        self._names = names
        self._index = index
        self._numbers: dict[str, int] = {}
        self._sources: list[ByteSource] = []

    def open(self, mcore_data: Any) -> DcpContents:
        index = self._index
        boxes = {name: self._boxes(name, entry) for name, entry in index.tensors.items()}
        table, rows = self._table(boxes)
        objects = {name: self._object(name) for name in index.objects}
        contents = DcpContents(
            {}, LazyObjects(objects), index.paths, index.version, index.metadata_class, warnings=list(index.warnings)
        )
        flattened = []
        for name, entry in index.tensors.items():
            try:
                tensor = self._tensor(name, entry, boxes[name], table, rows[name])
                shape = original_shape(name, mcore_data)
                if shape is not None:
                    tensor = restore(tensor, shape, name, len(boxes[name]))
                    flattened.append(name)
            except AnyckptError as problem:
                problem.tensor = problem.tensor or name
                raise
            contents.tensors[name] = tensor
            contents.chunks[name] = len(boxes[name])
        contents.flattened = tuple(flattened)
        contents.has_mcore_data = mcore_data is not None
        contents.files = tuple(self._numbers)
        file_names = np.array(contents.files, dtype=object)
        contents.shard_files = {
            name: tuple(file_names[np.unique(table.file[span.start : span.stop])]) for name, span in rows.items()
        }
        contents.warnings += self._oddities()
        contents.checksums = lambda: _checksums(table, rows, objects.values())
        return contents

    def _boxes(self, name: str, entry: TensorEntry) -> Array:
        """Offsets and sizes of the chunks that hold anything, ``[chunks, 2, axes]``."""
        ndim = len(entry.shape)
        boxes = np.frombuffer(b"".join(entry.chunks), dtype="<i8").reshape(len(entry.chunks), 2, ndim)
        full = np.all(boxes[:, 1] > 0, axis=1)
        if not full.all():
            boxes = boxes[full]
            entry.chunks[:] = [chunk for chunk, keep in zip(entry.chunks, full, strict=True) if keep]
        return boxes

    def _table(self, boxes: dict[str, Array]) -> tuple[ItemTable, dict[str, range]]:
        """Where each chunk lies; checked against the sizes of the files."""
        total = sum(len(box) for box in boxes.values())
        file = np.empty(total, dtype=np.int32)
        offset = np.empty(total, dtype=np.int64)
        length = np.empty(total, dtype=np.int64)
        rows: dict[str, range] = {}
        at = 0
        for name, entry in self._index.tensors.items():
            places = self._index.places.pop(name, {})
            half = 8 * len(entry.shape)
            first = at
            for chunk in entry.chunks:
                place = places.get(chunk[:half])
                if place is None:
                    where = np.frombuffer(chunk[:half], dtype="<i8").tolist()
                    raise FormatError(f"the index does not say where the chunk at {where} lies", tensor=name)
                file[at] = self._file(place, name)
                offset[at] = place.offset
                length[at] = place.length
                at += 1
            rows[name] = range(first, at)
        sizes = np.array([source.size for source in self._sources], dtype=np.int64)
        if total:
            bad = np.flatnonzero((length <= 0) | (offset > sizes[file] - length))
            if bad.size:
                row = int(bad[0])
                name = next(name for name, span in rows.items() if row in span)
                self._out_of_bounds(self._sources[file[row]], int(offset[row]), int(length[row]), name)
        return ItemTable(self._sources, file, offset, length), rows

    def _file(self, place: ItemPlace, name: str) -> int:
        """Number of the file that an item lies in."""
        number = self._numbers.get(place.path)
        if number is None:
            number = self._open_file(place, name)
        if place.transforms is not None:
            raise FormatError(
                "an item is transformed by a DCP extension, which cannot be undone here",
                tensor=name,
                found=str(place.transforms)[:100],
                remedy="load it in torch with that extension and save it again without",
            )
        return number

    def _open_file(self, place: ItemPlace, name: str) -> int:
        check_inside(place.path, self._folder.name)
        try:
            source = self._folder.open(place.path)
        except UnsafeError:
            raise
        except FormatError as problem:
            raise FormatError(
                f"a file that the index needs {problem.problem}",
                path=problem.path,
                tensor=name,
                remedy=_AGAIN,
            ) from problem
        self._numbers[place.path] = len(self._sources)
        self._sources.append(source)
        return len(self._sources) - 1

    def _out_of_bounds(self, source: ByteSource, offset: int, length: int, name: str) -> None:
        raise FormatError(
            "an item lies outside its file, which is truncated, or the index is damaged",
            path=source.name,
            tensor=name,
            expected=f"a range within {source.size} bytes",
            found=f"[{offset}, {offset + length})",
            remedy=_AGAIN,
        )

    def _object(self, name: str) -> Unread:
        places = self._index.places.pop(name, {})
        place = places.get(None)
        if place is None or len(places) != 1:
            raise FormatError("the index does not say where an object lies", tensor=name)
        source = self._sources[self._file(place, name)]
        if place.length <= 0 or place.offset > source.size - place.length:
            self._out_of_bounds(source, place.offset, place.length, name)
        return Unread(source, place.offset, place.length, name)

    def _tensor(self, name: str, entry: TensorEntry, boxes: Array, table: ItemTable, rows: range) -> LazyTensor:
        if math.prod(entry.shape) == 0:
            return Constant(entry.dtype, entry.shape)
        starts, sizes = np.ascontiguousarray(boxes[:, 0]), np.ascontiguousarray(boxes[:, 1])
        stops = starts + sizes
        check_exact_cover(entry.shape, starts, stops)
        nbytes = math.prod(entry.shape) * entry.dtype.itemsize
        held = int(table.length[rows.start : rows.stop].sum())
        short = table.length[rows.start : rows.stop] < np.prod(sizes, axis=1) * entry.dtype.itemsize
        if nbytes > held or short.any():
            raise FormatError(
                "its items are shorter than its chunks",
                path=table.source(rows[int(np.flatnonzero(short)[0])] if short.any() else rows[0]).name,
                tensor=name,
                expected=f"more than {nbytes} bytes",
                found=f"{held} bytes",
                remedy=_AGAIN,
            )
        tiles = Chunks(table, rows, name, entry.dtype, sizes)
        if len(tiles) == 1:
            return tiles[0]
        return Mosaic(entry.dtype, entry.shape, starts, stops, tiles)

    def _oddities(self) -> list[str]:
        found = []
        stale = sorted(name for name in self._names if name.endswith(".distcp") and name not in self._numbers)
        if stale:
            found.append(
                f"{len(stale)} .distcp files belong to no tensor, left by an earlier save of more ranks: "
                + ", ".join(stale[:3])
                + (", ..." if len(stale) > 3 else "")
            )
        if self._index.places:
            found.append(f"the index lists {len(self._index.places)} items of no tensor or object")
        return found


def _checksums(table: ItemTable, rows: Mapping[str, range], objects: Iterable[Unread]) -> Iterator[StoredChecksum]:
    archives = chain(
        (unread.archive() for unread in objects),
        (table.archive(row, name) for name, span in rows.items() for row in span),
    )
    while batch := list(islice(archives, _TOGETHER)):
        opened = read_torch_files(batch) if is_far(batch[0]) else map(read_torch, batch)
        for contents in opened:
            yield from stored_checksums(contents)
