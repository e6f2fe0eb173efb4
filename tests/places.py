"""Places that are on no disk: in memory, far away, and unreliable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import pytest

from anyckpt.errors import UnreachableError
from anyckpt.storage import requests
from anyckpt.storage.location import SCHEMES
from anyckpt.storage.place import Place
from anyckpt.storage.read_count import count_read
from anyckpt.storage.source import ByteSource, MemorySource, check_filled
from anyckpt.storage.tree import Tree

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
        self.is_far = make is not MemorySource
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
        requests: source, offset and length of each.
        rounds: how many were made one after another, were there no other threads: those that are asked for at once
            count as one, as far as they may fly together; every other read counts by itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: list[tuple[str, int, int]] = []
        self.rounds = 0

    def add(self, name: str, offset: int, length: int) -> None:
        with self._lock:
            self.requests.append((name, offset, length))
            self.rounds += not _together.get()

    @property
    def nbytes(self) -> int:
        return sum(length for _, _, length in self.requests)


_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def counting(log: Log) -> Iterator[None]:
    """Within, requests that are asked for at once count as so many rounds as their number and width make."""
    real = requests.at_once

    def counted(tasks: Sequence[Callable[[], None]], width: int) -> None:
        log.rounds += -(-len(tasks) // width)
        token = _together.set(True)
        try:
            real(tasks, width)
        finally:
            _together.reset(token)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "at_once", counted)
        yield


class FarSource(MemorySource):
    """Bytes that every read of takes a while.

    Args:
        data: the bytes.
        name: what to call them.
        log: gets every read.
        latency: seconds that a read takes.
        at_once: reads that are worth making at once.
    """

    __slots__ = ("_at_once", "_latency", "_log")

    def __init__(self, data: bytes, name: str, log: Log, latency: float, at_once: int = 16) -> None:
        super().__init__(data, name)
        self._at_once = at_once
        self._log = log
        self._latency = latency

    @property
    def at_once(self) -> int:
        return self._at_once

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        self._log.add(self.name, offset, len(buffer))
        count_read(len(buffer))
        time.sleep(self._latency)
        super()._read_into(offset, buffer)


def far(log: Log, latency: float = 0.0) -> Maker:
    """Makes far sources, which answer after ``latency`` seconds."""
    return lambda data, name: FarSource(data, name, log, latency)


class FaultySource(FarSource):
    """A far source that fails, or answers with less, from its ``after``-th read on.

    Args:
        fault: ``fails`` (as a connection that is reset), ``short`` (as a body that is cut), or ``changed`` (as an
            object of another entity tag).
    """

    __slots__ = ("_after", "_fault")

    def __init__(self, data: bytes, name: str, log: Log, fault: str, after: int) -> None:
        super().__init__(data, name, log, 0.0)
        self._fault = fault
        self._after = after

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        if len(self._log.requests) >= self._after:
            if self._fault == "fails":
                raise ConnectionResetError(104, "Connection reset by peer")
            if self._fault == "changed":
                raise UnreachableError(
                    "changed while it was being read", path=self.name, expected="tag 1", found="tag 2"
                )
            check_filled(self, offset, len(buffer), len(buffer) // 2)
        super()._read_into(offset, buffer)
