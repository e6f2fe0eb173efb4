"""Places that are on no disk: in memory, far away, and unreliable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from anyckpt.storage.place import SCHEMES, Place, Tree
from anyckpt.storage.source import ByteSource, MemorySource

Maker = Callable[[bytes, str], ByteSource]


class MemoryPlace(Tree):
    """A folder of files in memory.

    Args:
        root: its path.
        files: contents by name.
        make: a file's source, from its contents and path.
    """

    def __init__(self, root: str, files: Mapping[str, bytes], make: Maker = MemorySource) -> None:
        super().__init__(root)
        self._files = {name: make(data, f"{root}/{name}") for name, data in files.items()}

    def listing(self) -> Mapping[str, ByteSource]:
        return self._files


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file of a directory, links followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def registered(scheme: str, place: Place) -> Iterator[None]:
    """Paths of ``scheme`` are in ``place``."""
    SCHEMES[scheme] = lambda path: place
    try:
        yield
    finally:
        del SCHEMES[scheme]


class Log:
    """What was asked of far sources.

    Attributes:
        requests: offset and length of each, by source.
        rounds: requests one after another: each begins a round after the last that was answered before it.
        most: requests at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flying = 0
        self.requests: list[tuple[str, int, int]] = []
        self.rounds = 0
        self.most = 0

    @contextmanager
    def request(self, name: str, offset: int, length: int) -> Iterator[None]:
        with self._lock:
            turn = self.rounds + 1
            self._flying += 1
            self.most = max(self.most, self._flying)
            self.requests.append((name, offset, length))
        try:
            yield
        finally:
            with self._lock:
                self._flying -= 1
                self.rounds = max(self.rounds, turn)

    @property
    def nbytes(self) -> int:
        return sum(length for _, _, length in self.requests)


class FarSource(MemorySource):
    """Bytes that every read of takes a while."""

    __slots__ = ("_latency", "_log")

    def __init__(self, data: bytes, name: str, log: Log, latency: float) -> None:
        super().__init__(data, name)
        self._log = log
        self._latency = latency

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        with self._log.request(self.name, offset, len(buffer)):
            time.sleep(self._latency)
            super()._read_into(offset, buffer)


def far(log: Log, latency: float = 0.03) -> Maker:
    """Makes sources that answer after ``latency`` seconds."""
    return lambda data, name: FarSource(data, name, log, latency)
