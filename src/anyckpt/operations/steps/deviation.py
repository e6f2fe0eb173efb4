"""How many elements of two tensors differ and how far they are apart at most, found chunk by chunk."""

from __future__ import annotations

import math

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.indexing import CACHED_ELEMENTS, Array
from anyckpt.operations.steps.tolerances import Tolerance
from anyckpt.storage.gather import scratch
from anyckpt.tensor.halves import widen

_FAR_ABOVE_DENORMAL = 1e-30
_ROUNDED = 1e-6  # more than what rounding a difference and a ratio to float32 takes or adds, of either


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


class Worst:
    """What a deviation is made of, in float64."""

    def __init__(self) -> None:
        self.max_abs: float | None = None
        self.max_rel: float | None = None
        self.elements = 0
        self.nonfinite = 0
        self.nan = 0

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
        bits_decide = tolerance.exact and same_bits is not None
        in_float32 = bits_decide and np.can_cast(a.dtype, np.float32)
        most = min(len(a), CACHED_ELEMENTS)
        with scratch(2 * 8 * most) as room:
            narrow, wide = room[: 2 * 4 * most].view(np.float32).reshape(2, -1), room.view(np.float64).reshape(2, -1)
            for start in range(0, len(a), CACHED_ELEMENTS):
                some = slice(start, start + CACHED_ELEMENTS)
                same = None if same_bits is None else same_bits[some]
                if in_float32 and self._add_in_float32(a[some], b[some], narrow):
                    assert same is not None
                    self.elements += len(same) - int(np.count_nonzero(same))
                else:
                    self._add_finite(a[some], b[some], tolerance, same, wide)

    def _add_in_float32(self, a: Array, b: Array, room: Array) -> bool:
        """Account for the largest differences of numbers that float32 holds; False if that is not for it to tell.

        Rounding keeps order, so that the largest difference is among those that are the largest in float32, and the
        largest ratio among those that are so but for rounding: float64 is asked of these alone, and only if they may
        be larger than what is known.
        """
        gap, size = room[:, : len(a)]
        widen(gap, a)
        widen(size, b)
        np.subtract(gap, size, out=gap)
        np.abs(gap, out=gap)
        largest = gap.max()
        if not math.isfinite(largest):
            return False
        self.max_abs = self.max_abs or 0.0
        farthest = np.flatnonzero(gap == largest) if 0 < largest >= np.float32(self.max_abs) else ()
        np.abs(size, out=size)
        smallest = size.min()
        if not smallest:
            np.copyto(size, np.inf, where=size == 0)
            smallest = size.min()
        some_nonzero = smallest < np.inf
        np.divide(gap, size, out=gap)
        ratio = float(gap.max())
        if not math.isfinite(ratio) or (some_nonzero and largest and ratio < _FAR_ABOVE_DENORMAL):
            return False
        if len(farthest):
            self.max_abs = max(self.max_abs, float(_wide_gap(a[farthest], b[farthest]).max()))
        if some_nonzero:
            self.max_rel = self.max_rel or 0.0
            if ratio * (1 + _ROUNDED) > self.max_rel:
                steepest = np.flatnonzero(gap >= np.float32(ratio * (1 - _ROUNDED)))
                ratios = _wide_gap(a[steepest], b[steepest]) / np.abs(b[steepest].astype(np.float64))
                self.max_rel = max(self.max_rel, float(ratios.max()))
        return True

    def _add_finite(self, a: Array, b: Array, tolerance: Tolerance, same_bits: Array | None, room: Array) -> None:
        """Account for real numbers without taking memory, if they are finite; in the general way, if not."""
        gap, size = room[:, : len(a)]
        widen(gap, a)
        widen(size, b)
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

    def add_equal(self, values: Array) -> None:
        """Account for elements that have the same bits in both: they differ by nothing, if they are numbers."""
        wide = values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)
        wide = wide[np.isfinite(wide)]
        if len(wide):
            self.max_abs = self.max_abs or 0.0
        if wide.any():
            self.max_rel = self.max_rel or 0.0

    def deviation(self, reason: str) -> Deviation:
        """What they come to; a difference too large for float64 is not told."""
        max_abs, max_rel = _finite(self.max_abs), _finite(self.max_rel)
        return Deviation(reason, max_abs, max_rel, self.elements, self.nonfinite, self.nan)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _wide_gap(a: Array, b: Array) -> Array:
    gap: Array = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return gap


def _copy_gap(a: Array, b: Array, into: Array) -> None:
    """Distances of integers that float64 may not hold: it would take neighbours beyond 2**53 for the same."""
    np.copyto(into, np.subtract(np.maximum(a, b).view(np.uint64), np.minimum(a, b).view(np.uint64)))
