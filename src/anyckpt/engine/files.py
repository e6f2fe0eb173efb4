"""Writing blocks to files: past the page cache where the file system takes it, through it elsewhere.

Measured on ext4 (docs/performance.md), durable writes with O_DIRECT take half the time of buffered ones, and two
threads writing one file through the page cache take several times longer than one.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from typing import Any, TypeAlias

import numpy as np

from anyckpt.engine.checksum import CHUNK_BYTES
from anyckpt.errors import OutputError

PAGE = 4096
Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
_DIRECT_MINIMUM = 1 << 20
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems answer that cannot do what is asked."""


class BlockBuffer:
    """Page-aligned memory for one block, reused."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, CHUNK_BYTES + 2 * PAGE)
        self.whole: Bytes = np.frombuffer(self._memory, dtype=np.uint8)

    def at(self, offset: int, nbytes: int) -> Bytes:
        """Memory for bytes ``[offset, offset + nbytes)`` of a file, aligned in memory as they are in the file."""
        lead = offset % PAGE
        return self.whole[lead : lead + nbytes]


class BlockFile:
    """One output file being written by several threads.

    Past the page cache, only whole pages can be written.  A page that two blocks share waits in memory until both
    have filled their part; writing the parts through the page cache instead would stop the other threads' direct
    writes each time.

    Args:
        path: where; created, or opened as it is if ``keep``.
        nbytes: final size; the space is reserved at once, so that a full disk shows before the work is done.

    Raises:
        OutputError: the file cannot be created or the disk has no room.
    """

    def __init__(self, path: str, nbytes: int, *, keep: bool = False) -> None:
        self.path = path
        self.nbytes = nbytes
        self._synced = keep
        self._lock = threading.Lock()
        self._direct: int | None = None
        self._is_refused = False
        self._shared: dict[int, _SharedPage] = {}
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC)
        try:
            self._buffered = os.open(path, flags, 0o644)
            _reserve(self._buffered, nbytes)
        except OSError as error:
            raise write_error(path, error) from error
        if nbytes >= _DIRECT_MINIMUM:
            self._direct = _open_direct(path)

    def write(self, offset: int, data: Bytes) -> None:
        """Write a block that lies in memory as ``BlockBuffer.at`` gave it.

        Raises:
            OutputError: the system refuses.
        """
        try:
            if self._direct is None:
                with self._lock:
                    _write_all(self._buffered, data, offset)
                return
            end = offset + len(data)
            low = min(end, -(-offset // PAGE) * PAGE)
            high = max(low, end // PAGE * PAGE)
            if high > low:
                self._write_pages(data[low - offset : high - offset], low)
            for start, stop in ((offset, low), (high, end)):
                if stop > start:
                    self._share(start, data[start - offset : stop - offset])
        except OSError as error:
            raise write_error(self.path, error) from error

    def _share(self, offset: int, data: Bytes) -> None:
        """Put a block's part of a page with the others' parts; write the page when it is full."""
        number = offset // PAGE
        with self._lock:
            page = self._shared.get(number)
            if page is None:
                page = self._shared[number] = _SharedPage()
                if self._synced:
                    self._load(number, page)
            page.fill(offset % PAGE, data)
            if page.filled == min(PAGE, self.nbytes - number * PAGE):
                self._flush(number, page)
                del self._shared[number]

    def _load(self, number: int, page: _SharedPage) -> None:
        """What is on the disk of a page: an earlier run's parts, and those from before the last sync."""
        data = os.pread(self._buffered, PAGE, number * PAGE)
        page.memory[: len(data)] = data

    def _flush(self, number: int, page: _SharedPage) -> None:
        self._write_pages(page.whole, number * PAGE)

    def _write_pages(self, data: Bytes, offset: int) -> None:
        """Write whole pages past the page cache; through it, from now on, where the file system refuses after all."""
        if not self._is_refused:
            assert self._direct is not None
            try:
                _write_all(self._direct, data, offset)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self._is_refused = True
            else:
                return
        _write_all(self._buffered, data, offset)

    def sync(self) -> None:
        """Make everything written so far durable.

        Raises:
            OutputError: the system refuses.
        """
        try:
            with self._lock:
                for number, page in self._shared.items():
                    self._flush(number, page)
                self._shared.clear()
                self._synced = True
                if self._direct is not None:
                    os.ftruncate(self._buffered, self.nbytes)
            sync_file(self._buffered)
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        for descriptor in (self._buffered, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._direct = None


class _SharedPage:
    """A page of a file that more than one block fills."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, PAGE)
        self.whole: Bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self.filled = 0

    def fill(self, start: int, data: Bytes) -> None:
        self.whole[start : start + len(data)] = data
        self.filled += len(data)


def write_error(path: str, error: OSError) -> OutputError:
    """What an operating-system error means to the user of a destination."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "no space left for the output" if error.errno == errno.ENOSPC else "the disk quota is used up",
            path=path,
            remedy="free some space and do the same again (a command goes on with --resume)",
        )
    return OutputError(f"cannot be written: {error.strerror}", path=path)


def sync_file(descriptor: int) -> bool:
    """Make what is written to an open file durable; whether the file system knows how to (some of FUSE do not)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True


def remove_emptied(directory: str) -> None:
    """Remove a directory of which all was removed: on NFS and FUSE what was open keeps a name there until it is closed.

    If something is in it all the same, as somebody has made it meanwhile, it stays.
    """
    for pause in (0.0, 0.01, 0.1, 0.5):  # FUSE closes a file a moment after it was asked to
        time.sleep(pause)
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return
        except OSError:
            continue
        return


def sync_directory(path: str) -> bool:
    """Make the entries of a directory durable; whether the file system knows how to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return sync_file(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: Bytes, offset: int) -> None:
    view = data.data
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset += count


def _open_direct(path: str) -> int | None:
    """A descriptor that bypasses the page cache, or None where the file system refuses (tmpfs, some network ones)."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flag)
    except OSError:
        return None
    with mmap.mmap(-1, PAGE) as probe:
        try:
            os.preadv(descriptor, [probe], 0)
        except OSError:
            os.close(descriptor)
            return None
    return descriptor


def _reserve(descriptor: int, nbytes: int) -> None:
    """Set the size and reserve the blocks; where the file system cannot reserve, only set the size.

    The system call is used because the C library's ``posix_fallocate`` writes every block where it is missing.
    """
    if nbytes and hasattr(os, "posix_fallocate"):
        libc = ctypes.CDLL(None, use_errno=True)
        fallocate = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
        if fallocate is not None:
            fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
            if fallocate(descriptor, 0, 0, nbytes) != 0:
                code = ctypes.get_errno()
                if code not in _REFUSED:
                    raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, nbytes)
