"""Reading many tensors in a few threads: numpy and hashlib let other threads run while they work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TypeVar

from anyckpt.storage.requests import HELD_BYTES, given_up_with
from anyckpt.tensor import LazyTensor, held

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes to do, from any thread."""

Advance = Callable[[int], None]
"""Called with the number of bytes just read."""

_WORKERS = 4


class Meter:
    """Adds up bytes from several threads and tells a callback.

    Args:
        total: bytes to do; the sum told is never larger than the total told.
        progress: what to tell, or None.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def advance(self, count: int) -> None:
        """Add ``count`` bytes.

        Raises:
            InterruptedError: another thread has failed, so this one need not go on.
        """
        if self.stopped.is_set():
            raise InterruptedError
        if self._progress is None:
            return
        with self._lock:
            self._done += count
            self._progress(self._done, max(self._done, self._total))

    def stop(self) -> None:
        """Make threads that advance give up."""
        self.stopped.set()


def each_of_tensors(
    work: Callable[[Item, Advance], Result],
    items: Iterable[Item],
    tensors: Callable[[Item], Sequence[LazyTensor]],
    meter: Meter,
    workers: int | None = None,
) -> list[Result]:
    """As ``each``; of far tensors, small ones of several items are asked for together, in more threads.

    Args:
        work: see ``each``.
        items: see ``each``.
        tensors: what ``work`` reads of an item.
        meter: see ``each``.
        workers: see ``each``.
    """
    groups: list[list[Item]] = []
    left = 0
    some_far = False
    for item in items:
        read = tensors(item)
        own = sum(tensor.nbytes for tensor in read)
        far = any(tensor.is_far for tensor in read)
        if far and own <= left:
            groups[-1].append(item)
            left -= own
        else:
            groups.append([item])
            left = HELD_BYTES - own if far else 0
        some_far = some_far or far

    def several(group: list[Item], advance: Advance) -> list[Result]:
        with held(tensor for item in group for tensor in tensors(item)) if len(group) > 1 else nullcontext():
            return [work(item, advance) for item in group]

    return [one for found in each(several, groups, meter, workers or (_WORKERS if some_far else None)) for one in found]


def each(
    work: Callable[[Item, Advance], Result], items: Iterable[Item], meter: Meter, workers: int | None = None
) -> list[Result]:
    """The results of ``work`` for each item, in the items' order.

    The first error ends the work and is raised; so does an interrupt from the keyboard.

    Args:
        work: called with an item and the meter's ``advance``.
        items: what to work on.
        meter: told of progress.
        workers: threads; as many as processors, up to 4, if None.
    """
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    def one(item: Item) -> Result:
        with given_up_with(meter.stopped):
            return work(item, meter.advance)

    with ThreadPoolExecutor(workers or min(_WORKERS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((future for future in futures if future.done() and future.exception() is not None), None)
            return [future.result() for future in (futures if failed is None else [failed])]
        except BaseException:
            meter.stop()
            pool.shutdown(cancel_futures=True)
            raise
