"""The frame of a GGUF file: a header of metadata and of tensors' names, types and places, then their data, aligned.

As ggml's specification says (version 3; version 2 differs in nothing that is read here).  Lengths are those of an
untrusted file: each is held against what is left of it before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.formats.gguf.types import BY_NUMBER, ElementType
from anyckpt.storage.source import ByteSource

MAGIC = b"GGUF"
ALIGNMENT = 32
_VERSION = 3
_VERSIONS = (2, 3)
_HEADER_LIMIT = 256 << 20
_FIRST_CHUNK = 4 << 10
_LARGEST_CHUNK = 1 << 20
_MOST_AXES = 4
_SMALLEST_VALUE = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""Number of a type of value -> how ``struct`` has it."""
_STRING, _ARRAY = 8, 9
UINT16, UINT32, INT32, FLOAT32, BOOL = 2, 4, 5, 6, 7


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header tells of it.

    Attributes:
        name: as stored.
        type: of its elements.
        shape: elements along each axis, the last one contiguous (the file has them the other way round).
        offset: first byte in the file.
    """

    name: str
    type: ElementType
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """What a file says before its data.

    Attributes:
        version: of the format.
        metadata: key -> value: a number, a text, a truth value, or a list of such.
        tensors: in stored order.
    """

    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]


def read_header(source: ByteSource) -> Header:
    """The header of a file.

    Raises:
        FormatError: it is damaged, big-endian, or of an unknown version or element type.
        UnsafeError: it states lengths that the file cannot hold.
    """
    cursor = _Cursor(source)
    if cursor.take(4) != MAGIC:
        raise FormatError("does not begin as a GGUF file", path=source.name)
    version = cursor.number("<I")
    if version not in _VERSIONS:
        big = version & 0xFFFF == 0 and version
        raise FormatError(
            "is a big-endian GGUF file" if big else "is of an unknown version of GGUF",
            path=source.name,
            expected=" or ".join(map(str, _VERSIONS)),
            found=int.from_bytes(version.to_bytes(4, "big"), "little") if big else version,
            remedy="convert the model again, for a little-endian machine" if big else "convert the model again",
        )
    tensor_count, value_count = cursor.number("<Q"), cursor.number("<Q")
    cursor.check(tensor_count, _SMALLEST_TENSOR, "tensors")
    cursor.check(value_count, _SMALLEST_VALUE, "values")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        if key in metadata:
            raise FormatError(f"has the key {key!r} twice", path=source.name)
        metadata[key] = cursor.value(cursor.number("<I"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FormatError("general.alignment is no power of two", path=source.name, found=alignment)
    infos = [_info(cursor) for _ in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    return Header(version, metadata, tuple(_placed(infos, start, source)))


def _info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.text()
    axes = cursor.number("<I")
    if axes > _MOST_AXES:
        raise FormatError(f"has {axes} axes", path=cursor.source.name, tensor=name, expected=f"at most {_MOST_AXES}")
    shape = tuple(cursor.number("<Q") for _ in range(axes))[::-1]
    return name, cursor.number("<I"), shape, cursor.number("<Q")


def _placed(
    infos: Sequence[tuple[str, int, tuple[int, ...], int]], start: int, source: ByteSource
) -> Iterator[TensorInfo]:
    seen: set[str] = set()
    for name, number, shape, offset in infos:
        if name in seen:
            raise FormatError("is there twice", path=source.name, tensor=name)
        seen.add(name)
        kind = BY_NUMBER.get(number)
        if kind is None:
            raise FormatError(
                "has elements of an unknown type",
                path=source.name,
                tensor=name,
                found=f"type {number}",
                remedy="convert the model again, to another type",
            )
        if (shape[-1] if shape else 1) % kind.block:
            raise FormatError(
                f"has rows that are no whole blocks of {kind.name}",
                path=source.name,
                tensor=name,
                expected=f"a multiple of {kind.block} columns",
                found=f"shape {list(shape)}",
            )
        nbytes = prod(shape) // kind.block * kind.nbytes
        try:
            source.check_range(start + offset, nbytes)
        except FormatError as error:
            error.tensor = name
            raise
        yield TensorInfo(name, kind, shape, start + offset)


class _Cursor:
    """Reads a header from its start, in growing chunks."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.position = 0
        self._from = 0
        self._data = b""
        self._chunk = _FIRST_CHUNK

    def check(self, count: int, each: int, what: str) -> None:
        """Raise unless so many things can follow.

        Raises:
            UnsafeError: the file is too short for them.
        """
        left = min(self.source.size, _HEADER_LIMIT) - self.position
        if count * each > left:
            raise UnsafeError(
                f"states more {what} in its header than it can hold",
                path=self.source.name,
                expected=f"at most {max(left, 0) // each:,}",
                found=f"{count:,}",
                remedy="copy it again from its origin",
            )

    def take(self, nbytes: int) -> bytes:
        """The next bytes.

        Raises:
            FormatError: the file ends.
        """
        first = self.position - self._from
        if first + nbytes > len(self._data):
            self.check(nbytes, 1, "bytes")
            count = min(max(nbytes, self._chunk), self.source.size - self.position)
            self._chunk = min(2 * self._chunk, _LARGEST_CHUNK)  # a header without a tokenizer is short
            self._data, self._from, first = self.source.read(self.position, count), self.position, 0
        self.position += nbytes
        return self._data[first : first + nbytes]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        self.check(length, 1, "characters")
        return self.take(length).decode(errors="surrogateescape")

    def value(self, kind: int, *, inside: bool = False) -> Any:
        """A value of the type with this number.

        Raises:
            FormatError: there is no such type, or lists lie in lists.
        """
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or inside:
            raise FormatError(
                "has a list of lists in its metadata" if kind == _ARRAY else "has a value of an unknown type",
                path=self.source.name,
                found=f"type {kind} near byte {self.position}",
            )
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            form = _SCALARS[kind]
            size = struct.calcsize(form)
            self.check(count, size, "elements of a list")
            return list(struct.unpack(f"<{count}{form[1]}", self.take(count * size)))
        self.check(count, 8, "elements of a list")
        return [self.value(kind, inside=True) for _ in range(count)]


