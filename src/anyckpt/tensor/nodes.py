"""Lazy tensors that say where elements are: in a source, nowhere, or in boxes laid side by side."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.identity import Identity
from anyckpt.indexing import (
    Array,
    Shape,
    c_strides,
    moved_unit_axes,
    reshaped_strides,
    with_axes,
)
from anyckpt.storage.gather import gather
from anyckpt.storage.requests import is_far
from anyckpt.storage.source import ByteSource
from anyckpt.tensor.lazy import LazyTensor
from anyckpt.tensor.views import Permuted, Reshaped

_PUSH_LIMIT = 4096


class Stored(LazyTensor):
    """A strided region of a source: what a file format's reader makes.

    Args:
        source: where the bytes are.
        offset: byte at which the element with index zero begins.
        dtype: element type; little-endian.
        shape: elements along each axis.
        strides: elements between neighbours along each axis, none negative; C order if None.
    """

    __slots__ = ("offset", "source", "strides")

    def __init__(
        self, source: ByteSource, offset: int, dtype: DType, shape: Shape, strides: Shape | None = None
    ) -> None:
        self.source = source
        self.offset = offset
        self.dtype = dtype
        self.shape = shape
        self.strides = None if strides is None or strides == c_strides(shape) else strides

    def identity(self) -> Identity:
        return self.source, self.offset, self.dtype, self.shape, self.strides

    def read_box(self, start: Shape, out: Array) -> None:
        itemsize = self.dtype.itemsize
        strides = self.strides or c_strides(self.shape)
        first = self.offset + itemsize * sum(b * s for b, s in zip(start, strides, strict=True))
        gather(self.source, first, tuple(s * itemsize for s in strides), out)

    def read_flat(self, start: int, out: Array) -> None:
        if self.strides is not None:
            super().read_flat(start, out)
        else:
            itemsize = self.dtype.itemsize
            gather(self.source, self.offset + start * itemsize, (itemsize,), out)

    @property
    def is_far(self) -> bool:
        return is_far(self.source)

    def pieces(self) -> Iterator[Stored]:
        yield self

    def region(self) -> Stored:
        return self

    def stored_bytes(self) -> int:
        """Bytes from the first element to the last one."""
        if self.strides is None or not self.size:
            return self.nbytes
        strides = self.strides
        return self.dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True)))

    def check(self) -> None:
        """Raise FormatError unless every element lies inside the source; reads nothing."""
        self.source.check_range(self.offset, self.stored_bytes())

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        strides = self.strides or c_strides(self.shape)
        first = self.offset + self.dtype.itemsize * sum(b * s for b, s in zip(start, strides, strict=True))
        return Stored(self.source, first, self.dtype, shape, strides)

    def every(self, axis: int, step: int) -> LazyTensor:
        strides = [*(self.strides or c_strides(self.shape))]
        strides[axis] *= step
        shape = [*self.shape]
        shape[axis] = -(-shape[axis] // step)
        return Stored(self.source, self.offset, self.dtype, tuple(shape), tuple(strides))

    def _reshape(self, shape: Shape) -> LazyTensor:
        strides = None if self.strides is None else reshaped_strides(self.shape, self.strides, shape)
        if self.strides is not None and strides is None:
            return Reshaped(self, shape)
        return Stored(self.source, self.offset, self.dtype, shape, strides)

    def _permute(self, axes: Shape) -> LazyTensor:
        strides = self.strides or c_strides(self.shape)
        order = tuple(strides[a] for a in axes)
        return Stored(self.source, self.offset, self.dtype, tuple(self.shape[a] for a in axes), order)


class Constant(LazyTensor):
    """One element repeated; zero if ``element`` (its little-endian bytes) is None."""

    __slots__ = ("element",)

    def __init__(self, dtype: DType, shape: Shape, element: bytes | None = None) -> None:
        self.dtype = dtype
        self.shape = shape
        self.element = bytes(dtype.itemsize) if element is None else element

    def identity(self) -> Identity:
        return self.dtype, self.shape, self.element

    def read_box(self, start: Shape, out: Array) -> None:
        out[...] = np.frombuffer(self.element, dtype=out.dtype)[0]

    def pieces(self) -> Iterator[Stored]:
        return iter(())

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return Constant(self.dtype, shape, self.element)

    def _reshape(self, shape: Shape) -> LazyTensor:
        return Constant(self.dtype, shape, self.element)

    def _permute(self, axes: Shape) -> LazyTensor:
        return Constant(self.dtype, tuple(self.shape[a] for a in axes), self.element)


class Mosaic(LazyTensor):
    """Boxes laid side by side: joined shards, a padded vocabulary, an interleaved QKV.

    Args:
        dtype: element type of every piece.
        shape: the whole.
        starts: index of the first element of each piece, ``[pieces, axes]``.
        stops: index past the last one, same shape.
        tiles: the pieces; any sequence, so that a checkpoint of a million chunks can make them when asked.
    """

    __slots__ = ("starts", "stops", "tiles")

    def __init__(self, dtype: DType, shape: Shape, starts: Array, stops: Array, tiles: Sequence[LazyTensor]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.starts = starts
        self.stops = stops
        self.tiles = tiles

    def identity(self) -> Identity:
        return self.dtype, self.shape, self.starts, self.stops, self.tiles

    def _touched(self, start: Shape, end: Shape) -> Array:
        """Numbers of the pieces of which a part is inside a box."""
        return np.flatnonzero(((self.starts < end) & (self.stops > start)).all(axis=1))

    def overlaps(self, start: Shape, shape: Shape) -> Iterator[tuple[int, list[int], list[int]]]:
        """Number, first index and index past the last of each piece's part inside a box, in the whole's indices."""
        end = tuple(b + n for b, n in zip(start, shape, strict=True))
        for number in self._touched(start, end):
            low = np.maximum(self.starts[number], start)
            high = np.minimum(self.stops[number], end)
            yield int(number), low.tolist(), high.tolist()

    def read_box(self, start: Shape, out: Array) -> None:
        for number, low, high in self.overlaps(start, out.shape):
            inside = tuple(a - int(b) for a, b in zip(low, self.starts[number], strict=True))
            where: tuple[Any, ...] = tuple(slice(a - b, c - b) for a, b, c in zip(low, start, high, strict=True))
            self.tiles[number].read_box(inside, out[where + (Ellipsis,)])  # noqa: RUF005 (see gather)

    def pieces(self) -> Iterator[Stored]:
        for tile in self.tiles:
            yield from tile.pieces()

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        end = tuple(b + n for b, n in zip(start, shape, strict=True))
        hit = self._touched(start, end)
        low_corners, high_corners = self.starts[hit], self.stops[hit]
        if len(hit) > 1 and (low_corners >= start).all() and (high_corners <= end).all():
            some = _Some(self.tiles, hit)
            return Mosaic(self.dtype, shape, low_corners - start, high_corners - start, some)
        tiles, starts, stops = [], [], []
        for number, low, high in self.overlaps(start, shape):
            inside = tuple(a - int(b) for a, b in zip(low, self.starts[number], strict=True))
            extent = tuple(c - a for a, c in zip(low, high, strict=True))
            tiles.append(self.tiles[number].box(inside, extent))
            starts.append([a - b for a, b in zip(low, start, strict=True)])
            stops.append([c - b for b, c in zip(start, high, strict=True)])
        return tiled(self.dtype, shape, starts, stops, tiles)

    def _reshape(self, shape: Shape) -> LazyTensor:
        moved = moved_unit_axes(self.shape, shape)
        if moved is None or len(self.tiles) > _PUSH_LIMIT:
            return Reshaped(self, shape)
        starts = with_axes(self.starts, moved, 0)
        stops = with_axes(self.stops, moved, 1)
        extents = (stops - starts).tolist()
        tiles = [tile.reshape(extent) for tile, extent in zip(self.tiles, extents, strict=True)]
        return Mosaic(self.dtype, shape, starts, stops, tiles)

    def _permute(self, axes: Shape) -> LazyTensor:
        if len(self.tiles) > _PUSH_LIMIT:
            return Permuted(self, axes)
        shape = tuple(self.shape[a] for a in axes)
        order = list(axes)
        tiles = [tile.permute(axes) for tile in self.tiles]
        return Mosaic(self.dtype, shape, self.starts[:, order], self.stops[:, order], tiles)


class LazySequence(Sequence[LazyTensor]):
    """Tensors that are made when they are asked for."""

    @abstractmethod
    def make(self, index: int) -> LazyTensor:
        """The tensor at an index, which may be negative."""

    @overload
    def __getitem__(self, index: int) -> LazyTensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LazyTensor]: ...
    def __getitem__(self, index: int | slice) -> LazyTensor | Sequence[LazyTensor]:
        return _Some(self, np.arange(len(self))[index]) if isinstance(index, slice) else self.make(index)


class _Some(LazySequence):
    """Some of a sequence of pieces, still made only when asked for."""

    def __init__(self, pieces: Sequence[LazyTensor], numbers: Array) -> None:
        self._pieces: Sequence[LazyTensor] = pieces._pieces if isinstance(pieces, _Some) else pieces
        self._numbers: Array = pieces._numbers[numbers] if isinstance(pieces, _Some) else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def identity(self) -> Identity:
        return self._pieces, self._numbers

    def make(self, index: int) -> LazyTensor:
        return self._pieces[int(self._numbers[index])]


def corners(values: Sequence[Sequence[int]], ndim: int) -> Array:
    """Corners of boxes, ``[boxes, axes]``."""
    return np.array(values, dtype=np.int64).reshape(len(values), ndim)


def tiled(
    dtype: DType,
    shape: Shape,
    starts: Sequence[Sequence[int]],
    stops: Sequence[Sequence[int]],
    tiles: Sequence[LazyTensor],
) -> LazyTensor:
    """Boxes laid side by side, which are known to cover the shape; no more of a node than it takes."""
    full = [i for i, tile in enumerate(tiles) if tile.size]
    if len(full) < len(tiles):
        starts, stops = [starts[i] for i in full], [stops[i] for i in full]
        tiles = [tiles[i] for i in full]
    if len(tiles) == 1 and tiles[0].shape == shape:
        return tiles[0]
    if not tiles:
        return Constant(dtype, shape)
    return Mosaic(dtype, shape, corners(starts, len(shape)), corners(stops, len(shape)), tiles)
