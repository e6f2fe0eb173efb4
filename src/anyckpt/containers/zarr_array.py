"""One zarr array: ``.zarray`` and a file of raw elements per chunk.

Megatron-Core writes no compressor and no filters.  A chunk file always has the size of a whole chunk, also at the
array's edges.  ``bfloat16`` is no type of zarr: Megatron-Core creates the array as ``<V2`` and then puts the word
into ``.zarray``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import BY_ZARR, DType
from anyckpt.errors import FormatError
from anyckpt.indexing import Shape
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import Constant, LazyTensor, Mosaic, Stored

ZARRAY = ".zarray"
_LIMIT = 1 << 20
_MOST_AXES = 16
_LARGEST = 1 << 62
_MOST_ABSENT = 1 << 20
_CHUNK = re.compile(r"\d{1,18}(?:\.\d{1,18})*", re.ASCII)
_AGAIN = "copy the checkpoint again from its origin"


@dataclass(frozen=True)
class ArrayMetadata:
    """What ``.zarray`` says.

    Attributes:
        dtype: element type.
        shape: of the whole.
        chunks: of each chunk.
        fill: little-endian bytes of the element that absent chunks consist of, None if undefined.
        separator: between the numbers in a chunk's name.
    """

    dtype: DType
    shape: Shape
    chunks: Shape
    fill: bytes | None
    separator: str

    @property
    def grid(self) -> Shape:
        """Chunks along each axis."""
        return tuple(-(-length // chunk) for length, chunk in zip(self.shape, self.chunks, strict=True))


def read_metadata(source: ByteSource, key: str) -> ArrayMetadata:
    """``.zarray``, strictly: what is not understood would make other elements.

    Raises:
        FormatError: it is no description of an uncompressed little-endian array in C order.
    """
    values = _object(source, key)

    def refuse(what: str, expected: object, remedy: str = _AGAIN) -> FormatError:
        return FormatError(
            f"{what} is not what Megatron-Core writes",
            path=source.name,
            tensor=key,
            expected=expected,
            found=repr(values.get(what))[:100],
            remedy=remedy,
        )

    if values.get("zarr_format") != 2:
        raise refuse("zarr_format", 2)
    shape, chunks = values.get("shape"), values.get("chunks")
    if not _is_shape(shape, 0):
        raise refuse("shape", "a list of lengths")
    if not _is_shape(chunks, 1) or len(chunks) != len(shape):
        raise refuse("chunks", f"{len(shape)} positive lengths")
    dtype = BY_ZARR.get(values["dtype"]) if isinstance(values.get("dtype"), str) else None
    if dtype is None:
        raise refuse("dtype", f"one of {', '.join(BY_ZARR)}")
    if max(math.prod(chunks), math.prod(shape)) * dtype.itemsize >= _LARGEST:
        raise refuse("shape", "a possible size")
    rewrite = "save it without compression and filters, with the zarr library"
    if values.get("compressor") is not None:
        raise refuse("compressor", "null: compressed zarr arrays are not read", rewrite)
    if values.get("filters"):
        raise refuse("filters", "null", rewrite)
    if values.get("order") != "C":
        raise refuse("order", '"C"', rewrite)
    separator = values.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise refuse("dimension_separator", '"." or "/"')
    return ArrayMetadata(dtype, tuple(shape), tuple(chunks), _fill(values.get("fill_value"), dtype, refuse), separator)


def _object(source: ByteSource, key: str) -> dict[str, Any]:
    try:
        values = json.loads(source.read_all(_LIMIT))
    except (ValueError, RecursionError) as problem:
        raise FormatError(f"is not valid JSON: {problem}", path=source.name, tensor=key, remedy=_AGAIN) from None
    if not isinstance(values, dict):
        raise FormatError("is not a JSON object", path=source.name, tensor=key, found=type(values).__name__)
    return values


def _is_shape(value: Any, least: int) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MOST_AXES:
        return False
    return all(type(length) is int and least <= length < _LARGEST for length in value)


def _fill(value: Any, dtype: DType, refuse: Any) -> bytes | None:
    if value is None:
        return None
    special = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    number = special.get(value) if isinstance(value, str) else value
    numbers = (int, float, bool) if dtype.kind in ("float", "complex") else (int, bool)
    if dtype.numpy is None or type(number) not in numbers:
        raise refuse("fill_value", f"null or a {dtype.name}")
    try:
        element = np.array(number, dtype=dtype.numpy)
    except (ValueError, OverflowError):
        raise refuse("fill_value", f"null or a {dtype.name}") from None
    if type(number) is int and dtype.kind not in ("float", "complex") and element.item() != number:  # numpy 1 wraps
        raise refuse("fill_value", f"null or a {dtype.name}")
    return element.tobytes()


def open_array(key: str, metadata: ArrayMetadata, files: Mapping[str, ByteSource], folder: str) -> LazyTensor:
    """The tensor whose chunks are in ``files``.

    Args:
        key: the tensor's name.
        metadata: its ``.zarray``.
        files: name in the array's directory -> file; only chunks.
        folder: the directory, for messages.

    Raises:
        FormatError: a chunk is missing where no fill value is given, lies outside the array, or has another size.
    """
    if not math.prod(metadata.shape):
        return Constant(metadata.dtype, metadata.shape)
    grid, ndim = metadata.grid, len(metadata.shape)
    nbytes = math.prod(metadata.chunks) * metadata.dtype.itemsize
    found: dict[Shape, ByteSource] = {}
    for name, source in files.items():
        index = _index(name, metadata)
        if index is None or any(at >= length for at, length in zip(index, grid, strict=True)):
            raise FormatError(
                "is no chunk of its array",
                path=source.name,
                tensor=key,
                expected=f"a chunk of the grid {list(grid)}",
                found=name,
                remedy="it may be left of an earlier save: save the checkpoint again into an empty directory",
            )
        if source.size != nbytes:
            raise FormatError(
                "a chunk is truncated or of another array",
                path=source.name,
                tensor=key,
                expected=f"{nbytes} bytes, {metadata.dtype.name} {list(metadata.chunks)}",
                found=f"{source.size} bytes",
                remedy=_AGAIN,
            )
        found[index] = source
    absent = math.prod(grid) - len(found)
    if absent and metadata.fill is None:
        first = next(index for index in _cells(grid, len(found) + 1) if index not in found)
        raise FormatError(
            "a chunk is missing and .zarray has no fill value",
            path=folder,
            tensor=key,
            expected=_name(first, metadata),
            found=f"{len(found)} of {math.prod(grid)} chunks",
            remedy="the save was interrupted, or not all files were copied",
        )
    if absent > _MOST_ABSENT:
        raise FormatError("lacks too many chunks", path=folder, tensor=key, found=f"{absent} missing", remedy=_AGAIN)
    if absent == math.prod(grid):
        return Constant(metadata.dtype, metadata.shape, metadata.fill)
    order = list(_cells(grid, math.prod(grid)))
    starts = np.array(order, dtype=np.int64).reshape(len(order), ndim) * np.array(metadata.chunks, dtype=np.int64)
    stops = np.minimum(starts + np.array(metadata.chunks, np.int64), np.array(metadata.shape, np.int64))
    tiles: list[LazyTensor] = []
    for index, sizes in zip(order, (stops - starts).tolist(), strict=True):
        if index in found:
            whole = Stored(found[index], 0, metadata.dtype, metadata.chunks)
            tiles.append(whole.box((0,) * ndim, tuple(sizes)))
        else:
            tiles.append(Constant(metadata.dtype, tuple(sizes), metadata.fill))
    return tiles[0] if len(tiles) == 1 else Mosaic(metadata.dtype, metadata.shape, starts, stops, tiles)


def _cells(grid: Shape, count: int) -> Iterator[Shape]:
    """The first cells of a grid in C order; makes no table of a grid that a damaged file claims to be vast."""
    for number in range(count):
        index, rest = [], number
        for length in reversed(grid):
            rest, at = divmod(rest, length)
            index.append(at)
        yield tuple(reversed(index))


def _index(name: str, metadata: ArrayMetadata) -> Shape | None:
    plain = name.replace(metadata.separator, ".") if metadata.separator != "." else name
    if not _CHUNK.fullmatch(plain):
        return None
    index = tuple(int(part) for part in plain.split("."))
    if not metadata.shape:
        return () if index == (0,) else None
    return index if len(index) == len(metadata.shape) and _name(index, metadata) == name else None


def _name(index: Shape, metadata: ArrayMetadata) -> str:
    return metadata.separator.join(map(str, index)) or "0"


def render_metadata(dtype: DType, shape: Shape, chunks: Shape) -> bytes:
    """``.zarray`` as Megatron-Core 0.12 has the zarr library write it."""
    values = {
        "chunks": list(chunks),
        "compressor": None,
        "dtype": dtype.zarr,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    return json.dumps(values, indent=4, sort_keys=True).encode("ascii")


def boxes(shape: Shape, chunks: Shape) -> Iterator[tuple[str, Shape, Shape]]:
    """Name, start and extent of each chunk, in C order."""
    grid = tuple(-(-length // chunk) for length, chunk in zip(shape, chunks, strict=True))
    for index in _cells(grid, math.prod(grid)):
        start = tuple(at * chunk for at, chunk in zip(index, chunks, strict=True))
        extent = tuple(min(c, n - b) for c, n, b in zip(chunks, shape, start, strict=True))
        yield ".".join(map(str, index)) or "0", start, extent
