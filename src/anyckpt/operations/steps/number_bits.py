"""What shows in the bits of floating-point numbers: how many are zero, infinite or none, and the extremes."""

from __future__ import annotations

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.indexing import Array
from anyckpt.tensor import as_numbers


class Pattern:
    """Numbers as integers without their sign.

    Attributes:
        kind: the integers, of as many bytes.
        signed: the same with a sign.
        infinity: above which is what is no number.
        normal: the smallest normal number.
        sign: the highest bit.
        magnitude: all others.
    """

    def __init__(self, itemsize: int, infinity: int, normal: int) -> None:
        self.kind, self.signed = np.dtype(f"<u{itemsize}"), np.dtype(f"<i{itemsize}")
        self.infinity, self.normal = infinity, normal
        self.sign = 1 << 8 * itemsize - 1
        self.magnitude = self.kind.type(self.sign - 1)


PATTERNS = {
    "bfloat16": Pattern(2, 0x7F80, 0x0080),
    "float16": Pattern(2, 0x7C00, 0x0400),
    "float32": Pattern(4, 0x7F80_0000, 0x0080_0000),
    "float64": Pattern(8, 0x7FF0_0000_0000_0000, 0x0010_0000_0000_0000),
}


class NumberBits:
    """Counted a chunk at a time.  That of most chunks is neither 0 nor special.

    Args:
        kind: of the numbers, one of ``PATTERNS``.
        most: numbers in a chunk.
        memory: to compute in, of one byte more than a number for each of these.
    """

    def __init__(self, kind: DType, most: int, memory: Array) -> None:
        self._kind, self._pattern = kind, PATTERNS[kind.name]
        edge = most * kind.itemsize
        self._sizes, self._some = memory[:edge].view(self._pattern.kind), memory[edge:].view(np.bool_)
        self._lowest: int | None = None
        self._highest: int | None = None
        self.zeros = self.nan = self.inf = self.negative_inf = self.denormals = 0

    def add(self, chunk: Array) -> None:
        """Count numbers."""
        pattern = self._pattern
        bits = chunk.view(pattern.kind)
        size, where = self._sizes[: len(bits)], self._some[: len(bits)]
        np.bitwise_and(bits, pattern.magnitude, out=size)
        least, most = size.min(), size.max()
        if least < pattern.normal:
            nothing = int(np.count_nonzero(np.equal(size, 0, out=where)))
            self.zeros += nothing
            self.denormals += int(np.count_nonzero(np.less(size, pattern.normal, out=where))) - nothing
        if most >= pattern.infinity:
            self.nan += int(np.count_nonzero(np.greater(size, pattern.infinity, out=where)))
            infinite = np.equal(size, pattern.infinity, out=where)
            self.inf += int(np.count_nonzero(infinite))
            self.negative_inf += int(np.count_nonzero(bits[infinite] != pattern.infinity))

    def add_extremes(self, finite: Array) -> None:
        """Look for the smallest and the largest among numbers of which all are finite.

        Of numbers of one sign the bits grow with the magnitude, and the sign is the highest of them.
        """
        sign = self._pattern.sign
        bits, signed = finite.view(self._pattern.kind), finite.view(self._pattern.signed)
        lowest, highest = int(bits.max()), int(signed.max())
        if lowest < sign:
            lowest = int(bits.min())
        if highest < 0:
            highest = int(signed.min()) + 2 * sign
        low, high = (at if at < sign else sign - 1 - at for at in (lowest, highest))  # which grow with the number
        self._lowest = low if self._lowest is None else min(self._lowest, low)
        self._highest = high if self._highest is None else max(self._highest, high)

    def extremes(self) -> tuple[float | None, float | None]:
        """The smallest and the largest of those that were looked at."""
        if self._lowest is None or self._highest is None:
            return None, None
        bits = [at if at >= 0 else self._pattern.sign - 1 - at for at in (self._lowest, self._highest)]
        low, high = as_numbers(np.array(bits, self._pattern.kind), self._kind).astype(np.float64).tolist()
        return low, high
