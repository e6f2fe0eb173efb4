"""The bytes that a pickle is read from: all of them in memory, or a buffer that moves over a big file."""

from __future__ import annotations

from typing import Protocol

from anyckpt.errors import FormatError

_STEP = 256 << 10
_LARGEST_OPERAND = 256 << 20
_FIXED = 9  # an opcode and the longest operand of fixed size


class ByteReader(Protocol):
    """What the reader needs of a file: its size, and ranged reads that return exactly what was asked for."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class ShortDataError(Exception):
    """An operand needs ``needed`` bytes after its opcode, more than the buffer holds."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        super().__init__(needed)


class BufferedPickle:
    """A pickle, of which a part is held in memory.

    Attributes:
        data: the bytes held.
        base: offset of ``data[0]`` in the source.
        size: bytes in the source.
        opcode: index into ``data`` of the opcode being executed.
        whole: whether ``data`` is the entire source.
        name: the file's name, for messages.
    """

    __slots__ = ("_source", "base", "data", "name", "opcode", "size", "whole")

    data: bytes

    def __init__(self, source: bytes | memoryview | ByteReader, start: int, name: str) -> None:
        self.name = name
        self._source: ByteReader | None = None
        self.base = 0
        self.opcode = start
        if isinstance(source, (bytes, memoryview)):
            self.data = bytes(source)
            self.size = len(self.data)
        else:
            self._source = source
            self.size = source.size
            self.base, self.opcode = start, 0
            self.data = source.read(start, max(0, min(_STEP, self.size - start)))
        self.whole = self._source is None

    def advance(self, needed: int | None) -> bool:
        """Move to the current opcode if that brings bytes that were missing; False when it cannot.

        Args:
            needed: bytes that the operand takes, or None for an operand of fixed size (at most 8).

        Raises:
            FormatError: a single operand of more than 256 MiB in a file that is not held in memory.
        """
        if self._source is None:
            return False
        offset = self.base + self.opcode
        left = self.size - offset
        held = len(self.data) - self.opcode
        length = min(_FIXED, left) if needed is None else 1 + needed
        if length <= held or length > left:
            return False
        if length > _LARGEST_OPERAND:
            raise FormatError("an operand is too long", expected=f"at most {_LARGEST_OPERAND} bytes", found=needed)
        self.data = self._source.read(offset, min(max(_STEP, length), left))
        self.base, self.opcode = offset, 0
        return True
