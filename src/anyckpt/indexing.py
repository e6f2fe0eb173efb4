"""Index arithmetic on shapes and boxes; nothing here reads anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from anyckpt.errors import LastingError

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Shape = tuple[int, ...]

CACHED_ELEMENTS = 1 << 16
"""Elements with which a computation of several steps stays in the processor's cache."""


def in_cache(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Arrays of one shape in parts of at most ``CACHED_ELEMENTS``, the same part of each; whole if they do not lie in
    C order."""
    if arrays[0].size <= CACHED_ELEMENTS or not all(array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, arrays[0].size, CACHED_ELEMENTS):
        yield tuple(array[start : start + CACHED_ELEMENTS] for array in flat)


def look_up(table: Array, codes: Array, out: Array) -> None:
    """Fill ``out`` with the element of a table that each code is the place of; all of them are places in it.

    Of numpy's modes "raise" takes a copy of the output, and "clip" half as long again.
    """
    np.take(table, codes, out=out, mode="wrap")


def check_cover(shape: Shape, starts: Array, stops: Array) -> None:
    """Raise LastingError unless the boxes ``[starts, stops)`` cover ``shape`` exactly once.

    Args:
        shape: the whole.
        starts: first index of each box, ``[boxes, axes]``.
        stops: index past the last, same shape.
    """
    if (starts < 0).any() or (stops > np.array(shape, dtype=np.int64)).any():
        worst = int(np.flatnonzero((starts < 0).any(1) | (stops > np.array(shape, dtype=np.int64)).any(1))[0])
        raise LastingError(
            "a piece lies outside the tensor",
            expected=f"within {shape}",
            found=f"{starts[worst].tolist()} to {stops[worst].tolist()}",
        )
    full = (stops > starts).all(axis=1)
    starts, stops = starts[full], stops[full]
    covered = sum(math.prod(row) for row in (stops - starts).tolist())
    if covered != math.prod(shape):
        raise LastingError(
            "pieces overlap" if covered > math.prod(shape) else "pieces are missing",
            expected=f"{math.prod(shape)} elements of shape {shape}",
            found=f"{covered} elements",
        )
    if not shape or len(starts) < 2:
        return
    axis = int(np.argmax([len(np.unique(starts[:, a])) for a in range(len(shape))]))
    order = np.argsort(starts[:, axis], kind="stable")
    starts, stops = starts[order], stops[order]
    reach = np.searchsorted(starts[:, axis], stops[:, axis], side="left")
    for i in np.flatnonzero(reach > np.arange(len(starts)) + 1):
        others = slice(i + 1, reach[i])
        if ((starts[others] < stops[i]) & (stops[others] > starts[i])).all(axis=1).any():
            raise LastingError("pieces overlap", found=f"{starts[i].tolist()} to {stops[i].tolist()}")


def flat_boxes(shape: Shape, start: int, count: int) -> Iterator[tuple[Shape, Shape]]:
    """Cut ``count`` elements from ``start`` on, in C order, into boxes: at most two per axis and one more."""
    if count <= 0:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    row, offset = divmod(start, inner)
    if offset or count < inner:
        here = min(count, inner - offset)
        for box_start, box_shape in flat_boxes(shape[1:], offset, here):
            yield (row, *box_start), (1, *box_shape)
        start, count, row = start + here, count - here, row + 1
        if not count:
            return
    rows, rest = divmod(count, inner)
    if rows:
        yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
    if rest:
        for box_start, box_shape in flat_boxes(shape[1:], 0, rest):
            yield (row + rows, *box_start), (1, *box_shape)


def runs(shape: Shape, start: Shape, out: Array) -> Iterator[tuple[int, Array]]:
    """Cut a box over the leading axes into runs of consecutive flat indices.

    Yields the flat index of the run and the part of ``out`` that it fills, its leading axes merged into one.
    """
    if not shape:
        yield 0, out[np.newaxis]
        return
    axis = len(shape) - 1
    while axis and out.shape[axis] == shape[axis] and out.strides[axis - 1] == out.strides[axis] * out.shape[axis]:
        axis -= 1
    merged = (*out.shape[:axis], math.prod(out.shape[axis : len(shape)]), *out.shape[len(shape) :])
    flat = out.reshape(merged) if axis < len(shape) - 1 else out
    strides = c_strides(shape)
    for index in np.ndindex(*out.shape[:axis]):
        first = sum((a + b) * s for a, b, s in zip(index, start, strides, strict=False))
        first += sum(b * s for b, s in zip(start[axis:], strides[axis:], strict=True))
        yield first, flat[index]


def c_strides(shape: Shape) -> Shape:
    strides, run = [], 1
    for n in reversed(shape):
        strides.append(run)
        run *= n
    return tuple(reversed(strides))


def reshaped_strides(shape: Shape, strides: Shape, wanted: Shape) -> Shape | None:
    """Strides that give ``wanted`` without moving elements, or None if there are none."""
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    new = [n for n in wanted if n != 1]
    found: list[int] = []
    while old or new:
        if not old or not new:
            return None
        old_group, new_group = [old.pop(0)], [new.pop(0)]
        old_size, new_size = old_group[0][0], new_group[0]
        while old_size != new_size:
            if old_size < new_size:
                if not old:
                    return None
                old_group.append(old.pop(0))
                old_size *= old_group[-1][0]
            else:
                if not new:
                    return None
                new_group.append(new.pop(0))
                new_size *= new_group[-1]
        for (_, outer), (length, inner) in pairwise(old_group):
            if outer != inner * length:
                return None
        step = old_group[-1][1] * new_size
        for n in new_group:
            step //= n
            found.append(step)
    return tuple(1 if n == 1 else found.pop(0) for n in wanted)


def moved_unit_axes(shape: Shape, wanted: Shape) -> list[int] | None:
    """For each wanted axis the old one, or -1 for a new axis of length one; None if more than these have moved."""
    if [n for n in shape if n != 1] != [n for n in wanted if n != 1]:
        return None
    old = [a for a, n in enumerate(shape) if n != 1]
    return [-1 if n == 1 else old.pop(0) for n in wanted]


def with_axes(corners: Array, axes: list[int], fill: int) -> Array:
    result = np.full((len(corners), len(axes)), fill, dtype=np.int64)
    for position, axis in enumerate(axes):
        if axis >= 0:
            result[:, position] = corners[:, axis]
    return result
