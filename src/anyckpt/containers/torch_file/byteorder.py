"""Big-endian files (written on s390x and the like) seen as little-endian ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anyckpt.identity import Identity
from anyckpt.storage.source import ByteSource


class SwappedSource(ByteSource):
    """A source with the bytes of each number in reverse order.

    Args:
        base: the numbers, of which the first begins at offset 0.
        width: bytes of one number: 2, 4 or 8 (a complex element is two numbers).
    """

    __slots__ = ("_base", "_width")

    def __init__(self, base: ByteSource, width: int) -> None:
        self._base = base
        self._width = width
        self.name = base.name
        self.path = None
        self.size = base.size - base.size % width

    def identity(self) -> Identity:
        return self._base, self._width

    @property
    def at_once(self) -> int:
        return self._base.at_once

    def wanted(self, offset: int, length: int) -> Iterator[tuple[ByteSource, int, int]]:
        first = offset - offset % self._width
        return self._base.wanted(first, -(-(offset + length) // self._width) * self._width - first)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        first = offset - offset % self._width
        last = -(-(offset + len(buffer)) // self._width) * self._width
        words = np.empty((last - first) // self._width, dtype=f"u{self._width}")
        self._base.read_into(first, words)
        swapped = words.byteswap(inplace=True).view(np.uint8)
        buffer[:] = swapped[offset - first : offset - first + len(buffer)].data
