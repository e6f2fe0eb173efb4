"""Sources of bytes: anything with a size and ranged reads.

A tensor refers to a source and an offset, so a member of a plain tar inside a distributed checkpoint is
nothing special: it is a range of a local file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from anyckpt.errors import FormatError, reading_error
from anyckpt.identity import Identity
from anyckpt.storage import requests


def check_not_pointer(head: bytes, name: str) -> None:
    """Refuse the small text file that Git leaves where Git LFS has not fetched the real one.

    Args:
        head: how the file begins.
        name: what to call it.

    Raises:
        FormatError: it is such a pointer.
    """
    if head.startswith(b"version https://git-lfs"):
        raise FormatError("is a Git LFS pointer, not the file itself", path=name, remedy="fetch it with git lfs pull")


def check_filled(source: ByteSource, offset: int, wanted: int, got: int) -> None:
    """Raise FormatError if a read of ``wanted`` bytes at ``offset`` gave fewer."""
    if got < wanted:
        raise FormatError(
            "became shorter while it was being read",
            path=source.name,
            expected=f"{source.size} bytes",
            found=f"{offset + got} bytes",
        )


class ByteSource(ABC):
    """A run of bytes that can be read at any offset, from any thread.

    Attributes:
        name: what to call it in a message, such as ``/data/model.nemo » model_weights.ckpt``.
        path: the local file that holds it, or None.
        size: bytes.
    """

    __slots__ = ("name", "path", "size")
    name: str
    path: str | None
    size: int

    @abstractmethod
    def _read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; the range is known to be in bounds."""

    @property
    def at_once(self) -> int:
        """How many reads are worth making at once: 1 where none is waited for, as of local files and of memory."""
        return 1

    @property
    def is_live(self) -> bool:
        """Whether the bytes may be others a moment later: who writes them later has to copy them now."""
        return False

    def wanted(self, offset: int, length: int) -> Iterator[tuple[ByteSource, int, int]]:
        """Ranges of sources that, once they are held, answer a read of this one; reads nothing."""
        yield self, offset, length

    def read_through(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from what this thread holds (see ``storage.requests``), else by reading; checks no bounds.

        Raises:
            FormatError, UnreachableError: the bytes cannot be read.
        """
        if requests.answer(self, offset, buffer):
            return
        try:
            self._read_into(offset, buffer)
        except OSError as error:
            raise reading_error(f"be read at byte {offset}", self.name, error) from error

    def read_into(self, offset: int, buffer: Any) -> None:
        """Fill ``buffer`` (any writable contiguous buffer) with the bytes from ``offset`` on.

        Raises:
            FormatError: the range is not inside the source, or the file has become shorter.
            UnreachableError: it cannot be read at this moment.
        """
        view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
        self.check_range(offset, len(view))
        if len(view):
            self.read_through(offset, view)

    def read(self, offset: int, length: int) -> bytes:
        """The ``length`` bytes from ``offset`` on.

        Raises:
            FormatError: the range is not inside the source.
        """
        self.check_range(offset, length)
        buffer = bytearray(length)
        if length:
            self.read_through(offset, memoryview(buffer))
        return bytes(buffer)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of many ranges (first byte, length), in their order, asked for at once.

        Raises:
            FormatError: a range is not inside the source.
        """
        for offset, length in ranges:
            self.check_range(offset, length)
        with requests.holding((self, offset, length) for offset, length in ranges):
            return [self.read(offset, length) for offset, length in ranges]

    def read_all(self, limit: int = 1 << 30) -> bytes:
        """Everything, for small things such as configuration.

        Raises:
            FormatError: the source is larger than ``limit`` bytes.
        """
        if self.size > limit:
            raise FormatError(
                "too large to be read whole",
                path=self.name,
                expected=f"at most {limit} bytes",
                found=self.size,
            )
        return self.read(0, self.size)

    def check_range(self, offset: int, length: int) -> None:
        """Raise FormatError unless ``[offset, offset + length)`` lies inside the source."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                "a byte range lies outside the file; it is truncated or its index is damaged",
                path=self.name,
                expected=f"a range within {self.size} bytes",
                found=f"[{offset}, {offset + length})",
                remedy="copy the checkpoint again from its origin",
            )

    def slice(self, offset: int, length: int, name: str | None = None) -> ByteSource:
        """A part of this source as a source of its own.

        Raises:
            FormatError: the range is not inside the source.
        """
        self.check_range(offset, length)
        return SlicedSource(self, offset, length, name)

    def identity(self) -> Identity | None:
        """Values that tell these bytes from all others (see ``anyckpt.identity``); None if there are none.

        A source without an identity cannot be part of work that is continued after an interruption.
        """
        return None

    def check_unchanged(self) -> None:  # noqa: B027 (most hold bytes of another source, or their own)
        """Raise FormatError if what holds the bytes is known to be another than when the source was opened."""

    def locate(self) -> tuple[str | None, int]:
        """The local file that holds the bytes and the offset in it at which they start; (None, 0) if none does."""
        return self.path, 0

    def place(self) -> tuple[Hashable, int]:
        """What holds the bytes, and the offset in it at which they start; parts of one thing have the first in common.

        Unlike ``locate`` it reads nothing, whatever the source.
        """
        path, offset = self.locate()
        return (id(self), 0) if path is None else (path, offset)

    def owner(self) -> int | None:
        """The number of the share whose process alone has these bytes (see ``storage.owned``); None if any has them."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} ({self.size:,} bytes)>"


class SlicedSource(ByteSource):
    """A part of another source; a part of a part refers to the whole directly."""

    __slots__ = ("_base", "_offset")
    _base: ByteSource
    _offset: int

    def __init__(self, base: ByteSource, offset: int, length: int, name: str | None = None) -> None:
        self.name = base.name if name is None else name
        self.path = base.path
        self.size = length
        if isinstance(base, SlicedSource):
            offset += base._offset
            base = base._base
        self._base = base
        self._offset = offset

    def identity(self) -> Identity:
        return self._base, self._offset, self.size

    def place(self) -> tuple[Hashable, int]:
        where, start = self._base.place()
        return where, start + self._offset

    def owner(self) -> int | None:
        return self._base.owner()

    @property
    def at_once(self) -> int:
        return self._base.at_once

    def wanted(self, offset: int, length: int) -> Iterator[tuple[ByteSource, int, int]]:
        return self._base.wanted(self._offset + offset, length)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        self._base.read_through(self._offset + offset, buffer)

    def locate(self) -> tuple[str | None, int]:
        path, start = self._base.locate()
        return path, start + self._offset


class MemorySource(ByteSource):
    """Bytes in memory: ``bytes`` for small generated things, which never change; any other buffer is live state."""

    __slots__ = ("_data", "_fixed")

    def __init__(self, data: bytes | bytearray | memoryview | np.ndarray[Any, Any], name: str = "memory") -> None:
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        self._data = view.cast("B") if view.nbytes else memoryview(b"")
        self._fixed = isinstance(data, bytes) or not view.nbytes
        self.name = name
        self.path = None
        self.size = view.nbytes

    def identity(self) -> Identity | None:
        """The contents, if they cannot change."""
        return (self._data,) if self._fixed else None

    @property
    def is_live(self) -> bool:
        return not self._fixed

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets a copy of the bytes, of live state as it is at that moment."""
        return type(self), (bytes(self._data) if self._fixed else bytearray(self._data), self.name)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]