@dataclass(frozen=True)
class Typed:
    """A value for the metadata, in a type that Python's own does not tell.

    Attributes:
        kind: number of the type; of a list, that of its elements.
        value: a number, or a list of numbers.
    """

    kind: int
    value: Any


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, ElementType, tuple[int, ...]]]) -> bytes:
    """A header, with what aligns the first tensor's data; each following one is aligned in its turn.

    Args:
        metadata: key -> text, list of texts, int (as uint32), float (as float32), bool, or ``Typed``.
        tensors: name, type and shape of each.
    """
    sizes = (aligned(prod(shape) // kind.block * kind.nbytes) for _, kind, shape in tensors)
    offsets = accumulate(sizes, initial=0)
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), *_value(value)]
    for (name, kind, shape), offset in zip(tensors, offsets, strict=False):
        parts += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind.number, offset)]
    data = b"".join(parts)
    return data + bytes(aligned(len(data)) - len(data))


def aligned(nbytes: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> Iterator[bytes]:
    if isinstance(value, str):
        yield struct.pack("<I", _STRING) + _text(value)
    elif isinstance(value, Typed):
        form = _SCALARS[value.kind]
        if isinstance(value.value, list):
            count = len(value.value)
            yield struct.pack(f"<IIQ{count}{form[1]}", _ARRAY, value.kind, count, *value.value)
        else:
            yield struct.pack("<I", value.kind) + struct.pack(form, value.value)
    elif isinstance(value, list):
        yield struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        yield from map(_text, value)
    else:
        kind = BOOL if isinstance(value, bool) else UINT32 if isinstance(value, int) else FLOAT32
        yield from _value(Typed(kind, value))
