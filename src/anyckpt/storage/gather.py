"""Reading a strided region of a source into an array, in as few reads as its shape allows.

The one place that decides between reading straight into the caller's memory, reading a covering span into a
scratch buffer and copying from there, and reading run by run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from anyckpt.storage.requests import GAP, is_far
from anyckpt.storage.source import ByteSource

if TYPE_CHECKING:
    from anyckpt.storage.requests import Wanted

SCRATCH_BYTES = 4 << 20
"""Size of one scratch buffer; a thread holds about as many as an expression has computing nodes on one path."""

LONG_RUN = 64 << 10  # runs of this length are read one by one: asking costs less than the bytes between them
_SPARSE = 8  # shorter runs are read in a covering span while at least one byte in eight of it is wanted
_SHORT_RUN = 4 << 10  # a run shorter than this costs more to ask for than any span

_local = threading.local()


@contextmanager
def scratch(nbytes: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """A buffer of ``nbytes`` for this thread, reused: fresh pages are slower to get than bytes are to copy."""
    free: list[np.ndarray[Any, np.dtype[np.uint8]]] = getattr(_local, "free", None) or []
    _local.free = free
    buffer = free.pop() if free else None
    if buffer is None or buffer.nbytes < nbytes:
        buffer = np.empty(max(nbytes, SCRATCH_BYTES), dtype=np.uint8)
    try:
        yield buffer[:nbytes]
    finally:
        if buffer.nbytes <= 2 * SCRATCH_BYTES:
            free.append(buffer)


@contextmanager
def read_ahead(source: ByteSource, start: int, stop: int) -> Iterator[None]:
    """Bytes ``[start, stop)`` are read once; within, this thread's ``gather`` of any of them reads nothing.

    Raises:
        FormatError: the source does not have these bytes.
    """
    with scratch(stop - start) as buffer:
        source.read_into(start, buffer)
        _local.ahead = (source, start, buffer)
        try:
            yield
        finally:
            _local.ahead = None


@cache
def _hole_type() -> type[np.ndarray[Any, Any]]:
    class Hole(np.ndarray[Any, Any]):
        """One element of memory, which stands for all."""

    return Hole


def hole(shape: tuple[int, ...], raw: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """What has the shape of an array and no place for elements: given to a read, it tells what the read needs.

    A node that only moves elements passes it on; one that computes passes on one of its operands' shape, and need not
    compute.  A node that knows nothing of holes reads and computes in vain, and is right all the same.
    """
    one = np.zeros(1, raw)
    return np.lib.stride_tricks.as_strided(one, shape, (0,) * len(shape), writeable=True).view(_hole_type())


def is_hole(array: object) -> bool:
    """Whether it is one, or a part of one."""
    return type(array) is not np.ndarray and isinstance(array, _hole_type())


def needed(read: Callable[[], None]) -> list[Wanted]:
    """The ranges of far sources that ``read``, which fills holes, would read."""
    found: list[Wanted] = []
    before, _local.needed = getattr(_local, "needed", None), found
    try:
        read()
    finally:
        _local.needed = before
    return found


def gather(source: ByteSource, offset: int, strides: tuple[int, ...], out: np.ndarray[Any, Any]) -> None:
    """Fill ``out`` with the elements of ``source`` at ``offset + sum(index * stride)``.

    Args:
        source: where the bytes are.
        offset: byte offset of the element with index zero.
        strides: bytes between neighbours along each axis, none negative; zero repeats.
        out: any strides, of a raw dtype (its item size is the element's).

    Raises:
        FormatError: an element lies outside the source.
    """
    if out.size == 0:
        return
    if is_hole(out):
        if is_far(source):
            _local.needed.extend((source, *span) for span in _spans(offset, strides, out.shape, out.itemsize))
        return
    if out.ndim == 1 and out.size > 1:
        _gather(source, offset, strides, out)
        return
    kept = sorted((a for a in range(out.ndim) if out.shape[a] > 1), key=lambda axis: -strides[axis])
    dropped: tuple[Any, ...] = tuple(slice(None) if n > 1 else 0 for n in out.shape)
    position = {axis: rank for rank, axis in enumerate(sorted(kept))}
    whole = out[dropped + (Ellipsis,)]  # noqa: RUF005 (mypy knows no unpacking here before Python 3.11)
    view = whole.transpose([position[axis] for axis in kept])
    _gather(source, offset, tuple(strides[axis] for axis in kept), view)


def _gather(source: ByteSource, offset: int, strides: tuple[int, ...], out: np.ndarray[Any, Any]) -> None:
    """As ``gather``, with axes ordered by falling stride and none of length one."""
    itemsize = out.itemsize
    span = itemsize + sum((n - 1) * stride for n, stride in zip(out.shape, strides, strict=True))
    ahead = getattr(_local, "ahead", None)
    if ahead is not None and ahead[0] is source and ahead[1] <= offset and offset + span <= ahead[1] + len(ahead[2]):
        _copy_from(ahead[2][offset - ahead[1] :], strides, out)
        return
    if span == out.nbytes and out.flags.c_contiguous and (not strides or strides[-1] == itemsize):
        source.read_into(offset, out.reshape(-1).view(np.uint8))
        return
    run = _contiguous_run(out.shape, strides, itemsize)
    together = span <= out.nbytes + out.nbytes // 4
    dense = together or (run < LONG_RUN and (run < _SHORT_RUN or span <= _SPARSE * out.nbytes))
    if dense and span <= SCRATCH_BYTES:
        with scratch(span) as buffer:
            source.read_into(offset, buffer)
            _copy_from(buffer, strides, out)
        return
    rows = 1
    if dense and strides[0]:
        inner_span = span - (out.shape[0] - 1) * strides[0]
        rows = max(1, (SCRATCH_BYTES - inner_span) // strides[0] + 1)
    if len(strides) == 1 and not strides[0]:
        _gather(source, offset, (), out[:1].reshape(()))
        out[1:] = out[0]
        return
    for start in range(0, out.shape[0], rows):
        part = out[start : start + rows]
        if part.shape[0] == 1:
            _gather(source, offset + start * strides[0], strides[1:], part[0, ...])
        else:
            _gather(source, offset + start * strides[0], strides, part)


def _spans(offset: int, strides: tuple[int, ...], shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges that hold the elements, with no more between them than between neighbours that are read together."""
    axes = sorted((axis for axis in range(len(shape)) if shape[axis] > 1), key=lambda axis: -strides[axis])
    inner = [itemsize]  # bytes from the first element to the last of the axes behind
    for axis in reversed(axes):
        inner.append(inner[-1] + (shape[axis] - 1) * strides[axis])
    outer = 0
    while outer < len(axes) and strides[axes[outer]] - inner[-2 - outer] > GAP:
        outer += 1
    counts = [shape[axis] for axis in axes[:outer]]
    for index in np.ndindex(*counts):
        yield offset + sum(i * strides[axis] for i, axis in zip(index, axes, strict=False)), inner[-1 - outer]


def _copy_from(buffer: np.ndarray[Any, Any], strides: tuple[int, ...], out: np.ndarray[Any, Any]) -> None:
    """Fill ``out`` with the elements that begin at these bytes and lie ``strides`` apart, which are all there."""
    first = buffer[: out.itemsize].view(out.dtype)
    np.copyto(out, np.lib.stride_tricks.as_strided(first, out.shape, strides, writeable=False))


def _contiguous_run(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Bytes that lie together in the source before the first jump."""
    run = itemsize
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if stride != run:
            break
        run *= count
    return run
