"""What openers of files read before any data, asked for many files at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from anyckpt.errors import AnyckptError
from anyckpt.storage.requests import holding, is_far

if TYPE_CHECKING:
    from anyckpt.storage.requests import Wanted
    from anyckpt.storage.source import ByteSource

    Steps = Callable[[ByteSource], Iterator[Sequence[Wanted]]]
    """Ranges that an opener reads, in rounds: what is yielded is held when the next round is asked for."""

T = TypeVar("T")

EDGE = 64 << 10
"""Bytes at either end of a file that are read with the first of them: headers and directories lie there."""

_BATCH = 64


def read_each(read: Callable[[ByteSource], T], sources: Iterable[ByteSource], steps: Steps) -> list[T]:
    """What ``read`` gives of each source, in their order; of far ones, what it reads is asked for of many at once.

    Args:
        read: opens a source.
        sources: what to open.
        steps: the ranges that it will read.
    """
    every = list(sources)
    if not any(map(is_far, every)):
        return [read(source) for source in every]
    found: list[T] = []
    for start in range(0, len(every), _BATCH):
        batch = every[start : start + _BATCH]
        with ExitStack() as stack:
            going = [steps(source) for source in batch]
            while going:
                going, wanted = _next(going)
                stack.enter_context(holding(wanted))
            found += [read(source) for source in batch]
    return found


def _next(
    going: Sequence[Iterator[Sequence[Wanted]]],
) -> tuple[list[Iterator[Sequence[Wanted]]], list[Wanted]]:
    """Those that go on, and what they want next; what is damaged is the opener's to report."""
    left: list[Iterator[Sequence[Wanted]]] = []
    wanted: list[Wanted] = []
    for rounds in going:
        try:
            wanted += next(rounds)
        except (StopIteration, AnyckptError):
            continue
        left.append(rounds)
    return left, wanted


def edges(source: ByteSource) -> list[Wanted]:
    """The first and the last bytes of a source."""
    return [(source, 0, EDGE), (source, source.size - EDGE, EDGE)]


def whole(source: ByteSource) -> Iterator[Sequence[Wanted]]:
    """Steps of a small file that is read whole."""
    yield [(source, 0, min(source.size, EDGE))]


class Ahead:
    """Reads of a source in rising order, from place to place; of a far one, each reads what may come next too."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._most = EDGE if is_far(source) else 0
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """As the source's ``read``.

        Raises:
            FormatError: the range is not inside the source, or cannot be read.
        """
        inside = offset - self._start
        if not 0 <= inside <= inside + length <= len(self._data):
            self._data = self._source.read(offset, max(length, min(self._most, self._source.size - offset)))
            self._start, inside = offset, 0
        return self._data[inside : inside + length]
