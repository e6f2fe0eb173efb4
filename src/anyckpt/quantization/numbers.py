"""Narrow number formats as tables: the value of every code, in float32.

e4m3 is OCP's 8-bit float (largest 448, no infinities), e5m2 the wider one; e2m1 is OCP's 4-bit float, two of which
share a byte with the first in the low half; e8m0 is a power of two, with code 255 for not-a-number (OCP Microscaling
Formats 1.0).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from anyckpt.dtypes import DType, dtype
from anyckpt.indexing import Array

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def e2m1() -> Array:
    """By code, ``[16]`` float32: the sign is the highest of four bits, and minus zero is a code of its own."""
    return np.array([sign * value for sign in (1.0, -1.0) for value in _MAGNITUDES], dtype=np.float32)


@cache
def values_of(kind: DType) -> Array:
    """The value of each code of an 8-bit type, ``[256]`` float32; raw bytes (``uint8``) are e8m0 exponents.

    Raises:
        FormatError: the type is unknown.
    """
    codes = np.arange(256, dtype=np.uint8)
    stored = dtype("float8_e8m0fnu") if kind.name == "uint8" else kind
    table: Array = codes.view(stored.numpy or stored.raw).astype(np.float32)
    return table


def table_of(numbers: str, kind: DType) -> Array:
    """The number of each code, float32: ``[16]`` of 4-bit codes, else ``[256]``.

    Args:
        numbers: one of ``methods.Numbers``.
        kind: the element type of the codes, where that tells.
    """
    if numbers == "float4_e2m1":
        return e2m1()
    if numbers.startswith("packed"):
        bits = 4 if numbers.endswith("4") else 8
        return np.arange(1 << bits, dtype=np.float32) - (1 << bits - 1)
    return values_of(kind)
