"""Many reads asked for at once: ranges coalesced into requests, made by a few threads, and held until they are used.

Where a read takes a round trip (an object store, a network's file system), what counts is how many are made one after
another.  So whoever knows what it is about to read says so: ``holding`` asks for all of it together, and reads of it
by the same thread are then answered from memory.  What was not said is read as ever.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, TypeVar

from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from anyckpt.storage.source import ByteSource

    Wanted = tuple[ByteSource, int, int]
    """A source, the first byte wanted of it, and how many."""

    _Windows = dict[int, tuple[ByteSource, list[tuple[int, memoryview]]]]
    """By the identity of a source, which is kept so long, what is held of it: first bytes and data, rising."""

T = TypeVar("T")

GAP = 64 << 10
"""Bytes that are read for nothing rather than to make another request: what a link gives in a part of a round trip."""

MOST = 8 << 20
"""Bytes of one request; only a single range may be longer."""

HELD_BYTES = 6 << 20
"""Bytes that a thread holds for one read of many ranges."""

_THREADS = 32


@dataclass(frozen=True)
class Request:
    """A run of bytes that answers several ranges.

    Attributes:
        start: first byte.
        stop: byte past the last.
        ranges: indices of the ranges that lie in it, by rising offset.
    """

    start: int
    stop: int
    ranges: tuple[int, ...]


def coalesced(ranges: Sequence[tuple[int, int]], *, gap: int = GAP, most: int = MOST) -> list[Request]:
    """The fewest requests that answer ranges (first byte, length) of one source, by rising offset.

    Neighbours at most ``gap`` bytes apart become one request, as far as that has at most ``most`` bytes.  Every range
    lies whole in one request; one of no bytes in none.
    """
    requests: list[Request] = []
    start = stop = 0
    inside: list[int] = []
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number]):
        first, length = ranges[number]
        if not length:
            continue
        if inside and first - stop <= gap and max(stop, first + length) - start <= most:
            stop = max(stop, first + length)
        elif not inside or first + length > stop:
            if inside:
                requests.append(Request(start, stop, tuple(inside)))
            start, stop, inside = first, first + length, []
        inside.append(number)
    if inside:
        requests.append(Request(start, stop, tuple(inside)))
    return requests


def at_once(tasks: Sequence[Callable[[], None]], width: int) -> None:
    """Carry out tasks, at most ``width`` at once; the caller's thread does its share.

    Raises:
        BaseException: the first that a task raised, when all that had begun have ended.
    """
    from concurrent.futures import wait  # here, as it takes milliseconds to import

    left = iter(tasks)
    lock = threading.Lock()
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            with lock:
                task = next(left, None)
            if task is None:
                return
            try:
                task()
            except BaseException as error:
                failed.append(error)
                stop.set()  # the others need not begin, nor wait any longer
                return

    helpers: list[Future[None]] = []
    try:
        with given_up_with(stop):
            for _ in range(min(width, len(tasks)) - 1):
                helpers.append(_pool().submit(copy_context().run, work))
            work()
        wait(helpers)
    except BaseException:  # an interrupt from the keyboard, while this thread does nothing but wait
        stop.set()
        raise
    if failed:
        try:
            raise failed[0]
        finally:
            failed.clear()  # which holds what holds this


_stopping: ContextVar[tuple[threading.Event, ...]] = ContextVar("stopping", default=())


@contextmanager
def given_up_with(stop: threading.Event) -> Iterator[None]:
    """Within, this thread and those that read for it need not wait for answers any more when ``stop`` is set."""
    token = _stopping.set((*_stopping.get(), stop))
    try:
        yield
    finally:
        _stopping.reset(token)


def is_given_up() -> bool:
    """Whether this thread's work has failed elsewhere, or was interrupted: it need not wait any more."""
    return any(stop.is_set() for stop in _stopping.get())


_shared: list[ThreadPoolExecutor] = []
_making = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    with _making:
        if not _shared:
            _shared.append(ThreadPoolExecutor(_THREADS, thread_name_prefix="anyckpt-read"))
        return _shared[0]


os.register_at_fork(after_in_child=_shared.clear)


class _Held(threading.local):
    """What a thread has asked for ahead, by the identity of the source."""

    def __init__(self) -> None:
        self.windows: _Windows = {}


_held = _Held()


