"""The items of ``.distcp`` files: each a whole ``torch.save`` archive at some offset, opened when first read.

Opening a checkpoint must not read a million archives, so a chunk is a tensor over a source whose bytes are the
chunk's elements, and which looks into the archive for their place when the first of them is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np

from anyckpt.containers.torch_file import read_torch
from anyckpt.dtypes import DType
from anyckpt.errors import FormatError
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.pickling.calls import current, recording
from anyckpt.storage.source import ByteSource
from anyckpt.storage.zip import RecordSource
from anyckpt.tensor import LazySequence, LazyTensor, Stored

_Kind = tuple[str, Shape, int]
"""Element type and shape of a chunk, and bytes of its item."""

_UNKNOWN = -1
_STRIDED = -2
_HEADS = 4096
_END = 4096  # holds the directory of an archive of one tensor
_LONGEST_HEAD = 8192
_SHARDED_OBJECT = re.compile(r"/shard_[\d.]+(_[\d.]+)?$")


class ItemTable:
    """Where every chunk of a checkpoint lies, row by row.

    Args:
        sources: the files.
        file: index in ``sources``, per row.
        offset: first byte of the item in its file, per row.
        length: bytes of the item, per row.
    """

    def __init__(self, sources: Sequence[ByteSource], file: Array, offset: Array, length: Array) -> None:
        self.sources = sources
        self.file = file
        self.offset = offset
        self.length = length
        self._payload = np.full(len(file), _UNKNOWN, dtype=np.int64)
        self._strided: dict[int, LazyTensor] = {}
        self._heads: dict[_Kind, bytes] = {}  # empty where it tells nothing
        self._locks: dict[int | _Kind, Lock] = {}
        self._calls = current()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens archives itself, and records no names for anyone."""
        return type(self), (self.sources, self.file, self.offset, self.length)

    def source(self, row: int) -> ByteSource:
        return self.sources[int(self.file[row])]

    def archive(self, row: int, name: str) -> ByteSource:
        """The item as a source of its own."""
        return archive(self.source(row), int(self.offset[row]), int(self.length[row]), name)

    def payload(self, row: int, name: str, dtype: DType, shape: Shape) -> int | LazyTensor:
        """Offset in the file of the chunk's elements in C order, or the chunk itself if they lie otherwise.

        Raises:
            FormatError: the item is damaged, or not the tensor that the index announces.
        """
        known = int(self._payload[row])
        kind = (dtype.name, shape, int(self.length[row])) if known == _UNKNOWN else None
        while kind is not None and known == _UNKNOWN:
            key: int | _Kind = row if kind in self._heads else kind
            with self._locks.setdefault(key, Lock()):  # one thread opens an item, and one the first of a kind
                known = int(self._payload[row])
                if known == _UNKNOWN and (key == row or kind not in self._heads):
                    try:
                        known, head = self._open(row, name, dtype, shape)
                        self._payload[row] = known
                        self._learn(kind, head)
                    finally:
                        self._locks.pop(key, None)
        return self._strided[row] if known == _STRIDED else known

    def wanted(
        self, row: int, dtype: DType, shape: Shape, offset: int, length: int
    ) -> Iterator[tuple[ByteSource, int, int]]:
        """What answers a read of a chunk: its bytes, and before these are found the two ends of its archive too."""
        source, begin, size = self.source(row), int(self.offset[row]), int(self.length[row])
        known = int(self._payload[row])
        if known >= 0:
            yield from source.wanted(known + offset, length)
            return
        first = begin + offset if offset > _LONGEST_HEAD else begin
        yield from source.wanted(first, min(begin + offset + length + _LONGEST_HEAD, begin + size) - first)
        if first > begin:
            yield from source.wanted(begin, _LONGEST_HEAD)
        if not self._heads.get((dtype.name, shape, size)):
            yield from source.wanted(max(begin, begin + size - _END), min(size, _END))

    def _learn(self, kind: _Kind, head: bytes | None) -> None:
        """Note how items of a kind begin, only now that its first one is known: others need not open that again."""
        if head is not None and (kind in self._heads or len(self._heads) < _HEADS):
            self._heads[kind] = head

    def _open(self, row: int, name: str, dtype: DType, shape: Shape) -> tuple[int, bytes | None]:
        """Where the elements begin, and the archive up to them: empty if it tells nothing, None if it is known."""
        source, offset, length = self.source(row), int(self.offset[row]), int(self.length[row])
        # Archives of equal tensors by one writer are equal up to the elements: once one is understood, a comparison
        # does for the others, at a hundredth of the price.
        head = self._heads.get((dtype.name, shape, length))
        if head and source.read(offset, len(head)) == head:
            return offset + len(head), None
        with recording(self._calls):
            tensor = read_torch(self.archive(row, name)).root
        if not isinstance(tensor, LazyTensor) or tensor.dtype != dtype or tensor.shape != shape:
            is_tensor = isinstance(tensor, LazyTensor)
            raise FormatError(
                f"the item at byte {offset} is not the chunk that .metadata announces",
                path=source.name,
                tensor=name,
                expected=f"{dtype.name} {shape}",
                found=f"{tensor.dtype.name} {tensor.shape}" if is_tensor else f"a {type(tensor).__name__}",
                remedy="copy the checkpoint again from its origin",
            )
        if not isinstance(tensor, Stored) or tensor.strides is not None or not isinstance(tensor.source, RecordSource):
            self._strided[row] = tensor
            return _STRIDED, b""
        payload = tensor.source.locate()[1] + tensor.offset - source.locate()[1]
        head = source.read(offset, payload - offset) if offset < payload <= offset + _LONGEST_HEAD else b""
        return payload, head if b"/data.pkl" in head else b""


