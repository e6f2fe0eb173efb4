"""A value that is made of all elements of tensors, found in passes of its own when it is first needed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import numpy as np

from anyckpt.identity import Identity
from anyckpt.indexing import Array
from anyckpt.storage.gather import SCRATCH_BYTES, scratch
from anyckpt.tensor.lazy import LazyTensor, as_numbers

Value = TypeVar("Value")

_MOST_EARLY = 64
"""Runs that are held because one before them is still read."""


class Reduction(ABC, Generic[Value]):
    """What all elements come to; threads that need it find it together, in blocks of bounded memory.

    Args:
        operands: one or several groups of tensors; those of a group have one shape and are looked at together.
    """

    def __init__(self, operands: Sequence[Sequence[LazyTensor]]) -> None:
        self.operands = tuple(tuple(group) for group in operands)
        self._changed = threading.Condition()
        self._at_work = 0
        self._round = 0
        self._begin()
        self._value: tuple[Value] | None = None

    def identity(self) -> Identity:
        return self.operands

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.operands,)

    @abstractmethod
    def nothing(self) -> Value:
        """What no elements come to."""

    @abstractmethod
    def look_at(self, arrays: Sequence[Array], group: int, start: int) -> Value:
        """What a run of elements comes to; called in any thread.

        Args:
            arrays: the same run of each tensor of a group, of their numpy types.
            group: its number.
            start: the first element's number, counted in C order.
        """

    @abstractmethod
    def join(self, first: Value, second: Value) -> Value:
        """What all elements up to a run come to with that run, and may be changed for it.

        Runs are joined in the order of their elements, whichever thread has read them, so that sums of rounded numbers
        are always the same.
        """

    def _begin(self) -> None:
        self._runs = enumerate(self._all_runs())
        self._found: Value | None = None
        self._joined = 0
        self._early: dict[int, Value] = {}  # runs that wait for those before them

    def value(self) -> Value:
        """What all elements come to.

        Raises:
            FormatError: bytes are missing from a file.
        """
        while self._value is None:
            with self._changed:
                if len(self._early) >= _MOST_EARLY:  # the thread that has the one before them is slow
                    self._changed.wait()
                    continue
                run = next(self._runs, None)
                if run is None:
                    if self._at_work:
                        self._changed.wait()
                        continue
                    if self._value is None:
                        self._value = (self.nothing() if self._found is None else self._found,)
                        self._found = None
                    break
                self._at_work += 1
                begun = self._round
            number, place = run
            try:
                found = self._read(*place)
            except BaseException:
                with self._changed:  # the next one to ask begins again, and meets the same
                    self._begin()
                    self._round += 1
                    self._at_work -= 1
                    self._changed.notify_all()
                raise
            with self._changed:
                if begun == self._round:
                    self._early[number] = found
                    self._join_those_in_order()
                self._at_work -= 1
                self._changed.notify_all()
        return self._value[0]

    def _join_those_in_order(self) -> None:
        while self._joined in self._early:
            run = self._early.pop(self._joined)
            self._found = run if self._found is None else self.join(self._found, run)
            self._joined += 1

    def _all_runs(self) -> Iterator[tuple[int, int, int]]:
        for number, group in enumerate(self.operands):
            step = max(1, SCRATCH_BYTES // max(tensor.dtype.itemsize for tensor in group))
            for start in range(0, group[0].size, step):
                yield number, start, min(step, group[0].size - start)

    def _read(self, number: int, start: int, count: int) -> Value:
        with ExitStack() as buffers:
            arrays = []
            for tensor in self.operands[number]:
                raw = buffers.enter_context(scratch(count * tensor.dtype.itemsize)).view(tensor.dtype.raw)
                tensor.fill(start, raw)
                arrays.append(as_numbers(raw, tensor.dtype))
            with np.errstate(all="ignore"):
                return self.look_at(arrays, number, start)
