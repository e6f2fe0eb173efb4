"""Comparing two tensors element by element, chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anyckpt.indexing import CACHED_ELEMENTS, Array
from anyckpt.operations.steps.movement import Sums
from anyckpt.operations.steps.threads import Advance
from anyckpt.operations.steps.tolerances import Tolerance
from anyckpt.tensor import LazyTensor, as_numbers

_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Deviation:
    """How two tensors of one shape differ.

    Attributes:
        reason: ``dtype`` or ``values``.
        max_abs: largest absolute difference, over elements that are finite in both; None if there are none, or if
            numpy cannot compute with the type.
        max_rel: largest ``|a - b| / |b|`` over elements that are finite in both and where b is not zero; None if
            there are none.
        elements: how many elements differ beyond the tolerance.
        nonfinite: how many of these are NaN or infinite on one side at least.
        nan: how many of these are NaN on one side at least.
    """

    reason: str
    max_abs: float | None
    max_rel: float | None
    elements: int
    nonfinite: int
    nan: int = 0


class _Worst:
    def __init__(self, most: int) -> None:
        self.max_abs: float | None = None
        self.max_rel: float | None = None
        self.elements = 0
        self.nonfinite = 0
        self.nan = 0
        self._gap, self._size = (np.empty(min(most, CACHED_ELEMENTS), np.float64) for _ in range(2))

    def add(self, a: Array, b: Array, tolerance: Tolerance, same_bits: Array | None) -> None:
        """Account for a chunk whose bits are not all the same.

        Args:
            a: numbers.
            b: numbers to compare with.
            tolerance: what counts as equal.
            same_bits: where the bits are equal, or None if the types differ.
        """
        if "c" in (a.dtype.kind, b.dtype.kind):
            self._add(a.astype(np.complex128), b.astype(np.complex128), tolerance, same_bits)
            return
        for start in range(0, len(a), CACHED_ELEMENTS):
            some = slice(start, start + CACHED_ELEMENTS)
            self._add_finite(a[some], b[some], tolerance, None if same_bits is None else same_bits[some])

    def _add_finite(self, a: Array, b: Array, tolerance: Tolerance, same_bits: Array | None) -> None:
        """Account for real numbers without taking memory, if they are finite; in the general way, if not."""
        gap, size = self._gap[: len(a)], self._size[: len(a)]
        np.copyto(gap, a)
        np.copyto(size, b)
        np.subtract(gap, size, out=gap)
        np.abs(gap, out=gap)
        if a.dtype == b.dtype and a.dtype.kind in "iu" and a.dtype.itemsize == 8:
            _copy_gap(a, b, gap)
        largest = float(gap.max())
        if not math.isfinite(largest):
            self._add(a.astype(np.float64), b.astype(np.float64), tolerance, same_bits)
            return
        np.abs(size, out=size)
        if tolerance.exact and same_bits is not None:
            equal = same_bits
        else:
            equal = (gap == 0) | (gap <= tolerance.absolute + tolerance.relative * size)
        self.elements += len(a) - int(np.count_nonzero(equal))
        self.max_abs = max(self.max_abs or 0.0, largest)
        nonzero = size > 0
        if nonzero.any():
            np.divide(gap, size, out=gap, where=nonzero)
            gap[~nonzero] = 0
            self.max_rel = max(self.max_rel or 0.0, float(gap.max()))

    def _add(self, a: Array, b: Array, tolerance: Tolerance, same_bits: Array | None) -> None:
        finite = np.isfinite(a) & np.isfinite(b)
        gap = np.abs(a - b)
        if tolerance.exact and same_bits is not None:
            equal = same_bits
        else:
            equal = (a == b) | (np.isnan(a) & np.isnan(b))
            equal |= finite & (gap <= tolerance.absolute + tolerance.relative * np.abs(b))
        self.elements += len(a) - int(np.count_nonzero(equal))
        self.nonfinite += int(np.count_nonzero(~equal & ~finite))
        self.nan += int(np.count_nonzero(~equal & (np.isnan(a) | np.isnan(b))))
        if finite.any():
            self.max_abs = max(self.max_abs or 0.0, float(gap[finite].max()))
        nonzero = finite & (b != 0)
        if nonzero.any():
            self.max_rel = max(self.max_rel or 0.0, float((gap[nonzero] / np.abs(b[nonzero])).max()))


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
    step = min(_CHUNK_ELEMENTS, max(1, a.size))
    worst = _Worst(step)
    window = min(max(a.window(step), b.window(step)), max(1, a.size))
    left, right = np.empty(window, dtype=a.dtype.raw), np.empty(window, dtype=b.dtype.raw)
    with np.errstate(all="ignore"):
        for start in range(0, a.size, step):
            count = min(step, a.size - start)
            at = start % window
            if not at:
                there = min(window, a.size - start)
                a.fill(start, left[:there])
                b.fill(start, right[:there])
            x, y = left[at : at + count], right[at : at + count]
            if advance is not None:
                advance(y.nbytes)
            same_bits = _same_bits(x, y) if same_type else None
            same = same_bits is not None and bool(same_bits.all())
            if sums is not None and numbers:
                sums.add(as_numbers(x, a.dtype), as_numbers(y, b.dtype), same=same)
            if same:
                continue
            if numbers:
                worst.add(as_numbers(x, a.dtype), as_numbers(y, b.dtype), tolerance, same_bits)
            elif same_bits is not None:
                worst.elements += count - int(np.count_nonzero(same_bits))
    if sums is not None:
        sums.differing += worst.elements
    if tolerance.exact and not same_type:
        return _deviation("dtype", worst)
    if worst.elements or not (same_type or numbers):
        return _deviation("values" if same_type or numbers else "dtype", worst)
    return None


def _copy_gap(a: Array, b: Array, into: Array) -> None:
    """Distances of integers that float64 may not hold: it would take neighbours beyond 2**53 for the same."""
    np.copyto(into, np.subtract(np.maximum(a, b).view(np.uint64), np.minimum(a, b).view(np.uint64)))


def _same_bits(x: Array, y: Array) -> Array:
    if x.dtype.kind == "c":  # 16-byte elements, moved as two numbers
        x, y = x.view("<u8").reshape(-1, 2), y.view("<u8").reshape(-1, 2)
    return np.asarray(np.equal(x, y).reshape(len(x), -1).all(axis=1))


def _deviation(reason: str, worst: _Worst) -> Deviation:
    return Deviation(reason, _finite(worst.max_abs), _finite(worst.max_rel), worst.elements, worst.nonfinite, worst.nan)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