def answer(source: ByteSource, offset: int, buffer: memoryview) -> bool:
    """Fill ``buffer`` if this thread holds the bytes of ``source`` from ``offset`` on; whether it does."""
    entry = _held.windows.get(id(source))
    data = None if entry is None else _within(entry[1], offset, len(buffer))
    if data is None:
        return False
    buffer[:] = data
    return True


def _within(windows: Sequence[tuple[int, memoryview]], offset: int, length: int) -> memoryview | None:
    at = bisect_right(windows, offset, key=lambda window: window[0])
    for start, data in reversed(windows[max(0, at - 4) : at]):
        if offset + length <= start + len(data):
            return data[offset - start : offset - start + length]
    return None


def is_far(source: ByteSource) -> bool:
    """Whether it pays to ask for many of its ranges at once."""
    return source.at_once > 1


def in_few(read: Callable[[int, int], None], need: Callable[[int, int], list[Wanted]], start: int, stop: int) -> None:
    """Call ``read`` for all of ``[start, stop)``, what it needs held: as a whole, or in halves that need less.

    Args:
        read: reads elements from an index to another.
        need: the ranges that it would read.
        start: first index.
        stop: index past the last.
    """
    wanted = need(start, stop)
    if sum(length for _, _, length in wanted) > HELD_BYTES and stop - start > 1:
        middle = (start + stop) // 2
        in_few(read, need, start, middle)
        in_few(read, need, middle, stop)
        return
    with holding(wanted):
        read(start, stop)


def in_batches(items: Iterable[T], wanted: Callable[[T], Wanted]) -> Iterator[list[T]]:
    """Items as many at a time as want little enough to be held; those that want something near, one by one.

    An error of ``items`` is raised when what came before it has been given.
    """
    batch: list[T] = []
    nbytes = 0
    try:
        for item in items:
            source, _, own = wanted(item)
            if batch and (nbytes + own > HELD_BYTES or not is_far(source)):
                yield batch
                batch, nbytes = [], 0
            batch.append(item)
            nbytes += own
            if not is_far(source):
                yield batch
                batch, nbytes = [], 0
    except AnyckptError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


@contextmanager
def holding(wanted: Iterable[Wanted]) -> Iterator[None]:
    """Within, reads of these ranges by this thread are answered from memory; they are read now, at once.

    Ranges of near sources are left out, and so are those held already and what lies outside a source.  What cannot be
    read is not held: whoever needs it meets the error, and can say what it needed it for.
    """
    before = _held.windows
    fetched = _fetch(list(wanted), before)
    if not fetched:
        yield
        return
    windows = dict(before)
    for key, (source, found) in fetched.items():
        known = before[key][1] if key in before else []
        windows[key] = source, sorted([*known, *found], key=lambda window: window[0])
    _held.windows = windows
    try:
        yield
    finally:
        _held.windows = before


def _fetch(wanted: Sequence[Wanted], known: _Windows) -> _Windows:
    """Windows by source of what is wanted and not yet known."""
    sources: dict[int, ByteSource] = {}
    ranges: dict[int, list[tuple[int, int]]] = {}
    for asked, first, length in wanted:
        for source, start, count in asked.wanted(first, length) if is_far(asked) else ():
            begin, end = max(0, start), min(start + count, source.size)
            if begin < end and not _is_known(known, source, begin, end):
                sources[id(source)] = source
                ranges.setdefault(id(source), []).append((begin, end - begin))
    fetched: _Windows = {key: (source, []) for key, source in sources.items()}
    tasks: list[Callable[[], None]] = []
    for key, own in ranges.items():
        for request in coalesced(own):
            tasks.append(_task(sources[key], request, fetched[key][1]))
    if tasks:
        at_once(tasks, max(source.at_once for source in sources.values()))
    return fetched


def _is_known(known: _Windows, source: ByteSource, begin: int, end: int) -> bool:
    return id(source) in known and _within(known[id(source)][1], begin, end - begin) is not None


def _task(source: ByteSource, request: Request, into: list[tuple[int, memoryview]]) -> Callable[[], None]:
    # made here: the allocator keeps some memory for each thread that takes any, and those that read are many
    data = memoryview(bytearray(request.stop - request.start))

    def task() -> None:
        try:
            source.read_through(request.start, data)
        except AnyckptError:
            return
        into.append((request.start, data.toreadonly()))

    return task
