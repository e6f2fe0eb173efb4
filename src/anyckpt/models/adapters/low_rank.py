"""A weight with a low-rank update added to it, computed where and when it is read.

The sum is that of ``merge_and_unload`` of peft 0.21: ``weight + scale * (up @ down)`` in float32; for DoRA each row is
then brought to the length that its magnitude says.  The product is computed in tiles of a fixed grid, so that an
element's bits do not depend on which box is asked for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.storage.gather import SCRATCH_BYTES, hole, is_hole, scratch
from anyckpt.tensor import LazyTensor, Stored, as_numbers
from anyckpt.tensor.halves import widen

TILE_ROWS = 32
_TILE_PRODUCTS = 1 << 18  # multiplications up to which OpenBLAS keeps to one thread: the engine has threads of its own
_TILE_COLUMNS = (64, 4096)
_KEPT_BYTES = 64 << 20  # of first factors in float32, in all


class LowRankSum(LazyTensor):
    """``weight + scale * up @ down``, rounded once; with ``magnitude``, rows are scaled to these lengths.

    Computed in float32, or float64 if the weight is that.  Holds one box of the weight, a tile of the product and
    ``down``; never the whole of the weight or of the product.

    Args:
        weight: (out, in), floating point.
        up: (out, rank), LoRA's B.
        down: (rank, in), LoRA's A.
        scale: of the product.
        magnitude: (out,), DoRA's; None for plain LoRA.
        dtype: element type of the result; the weight's if None.
    """

    __slots__ = ("_down", "_lengths", "down", "magnitude", "scale", "up", "weight")

    def __init__(
        self,
        weight: LazyTensor,
        up: LazyTensor,
        down: LazyTensor,
        scale: float,
        magnitude: LazyTensor | None = None,
        dtype: DType | None = None,
    ) -> None:
        self.weight = weight
        self.up = up
        self.down = down
        self.scale = scale
        self.magnitude = magnitude
        self.dtype = weight.dtype if dtype is None else dtype
        self.shape = weight.shape
        self._down = _Kept()
        self._lengths = _Kept()

    def identity(self) -> Identity:
        return self.weight, self.up, self.down, self.scale, self.magnitude, self.dtype

    def pieces(self) -> Iterator[Stored]:
        for child in (self.weight, self.up, self.down, self.magnitude):
            if child is not None:
                yield from child.pieces()

    def read_box(self, start: Shape, out: Array) -> None:
        if out.size == 0:
            return
        if is_hole(out):
            self.weight.read_box(start, hole(out.shape, self.weight.dtype.raw))
            self.up.read_box((start[0], 0), hole((out.shape[0], self.up.shape[1]), self.up.dtype.raw))
            return
        most = max(1, SCRATCH_BYTES // self._computed.itemsize)
        rows = max(1, min(out.shape[0], most // out.shape[1]))
        columns = min(out.shape[1], max(1, most // rows))
        for top in range(0, out.shape[0], rows):
            for left in range(0, out.shape[1], columns):
                part = out[top : top + rows, left : left + columns]
                assert self.dtype.numpy is not None
                with np.errstate(all="ignore"), scratch(part.size * self._computed.itemsize) as buffer:
                    total = buffer.view(self._computed).reshape(part.shape)
                    self._sum((start[0] + top, start[1] + left), total)
                    if self.magnitude is not None:
                        total *= self._factors(start[0] + top, part.shape[0])[:, None]
                    np.copyto(part.view(self.dtype.numpy), total, casting="unsafe")

    @property
    def _computed(self) -> np.dtype[np.floating]:
        return np.dtype(np.float64 if self.weight.dtype.name == "float64" else np.float32)

    def _sum(self, start: Shape, total: Array) -> None:
        """Fill ``total`` with a box of the sum before rows are scaled."""
        shape = total.shape
        _read_into(total, self.weight, start)
        width = tile_columns(self.down.shape[0])
        first = self._down.get(lambda: _read(self.down, (0, 0), self.down.shape, self._computed))
        last = (start[0] + shape[0], start[1] + shape[1])
        for top in range(start[0] // TILE_ROWS * TILE_ROWS, last[0], TILE_ROWS):
            bottom = min(top + TILE_ROWS, self.shape[0])
            second = _read(self.up, (top, 0), (bottom - top, self.up.shape[1]), self._computed)
            above, below = max(top, start[0]), min(bottom, last[0])
            for left in range(start[1] // width * width, last[1], width):
                product = second @ first[:, left : left + width]
                product *= self._computed.type(self.scale)
                begin, end = max(left, start[1]), min(left + width, last[1])
                inside = product[above - top : below - top, begin - left : end - left]
                total[above - start[0] : below - start[0], begin - start[1] : end - start[1]] += inside

    def _factors(self, start: int, count: int) -> Array:
        """What rows are multiplied by: magnitude over length."""
        assert self.magnitude is not None
        known = self._lengths.get(lambda: np.full(self.shape[0], np.nan, self._computed))
        lengths = known[start : start + count]
        if np.isnan(lengths).any():
            rows = max(1, SCRATCH_BYTES // (self.shape[1] * self._computed.itemsize))
            for at in range(0, count, rows):
                whole = np.empty((min(rows, count - at), self.shape[1]), self._computed)
                self._sum((start + at, 0), whole)
                np.square(whole, out=whole)
                lengths[at : at + rows] = np.sqrt(np.add.reduce(whole, axis=1))
        return _read(self.magnitude, (start,), (count,), self._computed) / lengths


def tile_columns(rank: int) -> int:
    """Width of a tile of products of this rank."""
    fewest, most = _TILE_COLUMNS
    return min(most, max(fewest, _TILE_PRODUCTS // (TILE_ROWS * rank)))


class _Kept:
    """An array that may be thrown away at any time, because others of its kind need the memory."""

    _lock = threading.Lock()
    _used: ClassVar[OrderedDict[int, _Kept]] = OrderedDict()

    def __init__(self) -> None:
        self._array: Array | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process makes the array itself."""
        return type(self), ()

    def get(self, make: Callable[[], Array]) -> Array:
        """The array, made if it is not there."""
        array = self._array
        if array is None:
            array = make()
        with _Kept._lock:
            self._array = array
            used = _Kept._used
            used[id(self)] = self
            used.move_to_end(id(self))
            held = sum(one._array.nbytes for one in used.values() if one._array is not None)
            while held > _KEPT_BYTES and len(used) > 1:
                _, oldest = used.popitem(last=False)
                held -= 0 if oldest._array is None else oldest._array.nbytes
                oldest._array = None
        return array


def _read(tensor: LazyTensor, start: Shape, shape: Shape, computed: np.dtype[np.floating]) -> Array:
    """A box of a tensor as numbers to compute with."""
    numbers = np.empty(shape, computed)
    _read_into(numbers, tensor, start)
    return numbers


def _read_into(numbers: Array, tensor: LazyTensor, start: Shape) -> None:
    with scratch(numbers.size * tensor.dtype.itemsize) as buffer:
        raw = buffer.view(tensor.dtype.raw).reshape(numbers.shape)
        tensor.read_box(start, raw)
        widen(numbers, as_numbers(raw, tensor.dtype))
