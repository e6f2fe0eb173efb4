"""Several tensors computed from one, block by block: codes and the scales that they were divided by.

What belongs to a block (a row, 128 by 128 elements, 16 neighbours) depends on all of its elements and on nothing else.
Each output is a lazy tensor of its own; a writer that takes all of them reads and computes every block once, because
what was computed is kept, within bounds, until each output has been taken from it (``Tiles``).
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import UsageError
from anyckpt.identity import Identity, OfFields
from anyckpt.indexing import Array, Shape
from anyckpt.storage.gather import LONG_RUN, hole, is_hole
from anyckpt.tensor import LazyTensor, Mosaic, Stored, View, as_numbers

_TILE_BYTES = 1 << 20  # of several rows of blocks that are computed at a time
_BAND_BYTES = 4 << 20  # of one row of blocks
_LARGEST_BLOCK = 16 << 20
_MOST_LOOKED_AT = 64

_local = threading.local()


@dataclass(frozen=True)
class Output:
    """One of the tensors that are computed.

    Attributes:
        dtype: its element type.
        per: for how many elements of the source it has one, along each axis; a shorter run at the end counts, too.
    """

    dtype: DType
    per: Shape


class BlockFunction(OfFields, ABC):
    """What is computed of blocks: a frozen dataclass, all of it in its fields."""

    @abstractmethod
    def block(self, shape: Shape) -> Shape:
        """Elements along each axis that are computed together, of a source of this shape."""

    @abstractmethod
    def outputs(self, shape: Shape) -> tuple[Output, ...]:
        """What comes out of a source of this shape; ``per`` divides the block along each axis."""

    @abstractmethod
    def __call__(self, values: Array) -> tuple[Array, ...]:
        """The outputs' elements of some blocks side by side; may be called in any thread.

        Args:
            values: of the source's numpy type; the last block along an axis may be shorter than the others.

        Returns:
            an array of each output's numpy type (raw where it has none), with one element for each ``per``.
        """


class Computation:
    """A function of the blocks of a tensor, shared by its outputs.

    Args:
        child: the source.
        function: of its blocks.

    Raises:
        UsageError: a block is too large to be held, or an output has parts of an element in a block.
    """

    def __init__(self, child: LazyTensor, function: BlockFunction) -> None:
        block = function.block(child.shape)
        self.child = child
        self.function = function
        self.outputs = function.outputs(child.shape)
        for output in self.outputs:
            if len(block) != child.ndim or any(n % per for n, per in zip(block, output.per, strict=True)):
                raise UsageError("an output does not divide the blocks", expected=f"a divisor of {block}", found=output)
        within = tuple(max(1, min(n, whole)) for n, whole in zip(block, child.shape, strict=True))
        nbytes = math.prod(within) * child.dtype.itemsize
        if nbytes > _LARGEST_BLOCK:
            raise UsageError(
                "blocks are too large to be computed in bounded memory",
                expected=f"at most {_LARGEST_BLOCK:,} bytes",
                found=f"{nbytes:,} bytes in a block of {within}",
                remedy="choose smaller blocks",
            )
        self._tile = _tile(child, block)

    def identity(self) -> Identity:
        return self.child, self.function

    def tensors(self) -> tuple[Blockwise, ...]:
        """The outputs."""
        return tuple(Blockwise(self, number) for number in range(len(self.outputs)))

    def covering(self, start: Shape, shape: Shape, per: Shape) -> Iterator[Shape]:
        """The tiles that a box of an output lies in, by their place in the grid of tiles."""
        steps = [tile // p for tile, p in zip(self._tile, per, strict=True)]
        return product(*(range(b // s, (b + n - 1) // s + 1) for b, n, s in zip(start, shape, steps, strict=True)))

    def start(self, place: Shape) -> Shape:
        """The first index of a tile in the source."""
        return tuple(number * n for number, n in zip(place, self._tile, strict=True))

    def compute(self, place: Shape) -> tuple[Array, ...]:
        """The raw elements of all outputs in a tile.

        Raises:
            FormatError: bytes are missing from a file.
        """
        child, start = self.child, self.start(place)
        shape = tuple(min(n, whole - b) for n, whole, b in zip(self._tile, child.shape, start, strict=True))
        raw = np.empty(shape, child.dtype.raw)
        child.read_box(start, raw)
        arrays = self.function(as_numbers(raw, child.dtype))
        return tuple(
            np.ascontiguousarray(array).view(output.dtype.raw)
            for array, output in zip(arrays, self.outputs, strict=True)
        )


class Blockwise(LazyTensor):
    """One of the outputs of a computation."""

    __slots__ = ("computation", "number")

    def __init__(self, computation: Computation, number: int) -> None:
        output = computation.outputs[number]
        self.computation = computation
        self.number = number
        self.dtype = output.dtype
        self.shape = tuple(-(-n // per) for n, per in zip(computation.child.shape, output.per, strict=True))

    def identity(self) -> Identity:
        return self.computation, self.number

    def pieces(self) -> Iterator[Stored]:
        return self.computation.child.pieces()

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size:
            return
        computation, per = self.computation, self.computation.outputs[self.number].per
        if is_hole(out):
            first = tuple(b * p for b, p in zip(start, per, strict=True))
            last = zip(start, out.shape, per, computation.child.shape, strict=True)
            shape = tuple(min((b + n) * p, whole) - b * p for b, n, p, whole in last)
            computation.child.read_box(first, hole(shape, computation.child.dtype.raw))
            return
        end = tuple(b + n for b, n in zip(start, out.shape, strict=True))
        for place in computation.covering(start, out.shape, per):
            origin = tuple(b // p for b, p in zip(computation.start(place), per, strict=True))

            def copy(tile: Array, origin: Shape = origin) -> int:
                stop = tuple(b + n for b, n in zip(origin, tile.shape, strict=True))
                low, high = tuple(map(max, start, origin)), tuple(map(min, end, stop))
                part = tile[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))]
                inside: tuple[Any, ...] = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
                out[inside + (Ellipsis,)] = part  # noqa: RUF005 (see gather)
                return part.size

            tiles: Tiles | None = getattr(_local, "tiles", None)
            if tiles is None:
                copy(computation.compute(place)[self.number])
            else:
                tiles.take(computation, place, self.number, copy)


def blockwise(child: LazyTensor, function: BlockFunction) -> tuple[Blockwise, ...]:
    """The outputs of a function of a tensor's blocks.

    Raises:
        UsageError: a block is too large to be held, or an output has parts of an element in a block.
    """
    return Computation(child, function).tensors()


class Tiles:
    """What threads computed and not all outputs have taken yet.

    A tile that another thread computes is waited for.  Beyond the bound the oldest ones are forgotten, and computed
    again when they are asked for.

    Args:
        most: bytes to hold.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._changed = threading.Condition()
        self._tiles: OrderedDict[tuple[int, Shape], _Tile] = OrderedDict()

    def take(self, computation: Computation, place: Shape, number: int, copy: Callable[[Array], int]) -> None:
        """Give a tile of one output to ``copy``, which tells how many elements it took."""
        key = (id(computation), place)
        with self._changed:
            tile = self._tiles.get(key)
            while tile is not None and not tile.is_made:
                self._changed.wait()
                tile = self._tiles.get(key)
            made = tile is not None
            if tile is None:
                tile = self._tiles[key] = _Tile(computation)
        if not made:
            self._make(key, tile, place)
        array = tile.arrays[number]
        if array is None:  # an output is taken twice
            copy(computation.compute(place)[number])
            return
        count = copy(array)
        with self._changed:
            tile.left[number] -= count
            if tile.left[number] <= 0 and tile.arrays[number] is not None:
                tile.arrays[number] = None
                if self._tiles.get(key) is tile:
                    self._held -= array.nbytes
                    if not any(left > 0 for left in tile.left):
                        del self._tiles[key]

    def _make(self, key: tuple[int, Shape], tile: _Tile, place: Shape) -> None:
        try:
            arrays = tile.computation.compute(place)
        except BaseException:
            with self._changed:
                del self._tiles[key]
                self._changed.notify_all()
            raise
        with self._changed:
            tile.arrays = list(arrays)
            tile.left = [array.size for array in arrays]
            tile.is_made = True
            self._held += tile.nbytes
            if self._held > self._most:
                self._forget(key)
            self._changed.notify_all()

    def _forget(self, but: tuple[int, Shape]) -> None:
        for key in [key for key, tile in self._tiles.items() if tile.is_made and key != but]:
            self._held -= self._tiles.pop(key).nbytes
            if self._held <= self._most:
                break


