"""How many bytes are read from sources, by whoever counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class ReadCount:
    """Bytes read from sources by whoever counts with it, in any thread."""

    def __init__(self) -> None:
        self.nbytes = 0


_read_lock = threading.Lock()
_of_process = ReadCount()
_counts: ContextVar[tuple[ReadCount, ...]] = ContextVar("counts", default=())


@contextmanager
def counting(count: ReadCount) -> Iterator[None]:
    """Within, what this thread reads is counted, and what others read for it."""
    token = _counts.set((*_counts.get(), count))
    try:
        yield
    finally:
        _counts.reset(token)


def count_read(nbytes: int) -> None:
    """Count bytes that a source has read from where it lies."""
    own = _counts.get()
    with _read_lock:
        _of_process.nbytes += nbytes
        for count in own:
            count.nbytes += nbytes


def bytes_read() -> int:
    """Bytes that this process has read from its sources so far, for tests of what is not read."""
    return _of_process.nbytes
