"""Comparing two tensors element by element, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anyckpt.indexing import Array
from anyckpt.operations.steps.deviation import Deviation, Worst
from anyckpt.operations.steps.movement import Sums
from anyckpt.operations.steps.threads import Advance
from anyckpt.operations.steps.tolerances import Tolerance
from anyckpt.storage.gather import scratch
from anyckpt.tensor import LazyTensor, as_numbers

_CHUNK_BYTES = 256 << 10  # both sides and where they differ stay in the processor's cache
_ALIGNED = 64
_FEW = 8  # where at most one element in so many differs, it alone is looked at


def compare(
    a: LazyTensor,
    b: LazyTensor,
    tolerance: Tolerance,
    advance: Advance | None = None,
    *,
    sums: Sums | None = None,
) -> Deviation | None:
    """How ``a`` differs from ``b``, or None if it does not.

    Without a tolerance two tensors are equal if their types and all their bits are, so NaN equals the same NaN and
    0 differs from -0.  With one, types may differ, NaN equals NaN, and infinities of one sign are equal.

    Args:
        a: a tensor.
        b: one of the same shape.
        tolerance: what counts as equal.
        advance: called with the bytes of ``b`` in each chunk.
        sums: takes what a movement is computed of, if numpy can compute with both types.

    Raises:
        FormatError: bytes are missing from a file.
    """
    same_type = a.dtype == b.dtype
    numbers = a.dtype.numpy is not None and b.dtype.numpy is not None
    some_equal = False
    worst = Worst()
    step = max(1, _CHUNK_BYTES // max(a.dtype.itemsize, b.dtype.itemsize))
    window = min(max(a.window(step), b.window(step)), max(1, a.size))
    first, second = (-(-window * tensor.dtype.itemsize // _ALIGNED) * _ALIGNED for tensor in (a, b))
    with scratch(first + second + 2 * min(step, window)) as memory, np.errstate(all="ignore"):
        left = memory[:first].view(a.dtype.raw)[:window]
        right = memory[first : first + second].view(b.dtype.raw)[:window]
        flags = memory[first + second :].view(np.bool_)
        for x, y in _chunks(a, b, left, right, step):
            if advance is not None:
                advance(y.nbytes)
            same = same_type and _are_same(x, y, flags)
            if sums is not None and numbers:
                sums.add(as_numbers(x, a.dtype), as_numbers(y, b.dtype), same=same)
            if same:
                some_equal = True
                continue
            same_bits = None
            if same_type:
                unlike = _unlike(x, y, flags)
                count = int(np.count_nonzero(unlike))
                if not numbers:
                    worst.elements += count
                elif tolerance.exact and count * _FEW <= len(x):
                    some_equal = True
                    at = np.flatnonzero(unlike)
                    x, y, same_bits = x[at], y[at], np.zeros(count, np.bool_)
                else:
                    same_bits = np.logical_not(unlike, out=unlike)
            if numbers:
                worst.add(as_numbers(x, a.dtype), as_numbers(y, b.dtype), tolerance, same_bits)
        if some_equal and numbers and worst.elements and (worst.max_abs is None or worst.max_rel is None):
            _add_equal(a, b, worst, left, right, step)
    if sums is not None:
        sums.differing += worst.elements
    if tolerance.exact and not same_type:
        return worst.deviation("dtype")
    if worst.elements or not (same_type or numbers):
        return worst.deviation("values" if same_type or numbers else "dtype")
    return None


def _chunks(a: LazyTensor, b: LazyTensor, left: Array, right: Array, step: int) -> Iterator[tuple[Array, Array]]:
    """The raw elements of both, ``step`` at a time, which are valid until the next ones are asked for."""
    window = len(left)
    for start in range(0, a.size, window):
        there = min(window, a.size - start)
        a.fill(start, left[:there])
        b.fill(start, right[:there])
        for at in range(0, there, step):
            end = min(at + step, there)
            yield left[at:end], right[at:end]


def _are_same(x: Array, y: Array, flags: Array) -> bool:
    """Whether all bits are, told by words of eight bytes where they can be."""
    if x.nbytes % 8:
        return bool((x == y).all())
    words = flags[: x.nbytes // 8]
    return not np.not_equal(x.view(np.uint64), y.view(np.uint64), out=words).any()


def _unlike(x: Array, y: Array, flags: Array) -> Array:
    """Where bits differ."""
    if x.itemsize <= 8:
        return np.not_equal(x, y, out=flags[: len(x)])
    x, y = x.view(np.uint64), y.view(np.uint64)  # 16-byte elements, moved as two numbers
    return np.asarray(np.not_equal(x, y, out=flags[: len(x)]).reshape(-1, 2).any(axis=1))


def _add_equal(a: LazyTensor, b: LazyTensor, worst: Worst, left: Array, right: Array, step: int) -> None:
    """Look at what both have alike until numbers are among it: where none differ by one, they differ by nothing."""
    for x, y in _chunks(a, b, left, right, step):
        worst.add_equal(as_numbers(x[x == y], a.dtype))
        if worst.max_abs is not None and worst.max_rel is not None:
            return
