"""Memory that two processes share by a descriptor, so that what one put there the other can write.

It has no name anywhere: when the last process that holds it ends, however that happens, the system takes it back.  On
Linux it is no file of ``/dev/shm``, whose size (64 MB in a container, if nobody said otherwise) does not bound it.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from bisect import bisect_right
from contextlib import suppress

from anyckpt.errors import FormatError, OutputError
from anyckpt.identity import Identity
from anyckpt.storage.source import ByteSource, check_filled

_PAGE = mmap.PAGESIZE
_received: dict[int, int] = {}
"""Descriptors of the memory that other processes share with this one, by number."""


class SharedMemory:
    """Memory that its owner fills; it grows, and is kept to be filled again.

    Where the system knows no memory without a name it is a file without one, in the directory for temporary files.

    Attributes:
        descriptor: what another process is sent.
        nbytes: how much is reserved.
    """

    def __init__(self) -> None:
        create = getattr(os, "memfd_create", None)
        if create is not None:
            self.descriptor: int = create("anyckpt", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self.nbytes = 0
        self._map: mmap.mmap | None = None

    def reserve(self, nbytes: int) -> memoryview:
        """The memory, at least so large; what it holds is lost where it has to grow, and earlier views end.

        Raises:
            OutputError: there is not enough memory.
        """
        if nbytes > self.nbytes or self._map is None:
            size = max(_PAGE, -(-nbytes // _PAGE) * _PAGE)
            self.free()
            try:
                os.ftruncate(self.descriptor, size)
                if hasattr(os, "posix_fallocate"):  # else a write without memory for it would end the process
                    os.posix_fallocate(self.descriptor, 0, size)
                self._map = mmap.mmap(self.descriptor, size)
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(self.descriptor, 0)
                if error.errno not in (errno.ENOMEM, errno.ENOSPC):
                    raise
                raise OutputError(
                    "not enough memory to copy the state that is to be saved",
                    expected=f"{size:,} bytes of shared memory",
                    found=error.strerror,
                    remedy="allow fewer saves in flight, or save synchronously",
                ) from error
            self.nbytes = size
        return memoryview(self._map)

    def free(self) -> None:
        """Give the memory back; it can be reserved again."""
        if self._map is not None:
            with suppress(BufferError):  # somebody has a view of it
                self._map.close()
            self._map = None
        if self.nbytes:
            os.ftruncate(self.descriptor, 0)
            self.nbytes = 0

    def close(self) -> None:
        """Give it back for good."""
        self.free()
        os.close(self.descriptor)


def receive(number: int, descriptor: int) -> None:
    """Note a descriptor that another process sent: sources of that number read from it."""
    _received[number] = descriptor


def received(number: int, start: int, length: int) -> bytes:
    """What lies there in memory that another process shares.

    Raises:
        FormatError: it is not there.
    """
    return CopiedSource(number, ((0, start + length, 0),), start + length, "shared memory").read(start, length)


class CopiedSource(ByteSource):
    """A source of which another process put what is needed into shared memory, as this one reads it.

    Args:
        number: of the memory, see ``receive``.
        runs: what is there of the source: (first byte, byte past the last, where it lies in the memory), rising.
        size: of the source.
        name: what to call it in a message.
    """

    __slots__ = ("_number", "_runs")

    def __init__(self, number: int, runs: tuple[tuple[int, int, int], ...], size: int, name: str) -> None:
        self._number = number
        self._runs = runs
        self.name = name
        self.path = None
        self.size = size

    def identity(self) -> Identity | None:
        """None: the same memory holds other bytes at the next save."""
        return None

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        found = bisect_right(self._runs, offset, key=lambda run: run[0]) - 1
        start, stop, where = self._runs[found] if found >= 0 else (0, 0, 0)
        if offset + len(buffer) > stop:
            raise FormatError("was not copied where it is read", path=self.name, found=f"byte {offset:,}")
        position = 0
        while position < len(buffer):
            count = os.preadv(_received[self._number], [buffer[position:]], where + offset - start + position)
            if count == 0:
                check_filled(self, offset, len(buffer), position)
            position += count
