"""Lazy tensors from arrays and from one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from anyckpt.dtypes import DType, from_numpy
from anyckpt.errors import LastingError, UsageError
from anyckpt.indexing import (
    Array,
    Shape,
    check_cover,
)
from anyckpt.storage.requests import holding
from anyckpt.storage.source import MemorySource
from anyckpt.tensor.lazy import LazyTensor
from anyckpt.tensor.nodes import Constant, Stored, corners, tiled

_COPIED_BYTES = 4096


def from_array(array: Array) -> Stored:
    """A tensor of the elements of an array, which must not change afterwards.

    Up to 4 KiB are copied; a larger array is referred to and is live state, which has no identity.
    """
    kind = from_numpy(array.dtype)
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    data = contiguous.tobytes() if array.nbytes <= _COPIED_BYTES else contiguous.view(kind.raw)
    return Stored(MemorySource(data), 0, kind, tuple(array.shape))


def concatenate(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Tensors one after another along ``axis``.

    Raises:
        UsageError: dtypes differ, shapes differ off the axis, or there is no such axis.
    """
    first = tensors[0]
    others = first.shape[:axis] + first.shape[axis + 1 :]
    starts, stops, at = [], [], 0
    for tensor in tensors:
        same = tensor.shape == first.shape or tensor.shape[:axis] + tensor.shape[axis + 1 :] == others
        if tensor.dtype != first.dtype or not same or axis >= tensor.ndim:
            raise UsageError(
                f"cannot be joined along axis {axis}",
                expected=f"{first.dtype.name} {first.shape}",
                found=f"{tensor.dtype.name} {tensor.shape}",
            )
        begin, end = [0] * first.ndim, [*tensor.shape]
        begin[axis], end[axis] = at, at + tensor.shape[axis]
        at = end[axis]
        starts.append(begin)
        stops.append(end)
    shape = (*first.shape[:axis], at, *first.shape[axis + 1 :])
    return tiled(first.dtype, shape, starts, stops, list(tensors))


def stack(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Tensors of one shape along a new axis."""
    return concatenate([t.reshape((*t.shape[:axis], 1, *t.shape[axis:])) for t in tensors], axis)


def mosaic(dtype: DType, shape: Shape, starts: Sequence[Sequence[int]], tiles: Sequence[LazyTensor]) -> LazyTensor:
    """Boxes laid side by side at ``starts``, which must cover ``shape`` exactly once.

    Raises:
        LastingError: a piece of another dtype, a piece outside, an overlap or a gap.
    """
    stops = [[b + n for b, n in zip(start, tile.shape, strict=True)] for start, tile in zip(starts, tiles, strict=True)]
    check_cover(shape, corners(starts, len(shape)), corners(stops, len(shape)))
    for tile in tiles:
        if tile.dtype != dtype:
            raise LastingError("a piece has another element type", expected=dtype.name, found=tile.dtype.name)
    return tiled(dtype, shape, starts, stops, tiles)


def held(tensors: Iterable[LazyTensor]) -> AbstractContextManager[None]:
    """Within, the elements of far tensors are held, asked for at once; they must be few."""
    return holding(span for tensor in tensors if tensor.is_far for span in tensor.needed(0, tensor.size))


def zeros_after(tensor: LazyTensor, axis: int, count: int) -> LazyTensor:
    """A tensor with so many zeros after it along ``axis``."""
    shape = [*tensor.shape]
    shape[axis] = count
    return concatenate([tensor, Constant(tensor.dtype, tuple(shape))], axis)
