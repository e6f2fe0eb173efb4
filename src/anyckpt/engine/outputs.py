"""The output files of a plan in a directory, opened when something is written to them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Set
from contextlib import contextmanager

from anyckpt.engine.files import BlockFile, Bytes
from anyckpt.engine.plan import Plan

_MOST_OPEN = 128
"""Files kept open, of which each takes two descriptors; systems allow 1,024 by default."""


class OutputFiles:
    """Opens, and closes again those that were not written to for longest when there are too many.

    Args:
        plan: its files' paths and sizes.
        root: the directory, or the file if the plan is one of a single file.
        keep: indices of files whose contents stay when they are opened first.
    """

    def __init__(self, plan: Plan, root: str, *, keep: Set[int]) -> None:
        self._plan = plan
        self._root = root
        self._keep = set(keep)
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[BlockFile, list[int]]] = OrderedDict()

    def write(self, number: int, offset: int, data: Bytes) -> None:
        """Write to a file.

        Raises:
            OutputError: the system refuses.
        """
        with self._opened(number) as file:
            file.write(offset, data)

    def sync(self, numbers: Collection[int]) -> None:
        """Make what is written durable; of files that were closed it is.

        Raises:
            OutputError: the system refuses.
        """
        for number in numbers:
            with self._lock:
                entry = self._open.get(number)
                if entry is None:
                    continue
                entry[1][0] += 1
            try:
                entry[0].sync()
            finally:
                with self._lock:
                    entry[1][0] -= 1

    def make(self, numbers: Collection[int]) -> None:
        """Make files that have no bytes.

        Raises:
            OutputError: the system refuses.
        """
        for number in numbers:
            if number not in self._open and number not in self._keep:
                with self._opened(number):
                    pass

    def close(self, numbers: Collection[int]) -> None:
        """Close files that are durable and that nothing more is written to."""
        with self._lock:
            for number in numbers:
                entry = self._open.pop(number, None)
                if entry is not None:
                    entry[0].close()
                    self._keep.add(number)

    def close_all(self) -> None:
        self.close(list(self._open))

    @contextmanager
    def _opened(self, number: int) -> Iterator[BlockFile]:
        with self._lock:
            entry = self._open.get(number)
            if entry is None:
                self._make_room()
                planned = self._plan.files[number]
                path = os.path.join(self._root, *planned.path.split("/")) if planned.path else self._root
                os.makedirs(os.path.dirname(path), exist_ok=True)
                entry = self._open[number] = (BlockFile(path, planned.nbytes, keep=number in self._keep), [0])
            self._open.move_to_end(number)
            entry[1][0] += 1
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1][0] -= 1

    def _make_room(self) -> None:
        if len(self._open) < _MOST_OPEN:
            return
        for number, (file, users) in self._open.items():
            if not users[0]:
                file.sync()
                file.close()
                del self._open[number]
                self._keep.add(number)
                return
