"""Rows that are the mean of a tensor's rows, found in a pass over it when they are first needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.storage.gather import is_hole
from anyckpt.tensor import LazyTensor, Reduction, Stored


class RowSum(Reduction[Array]):
    """The sum of the rows of a tensor in float64, of as many numbers as a row has."""

    @property
    def _width(self) -> int:
        return math.prod(self.operands[0][0].shape[1:])

    def nothing(self) -> Array:
        return np.zeros(self._width, np.float64)

    def look_at(self, arrays: Sequence[Array], group: int, start: int) -> Array:
        width = self._width
        sums = np.zeros(width, np.float64)
        values = arrays[0].astype(np.float64)
        before = min(-start % width, len(values))  # of a row that began in the run before
        sums[start % width : start % width + before] += values[:before]
        rows = (len(values) - before) // width
        sums += values[before : before + rows * width].reshape(rows, width).sum(axis=0)
        rest = values[before + rows * width :]
        sums[: len(rest)] += rest
        return sums

    def join(self, first: Array, second: Array) -> Array:
        first += second
        return first


class MeanRows(LazyTensor):
    """So many rows, each the mean of a tensor's.

    Args:
        total: the sum of the tensor's rows.
        count: rows.
    """

    __slots__ = ("total",)

    def __init__(self, total: RowSum, count: int) -> None:
        child = total.operands[0][0]
        self.total = total
        self.dtype = child.dtype
        self.shape = (count, *child.shape[1:])

    def identity(self) -> Identity:
        return self.total, self.shape

    def pieces(self) -> Iterator[Stored]:
        return self.total.operands[0][0].pieces()

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size or is_hole(out):
            return
        assert self.dtype.numpy is not None
        mean = (
            (self.total.value() / self.total.operands[0][0].shape[0]).astype(self.dtype.numpy).reshape(self.shape[1:])
        )
        part = mean[tuple(slice(b, b + n) for b, n in zip(start[1:], out.shape[1:], strict=True))]
        out[...] = np.asarray(part).view(self.dtype.raw)


def mean_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """So many rows, each the mean of a floating-point tensor's rows."""
    return MeanRows(RowSum([(tensor,)]), count)
