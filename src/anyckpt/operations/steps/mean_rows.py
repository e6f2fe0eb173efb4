"""Rows that are the mean of a tensor's rows, found in a pass over it when they are first needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.storage.gather import Hole
from anyckpt.tensor import LazyTensor, Reduction, Stored


class RowSums(Reduction[dict[int, Array]]):
    """The sum of the rows of a tensor in float64, by the first element of each run of it."""

    def nothing(self) -> dict[int, Array]:
        return {}

    def look_at(self, arrays: Sequence[Array], group: int, start: int) -> dict[int, Array]:
        shape = self.operands[0][0].shape
        width = math.prod(shape[1:])
        sums = np.zeros(width, np.float64)
        values = arrays[0].astype(np.float64)
        before = min(-start % width, len(values))  # of a row that began in the run before
        sums[start % width : start % width + before] += values[:before]
        rows = (len(values) - before) // width
        sums += values[before : before + rows * width].reshape(rows, width).sum(axis=0)
        rest = values[before + rows * width :]
        sums[: len(rest)] += rest
        return {start: sums}

    def join(self, first: dict[int, Array], second: dict[int, Array]) -> dict[int, Array]:
        return {**first, **second}


class MeanRows(LazyTensor):
    """So many rows, each the mean of a tensor's.

    Args:
        sums: of the tensor's rows.
        count: rows.
    """

    __slots__ = ("sums",)

    def __init__(self, sums: RowSums, count: int) -> None:
        child = sums.operands[0][0]
        self.sums = sums
        self.dtype = child.dtype
        self.shape = (count, *child.shape[1:])

    def identity(self) -> Identity:
        return self.sums, self.shape

    def pieces(self) -> Iterator[Stored]:
        return self.sums.operands[0][0].pieces()

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size or isinstance(out, Hole):
            return
        assert self.dtype.numpy is not None
        found = self.sums.value()
        total = np.sum([found[run] for run in sorted(found)], axis=0)
        mean = (total / self.sums.operands[0][0].shape[0]).astype(self.dtype.numpy).reshape(self.shape[1:])
        part = mean[tuple(slice(b, b + n) for b, n in zip(start[1:], out.shape[1:], strict=True))]
        out[...] = np.asarray(part).view(self.dtype.raw)


def mean_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """So many rows, each the mean of a floating-point tensor's rows."""
    return MeanRows(RowSums([(tensor,)]), count)
