"""Files of local and mounted file systems, of which a bounded number is open at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

from anyckpt.errors import FormatError, reading_error
from anyckpt.identity import Identity
from anyckpt.storage.read_count import count_read
from anyckpt.storage.source import ByteSource, check_filled

_OPEN_FILES_LIMIT = 256


class _OpenFiles:
    """Descriptors kept open, least recently used out first: a checkpoint may have more files than may be open."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[str, tuple[int, list[int]]] = OrderedDict()

    def acquire(self, path: str) -> tuple[int, list[int]]:
        with self._lock:
            entry = self._descriptors.get(path)
            if entry is None:
                entry = (os.open(path, os.O_RDONLY | os.O_CLOEXEC), [0])
                self._descriptors[path] = entry
                self._evict()
            else:
                self._descriptors.move_to_end(path)
            entry[1][0] += 1
            return entry

    def release(self, entry: tuple[int, list[int]]) -> None:
        with self._lock:
            entry[1][0] -= 1

    def forget(self, path: str) -> None:
        """Close the descriptor of ``path``, which is about to be replaced or removed."""
        with self._lock:
            entry = self._descriptors.get(path)
            if entry is not None and entry[1][0] == 0:
                del self._descriptors[path]
                os.close(entry[0])

    def close_unused(self) -> None:
        """Close the descriptors that nobody reads from at this moment."""
        with self._lock:
            for path, (descriptor, users) in list(self._descriptors.items()):
                if users[0] == 0:
                    del self._descriptors[path]
                    os.close(descriptor)

    def renew(self, path: str, status: os.stat_result) -> None:
        """Close the descriptor of ``path`` if it is of a file that was there before the one of ``status``."""
        with self._lock:
            entry = self._descriptors.get(path)
            if entry is not None and entry[1][0] == 0 and not os.path.samestat(os.fstat(entry[0]), status):
                del self._descriptors[path]
                os.close(entry[0])

    def _evict(self) -> None:
        if len(self._descriptors) <= self._limit:
            return
        for path, (descriptor, users) in self._descriptors.items():
            if users[0] == 0:
                del self._descriptors[path]
                os.close(descriptor)
                return


_open_files = _OpenFiles(_OPEN_FILES_LIMIT)


class LocalFile(ByteSource):
    """A file on a local or mounted file system, read at positions, so that threads do not disturb one another.

    Raises:
        FormatError: the file is missing or not a regular file.
    """

    __slots__ = ("_modified",)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.name = os.fspath(path)
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise reading_error("be opened", path, error) from error
        if not os.path.isfile(self.path):
            raise FormatError("is not a regular file", path=path)
        self.size = status.st_size
        self._modified = status.st_mtime_ns
        _open_files.renew(self.path, status)

    def identity(self) -> Identity:
        """Path, size and time of last modification, as they are now."""
        assert self.path is not None
        status = os.stat(self.path)
        return self.path, status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        assert self.path is not None
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise FormatError(f"cannot be found any more: {error.strerror}", path=self.name) from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise FormatError(
                "changed while it was being read",
                path=self.name,
                expected=f"{self.size} bytes, last modified at {self._modified / 1e9:.6f}",
                found=f"{status.st_size} bytes, last modified at {status.st_mtime_ns / 1e9:.6f}",
                remedy="run it again when nothing writes to the source",
            )

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        assert self.path is not None
        try:
            entry = _open_files.acquire(self.path)
        except OSError as error:
            raise reading_error("be opened", self.name, error) from error
        try:
            position = 0
            while position < len(buffer):
                count = os.preadv(entry[0], [buffer[position:]], offset + position)
                if count == 0:
                    check_filled(self, offset, len(buffer), position)
                position += count
            count_read(len(buffer))
        except OSError as error:
            raise reading_error(f"be read at byte {offset}", self.name, error) from error
        finally:
            _open_files.release(entry)


def forget_open_file(path: str) -> None:
    """Close the cached descriptor of ``path``, which is about to be replaced or removed."""
    _open_files.forget(os.path.abspath(path))


def close_open_files() -> None:
    """Close what is kept open to be read again: a file that is deleted takes its place on the disk until then."""
    _open_files.close_unused()