ELEMENTS = "elements"
"""Stands in the place of a chunk after where its archive begins: only reading tells which member of it that is."""


class ChunkSource(ByteSource):
    """The elements of one chunk in C order, found in its archive when first read."""

    __slots__ = ("_dtype", "_row", "_shape", "_table", "_tensor_name")

    def __init__(self, table: ItemTable, row: int, name: str, dtype: DType, shape: Shape, nbytes: int) -> None:
        file = table.source(row)
        self.name = file.name
        self.path = file.path
        self.size = nbytes
        self._table = table
        self._row = row
        self._tensor_name = name
        self._dtype = dtype
        self._shape = shape

    def identity(self) -> Identity:
        table, row = self._table, self._row
        return table.source(row), int(table.offset[row]), int(table.length[row]), self._dtype, self._shape

    def _payload(self) -> int | LazyTensor:
        return self._table.payload(self._row, self._tensor_name, self._dtype, self._shape)

    @property
    def at_once(self) -> int:
        return self._table.source(self._row).at_once

    def wanted(self, offset: int, length: int) -> Iterator[tuple[ByteSource, int, int]]:
        return self._table.wanted(self._row, self._dtype, self._shape, offset, length)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        payload = self._payload()
        if isinstance(payload, int):
            self._table.source(self._row).read_into(payload + offset, buffer)
            return
        itemsize = self._dtype.itemsize
        first = offset // itemsize
        elements = np.empty(-(-(offset + len(buffer)) // itemsize) - first, dtype=self._dtype.raw)
        payload.read_flat(first, elements)
        skip = offset - first * itemsize
        buffer[:] = elements.view(np.uint8)[skip : skip + len(buffer)].data

    def place(self) -> tuple[Hashable, int]:
        where, start = self._table.source(self._row).place()
        return (where, start + int(self._table.offset[self._row]), ELEMENTS), 0

    def locate(self) -> tuple[str | None, int]:
        """As for any source; opens the chunk's archive to find out."""
        payload = self._payload()
        if not isinstance(payload, int):
            return None, 0
        path, start = self._table.source(self._row).locate()
        return path, start + payload


class Chunks(LazySequence):
    """The chunks of one tensor, made when asked for.

    Args:
        table: where items lie.
        rows: the chunks' rows in it.
        name: the tensor's.
        dtype: element type.
        sizes: lengths of each chunk's axes, ``[chunks, axes]``.
    """

    def __init__(self, table: ItemTable, rows: range, name: str, dtype: DType, sizes: Array) -> None:
        self._table = table
        self._rows = rows
        self._name = name
        self._dtype = dtype
        self._sizes = sizes

    def identity(self) -> Identity:
        """Where the chunks' items lie; their files are not opened."""
        rows, table = slice(self._rows.start, self._rows.stop), self._table
        files = tuple(table.sources[number] for number in np.unique(table.file[rows]).tolist())
        return self._dtype, self._sizes, table.file[rows], table.offset[rows], table.length[rows], files

    def __len__(self) -> int:
        return len(self._rows)

    def make(self, index: int) -> LazyTensor:
        shape = tuple(self._sizes[index].tolist())
        nbytes = self._dtype.itemsize
        for n in shape:
            nbytes *= n
        source = ChunkSource(self._table, self._rows[index], self._name, self._dtype, shape, nbytes)
        return Stored(source, 0, self._dtype, shape)

    def files(self) -> set[str]:
        """Names of the files that the chunks lie in."""
        numbers = np.unique(self._table.file[self._rows.start : self._rows.stop])
        return {self._table.sources[number].name for number in numbers.tolist()}


def archive(source: ByteSource, offset: int, length: int, name: str) -> ByteSource:
    """The archive at ``[offset, offset + length)``.

    Raises:
        FormatError: the range is outside the file.
    """
    return source.slice(offset, length, f"{source.name} » {name} at byte {offset}")


class Unread:
    """An object that has not been read yet.

    Args:
        source: the file.
        offset: first byte of its archive.
        length: bytes of its archive.
        name: its name.
        wrapped: Megatron-Core's sharded objects are in a list of one.
    """

    __slots__ = ("_calls", "_length", "_name", "_offset", "_source", "_wrapped")

    def __init__(self, source: ByteSource, offset: int, length: int, name: str, *, wrapped: bool = True) -> None:
        self._source = source
        self._offset = offset
        self._length = length
        self._name = name
        self._wrapped = wrapped
        self._calls = current()

    def archive(self) -> ByteSource:
        """The item as a source of its own."""
        return archive(self._source, self._offset, self._length, self._name)

    def read(self) -> Any:
        """The object.  Megatron-Core wraps its sharded objects in a list of one, which is taken off.

        Raises:
            FormatError: the item is damaged.
        """
        with recording(self._calls):
            value = read_torch(self.archive()).root
        if self._wrapped and _SHARDED_OBJECT.search(self._name) and isinstance(value, list) and len(value) == 1:
            return value[0]
        return value


class LazyObjects(dict[str, Any]):
    """Objects by name, each read from its file when first asked for.

    A Megatron-Core checkpoint has one ``_extra_state`` per layer and linear map and one ``rng_state`` per rank:
    thousands of small archives that a conversion of weights never looks at.
    """

    def __init__(self, items: Mapping[str, Any]) -> None:
        super().__init__(items)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if type(value) is Unread:
            value = value.read()
            self[name] = value
        return value

    def __iter__(self) -> Iterator[str]:
        # With its own iterator, dict(self) and {**self} ask for each value instead of copying the table.
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def without(self, names: Mapping[str, Any] | set[str]) -> LazyObjects:
        """The objects other than ``names``; reads none."""
        return LazyObjects({name: value for name, value in super().items() if name not in names})

    def unread(self) -> dict[str, Any]:
        """The table as it is: objects, and ``Unread`` where none was asked for yet."""
        return dict(super().items())

    def copy(self) -> LazyObjects:
        return LazyObjects(self.unread())

    def __repr__(self) -> str:
        return f"<{len(self)} objects: {', '.join(list(self)[:5])}{', ...' if len(self) > 5 else ''}>"