class _Tile:
    def __init__(self, computation: Computation) -> None:
        self.computation = computation
        self.arrays: list[Array | None] = []
        self.left: list[int] = []
        self.is_made = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays if array is not None)


@contextmanager
def keeping(tiles: Tiles) -> Iterator[None]:
    """Within, what this thread computes is kept for the other outputs and for other threads."""
    before, _local.tiles = getattr(_local, "tiles", None), tiles
    try:
        yield
    finally:
        _local.tiles = before


def outputs_in(tensor: LazyTensor) -> Iterator[Blockwise]:
    """The outputs of computations that a tensor is made of, as far as it is made of few things."""
    if isinstance(tensor, Blockwise):
        yield tensor
    elif isinstance(tensor, View):
        yield from outputs_in(tensor.child)
    elif isinstance(tensor, Mosaic) and isinstance(tensor.tiles, list) and len(tensor.tiles) <= _MOST_LOOKED_AT:
        for tile in tensor.tiles:
            yield from outputs_in(tile)


def _tile(child: LazyTensor, block: Shape) -> Shape:
    """Blocks that are computed at a time: whole rows, or runs of them that are long enough to be read one by one."""
    tile = [max(1, n) for n in block]
    if not tile:
        return ()
    last, itemsize = child.ndim - 1, child.dtype.itemsize

    def grow(axis: int, nbytes: int) -> None:
        times = nbytes // max(1, math.prod(tile) * itemsize)
        tile[axis] *= max(1, min(times, -(-child.shape[axis] // tile[axis])))

    grow(last, _BAND_BYTES)
    if tile[last] < child.shape[last]:
        across = math.prod(tile[:last])
        grow(last, across * LONG_RUN + math.prod(tile) * itemsize)
    for axis in reversed(range(last)):
        if tile[axis + 1] < child.shape[axis + 1]:
            break
        grow(axis, _TILE_BYTES)
    return tuple(tile)
