"""Rounding float32 to narrow numbers, to nearest with ties to even; what lies beyond the largest becomes the largest.

An 8-bit or narrower float depends on the upper 16 bits of a float32 and on whether any of the lower ones is set.  So
the lower bits are folded into the lowest of the upper ones (rounding to odd), and the code is looked up in a table of
65,536 entries: the result is that of rounding once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.identity import Identity
from anyckpt.indexing import Array, look_up
from anyckpt.quantization.numbers import e2m1
from anyckpt.storage.gather import scratch

_PATTERNS = 1 << 16


@dataclass(frozen=True)
class Numbers(ABC):
    """Codes of numbers, one in a byte.

    Attributes:
        dtype: element type of the codes.
        largest: the largest of the numbers.
    """

    dtype: DType
    largest: float

    def identity(self) -> Identity:
        return type(self).__name__, self.dtype, self.largest

    @abstractmethod
    def encode(self, values: Array, out: Array) -> None:
        """Put the codes of ``values`` (float32, in C order, overwritten) into ``out``, raw bytes of the same shape."""


@dataclass(frozen=True)
class Floats(Numbers):
    """Narrow floats; not-a-number is the code of not-a-number, or of the largest number where there is none."""

    def encode(self, values: Array, out: Array) -> None:
        look_up(_table(self.dtype), patterns(values), out)


@dataclass(frozen=True)
class Integers(Numbers):
    """Whole numbers from ``least`` to ``largest`` in two's complement."""

    least: float

    def encode(self, values: Array, out: Array) -> None:
        np.rint(values, out=values)
        np.clip(values, self.least, self.largest, out=values)
        np.copyto(out.view(np.int8), values, casting="unsafe")


E4M3 = Floats(dtype("float8_e4m3fn"), 448.0)
FLOAT4 = Floats(dtype("uint8"), 6.0)
"""e2m1, in the lower half of a byte."""
INT8 = Integers(dtype("int8"), 127.0, -128.0)
INT4 = Integers(dtype("int8"), 7.0, -8.0)


def patterns(values: Array) -> Array:
    """The upper 16 bits of float32, with the lowest of them set if any of those below is; ``values`` is overwritten."""
    bits = values.view(np.uint32)
    with scratch(bits.nbytes) as buffer:
        lower = buffer.view(np.uint32).reshape(bits.shape)
        np.bitwise_and(bits, 0xFFFF, out=lower)
        np.add(lower, 0xFFFF, out=lower)
        np.bitwise_or(bits, lower, out=bits)
    halves: Array = bits.view(np.uint16).reshape((*bits.shape, 2))[..., 1]
    return halves


@lru_cache(maxsize=8)
def _table(kind: DType) -> Array:
    """The code of every pattern, ``[65536]`` uint8."""
    numbers = (np.arange(_PATTERNS, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        if kind == "float8_e4m3fn":
            return np.clip(numbers, -448, 448).astype(kind.numpy).view(np.uint8)
        halfway = (e2m1()[:7] + e2m1()[1:8]) / 2
        size = np.abs(numbers)
        codes = np.searchsorted(halfway, size, side="left").astype(np.uint8)
        codes += np.isin(size, halfway[1::2])  # a tie goes to the even code
        return codes | ((numbers < 0).astype(np.uint8) << 3)
